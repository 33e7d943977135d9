"""The tables of the service corpus: slot values, openers, frames, closers and intents, in English and Chinese.

Data only; `service.py` reads it. Each row is a pair, English then Chinese, written `English | Chinese`.
Between the languages every table is one-to-one, so that a translation has exactly one right answer, both ways.
An act is a verb phrase in the base form that fits every frame; all acts of an intent use the same slots.
"""

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

# Open classes: a pattern, then how English and Chinese write its value.
# In a pattern @ is a letter, % a consonant (no accidental words), # a digit, & a digit from 1 to 9.
PATTERNS = {
    "order_id": ("@#####", "{}", "{}"),
    "other_order": ("@#####", "{}", "{}"),
    "tracking": ("TR########", "{}", "{}"),
    "coupon": ("%%%%##", "{}", "{}"),
    "amount": ("&#.#0", "${}", "{}美元"),
    "phone": ("555-####", "{}", "{}"),
}

DEVICES = """
phone | 手机; tablet | 平板电脑; laptop | 笔记本电脑; camera | 相机; printer | 打印机; smart watch | 智能手表
router | 路由器; television | 电视机; speaker | 音箱; projector | 投影仪; robot vacuum | 扫地机器人
air purifier | 空气净化器; e-reader | 电子书阅读器; game console | 游戏机
"""

GARMENTS = """
jacket | 夹克; coat | 大衣; raincoat | 雨衣; sweater | 毛衣; shirt | 衬衫; dress | 连衣裙; skirt | 半身裙
hoodie | 连帽衫; vest | 背心; tracksuit | 运动服
"""

HOUSEHOLD = """
desk lamp | 台灯; office chair | 办公椅; backpack | 背包; suitcase | 行李箱; umbrella | 雨伞; kettle | 电热水壶
frying pan | 平底锅; teapot | 茶壶; mattress | 床垫; bookshelf | 书架; wall clock | 挂钟; tent | 帐篷
yoga mat | 瑜伽垫; mirror | 镜子; blanket | 毯子; pillow | 枕头; rice cooker | 电饭锅; bicycle | 自行车
"""

NAMES = """
Anna | 安娜; David | 大卫; Maria | 玛丽亚; Peter | 彼得; Emma | 艾玛; Lucas | 卢卡斯; Sophie | 苏菲; Daniel | 丹尼尔
Laura | 劳拉; Michael | 迈克尔; Sarah | 莎拉; Thomas | 托马斯; Julia | 朱莉娅; Paul | 保罗; Grace | 格蕾丝
Robert | 罗伯特; Alice | 爱丽丝; James | 詹姆斯; Helen | 海伦; Kevin | 凯文; Linda | 琳达; Mark | 马克; Nancy | 南希
Oliver | 奥利弗; Rachel | 瑞秋; Simon | 西蒙; Victor | 维克多; William | 威廉; Lily | 莉莉; Henry | 亨利
Wang Fang | 王芳; Zhang Min | 张敏; Chen Jie | 陈杰; Liu Yang | 刘洋
"""

CITIES = """
Beijing | 北京; Shanghai | 上海; Guangzhou | 广州; Shenzhen | 深圳; Chengdu | 成都; Hangzhou | 杭州; Wuhan | 武汉
Nanjing | 南京; Xi'an | 西安; Hong Kong | 香港; Singapore | 新加坡; Tokyo | 东京; Seoul | 首尔; Sydney | 悉尼
London | 伦敦; Paris | 巴黎; Berlin | 柏林; Madrid | 马德里; Rome | 罗马; Vienna | 维也纳; Dublin | 都柏林
New York | 纽约; Chicago | 芝加哥; Boston | 波士顿; Toronto | 多伦多; Vancouver | 温哥华; Zurich | 苏黎世
"""

COLOURS = """
black | 黑色; white | 白色; red | 红色; blue | 蓝色; green | 绿色; grey | 灰色; pink | 粉色; yellow | 黄色
brown | 棕色; orange | 橙色; purple | 紫色; silver | 银色
"""

PAYMENTS = """
credit card | 信用卡; debit card | 借记卡; bank transfer | 银行转账; Alipay | 支付宝; WeChat Pay | 微信支付
PayPal | 贝宝; UnionPay | 银联; gift card | 礼品卡
"""

SIZES = "extra small | 特小号; small | 小号; medium | 中号; large | 大号; extra large | 特大号"


def _pairs(table: str) -> list[tuple[str, str]]:
    """Splits `a | 甲; b | 乙` (also over several lines) into pairs."""
    cells = table.strip().replace("\n", ";").split(";")
    return [(en.strip(), zh.strip()) for en, zh in (cell.split("|") for cell in cells)]


def _times() -> list[tuple[str, str]]:
    morning = [(f"{hour} am", f"上午{hour}点") for hour in (9, 10, 11)]
    afternoon = [(f"{hour} pm", f"下午{hour}点") for hour in range(1, 6)]
    return morning + afternoon + [(f"{hour} pm", f"晚上{hour}点") for hour in (6, 7, 8)]


VALUES = {
    "product": _pairs(DEVICES) + _pairs(GARMENTS) + _pairs(HOUSEHOLD),
    "device": _pairs(DEVICES),
    "garment": _pairs(GARMENTS),
    "city": _pairs(CITIES),
    "name": _pairs(NAMES),
    "recipient": _pairs(NAMES),
    "colour": _pairs(COLOURS),
    "payment": _pairs(PAYMENTS),
    "size": _pairs(SIZES),
    "date": [(f"{en} {day}", f"{month}月{day}日") for month, en in enumerate(MONTHS, 1) for day in range(1, 29)],
    "weekday": list(zip(WEEKDAYS, (f"星期{day}" for day in "一二三四五六日"), strict=True)),
    "time": _times(),
    "count": [(str(count), str(count)) for count in range(2, 10)],
}

OPENERS = [
    ("", ""),
    ("Hello!", "您好！"),
    ("Hi!", "嗨！"),
    ("Good morning!", "早上好！"),
    ("Good afternoon!", "下午好！"),
    ("Good evening!", "晚上好！"),
    ("Hello, this is {name}.", "您好，我是{name}。"),
    ("Excuse me.", "打扰一下。"),
    ("I have a question.", "我有个问题。"),
    ("I hope you can help me.", "希望您能帮帮我。"),
]

FRAMES = [
    ("I want to {act}.", "我想{act}。"),
    ("I would like to {act}.", "我希望能{act}。"),
    ("I need to {act}.", "我需要{act}。"),
    ("I have to {act} as soon as possible.", "我必须尽快{act}。"),
    ("I am trying to {act}.", "我正在尝试{act}。"),
    ("I tried to {act}, but it did not work.", "我试着{act}，但是没有成功。"),
    ("I do not know how to {act}.", "我不知道怎么{act}。"),
    ("I am contacting you to {act}.", "我联系你们是想{act}。"),
    ("Please help me {act}.", "请帮我{act}。"),
    ("Please tell me how to {act}.", "请告诉我怎么{act}。"),
    ("Can you help me {act}?", "您能帮我{act}吗？"),
    ("Could you please help me {act}?", "能麻烦您帮我{act}吗？"),
    ("Who can help me {act}?", "谁能帮我{act}？"),
    ("How do I {act}?", "我该怎么{act}？"),
    ("How can I {act}?", "我怎样才能{act}？"),
    ("Where can I {act}?", "我在哪里可以{act}？"),
    ("Can I {act}?", "我能{act}吗？"),
    ("Is it possible to {act}?", "可以{act}吗？"),
    ("Is there a way to {act}?", "有没有办法{act}？"),
    ("What do I have to do to {act}?", "我要做什么才能{act}？"),
    ("What is the best way to {act}?", "要{act}，最好的办法是什么？"),
]

CLOSERS = [
    ("", ""),
    ("Thank you!", "谢谢！"),
    ("Thanks in advance!", "先谢谢了！"),
    ("It is urgent.", "事情比较急。"),
    ("Please reply soon.", "请尽快回复。"),
    ("Thank you for your help!", "谢谢您的帮助！"),
    ("I look forward to your answer.", "期待您的答复。"),
]

# [intent], its acts, "> answer", then pairs of "? follow-up question" and "! its answer".
# A Chinese half may stand on the next line, after an indented bar.
INTENTS = """
[cancel_order]
cancel order {order_id} | 取消订单{order_id}
call off order {order_id} | 撤销订单{order_id}
withdraw order {order_id} | 撤回订单{order_id}
void order {order_id} | 作废订单{order_id}
> Order {order_id} can be cancelled until it ships. Please confirm in My Orders.
  | 订单{order_id}发货前都可以取消，请在“我的订单”里确认。
? When will I get my money back? | 钱什么时候退给我？
! The money for order {order_id} comes back within five days. | 订单{order_id}的款项会在五天内退回。
[track_order]
track order {order_id} | 跟踪订单{order_id}
check the status of order {order_id} | 查询订单{order_id}的状态
see where order {order_id} is now | 查看订单{order_id}现在到哪里了
follow the progress of order {order_id} | 了解订单{order_id}的进度
> Order {order_id} has left our warehouse and is on its way. | 订单{order_id}已经出库，正在运送途中。
? How many days will it take? | 还要几天？
! Order {order_id} needs two more days. | 订单{order_id}还需要两天。
[change_address]
change the delivery address of order {order_id} to {city} | 把订单{order_id}的收货地址改到{city}
send order {order_id} to {city} instead | 把订单{order_id}改寄到{city}
redirect order {order_id} to {city} | 将订单{order_id}转送到{city}
have order {order_id} delivered to another address in {city} | 把订单{order_id}送到{city}的另一个地址
> Order {order_id} will go to {city}. Please enter the new street in My Orders.
  | 订单{order_id}将送往{city}，请在“我的订单”里填写新的街道。
? Does the change cost anything? | 更改要收费吗？
! No, sending order {order_id} to {city} is free of charge. | 不收费，订单{order_id}改送{city}是免费的。
[change_recipient]
change the recipient of order {order_id} to {recipient} | 把订单{order_id}的收件人改为{recipient}
have {recipient} receive order {order_id} | 让{recipient}代收订单{order_id}
put the name {recipient} on order {order_id} | 在订单{order_id}上写{recipient}的名字
address order {order_id} to {recipient} | 把订单{order_id}寄给{recipient}
> {recipient} is now the recipient of order {order_id}. | 订单{order_id}的收件人现在是{recipient}。
? Is an identity card needed? | 需要带身份证吗？
! Yes, {recipient} should show an identity card. | 需要，请{recipient}出示身份证。
[add_to_order]
add the {product} to order {order_id} | 在订单{order_id}里加上{product}
put the {product} into order {order_id} as well | 把{product}也放进订单{order_id}
include the {product} in order {order_id} | 把{product}加入订单{order_id}
buy the {product} together with order {order_id} | 随订单{order_id}一起购买{product}
> The {product} has been added to order {order_id}. Please pay the difference today.
  | {product}已加入订单{order_id}，请在今天补足差价。
? Will everything come in one parcel? | 会放在一个包裹里寄来吗？
! Yes, the {product} travels with order {order_id}. | 会的，{product}和订单{order_id}一起寄出。
[change_quantity]
change the quantity of the {product} to {count} | 把{product}的数量改成{count}
set the number of units of the {product} to {count} | 将{product}的件数设为{count}
order {count} units of the {product} instead of one | 把{product}从一件改订为{count}件
correct the amount of the {product} to {count} pieces | 将{product}的数目更正为{count}件
> The quantity of the {product} is now {count}. The total has been updated.
  | {product}的数量现在是{count}，总价已更新。
? Is there a discount for {count} units? | 买{count}件有折扣吗？
! Yes, you save five percent on {count} units. | 有，买{count}件可以优惠百分之五。
[change_colour]
change the colour of the {product} to {colour} | 把{product}的颜色改成{colour}
get the {product} in {colour} instead | 把{product}换成{colour}的
switch the {product} to the {colour} version | 将{product}换为{colour}款
have the ordered {product} sent in {colour} | 将订购的{product}改发{colour}的
> We will send the {product} in {colour}. The price stays the same. | 我们会寄出{colour}的{product}，价格不变。
? Will it arrive later because of that? | 这样会晚到吗？
! The {product} in {colour} arrives one day later. | {colour}的{product}会晚一天到。
[gift_wrapping]
have order {order_id} wrapped as a gift | 给订单{order_id}加上礼品包装
add gift wrapping to order {order_id} | 为订单{order_id}选择礼盒包装
send order {order_id} as a present with a ribbon | 把订单{order_id}扎上丝带当礼物寄出
get wrapping paper and a card for order {order_id} | 给订单{order_id}配上包装纸和贺卡
> Order {order_id} will be gift-wrapped with a card inside. | 订单{order_id}会用礼品纸包好，并附上贺卡。
? Will the price be visible? | 会看到价格吗？
! No, order {order_id} comes without a price tag. | 不会，订单{order_id}不附价格标签。
[combine_orders]
combine orders {order_id} and {other_order} | 合并订单{order_id}和{other_order}
merge order {order_id} with order {other_order} | 把订单{order_id}并入订单{other_order}
ship orders {order_id} and {other_order} together | 将订单{order_id}和{other_order}一起发货
put orders {order_id} and {other_order} in one box | 把订单{order_id}和{other_order}装在一个箱子里
> Orders {order_id} and {other_order} will be shipped together. | 订单{order_id}和{other_order}将一起发货。
? Do I pay for delivery twice? | 运费要付两次吗？
! No, you pay only once for {order_id} and {other_order}. | 不用，{order_id}和{other_order}只收一次运费。
[buy_again]
buy the same {product} again | 再买一次同样的{product}
reorder the {product} from my last purchase | 重新订购上次买的{product}
repeat my earlier purchase of the {product} | 重复之前购买{product}的订单
get another {product} like my old one | 添购和原来一样的{product}
> Open My Orders, find the {product} and choose Buy again.
  | 请打开“我的订单”，找到{product}，然后点击“再次购买”。
? Is the price still the same? | 价格还一样吗？
! The {product} costs the same as last time. | {product}的价格和上次一样。
[delivery_date]
find out when parcel {tracking} will arrive | 查询包裹{tracking}什么时候送到
check the delivery date of parcel {tracking} | 查看包裹{tracking}的送达日期
learn on which day parcel {tracking} comes | 了解包裹{tracking}哪一天到
get the expected arrival of parcel {tracking} | 获取包裹{tracking}的预计到达时间
> Parcel {tracking} should arrive tomorrow before noon. | 包裹{tracking}预计明天中午前送到。
? Do I have to be at home? | 我必须在家吗？
! No, a neighbour may accept parcel {tracking}. | 不必，邻居可以代收包裹{tracking}。
[reschedule_delivery]
move the delivery of parcel {tracking} to {weekday} | 把包裹{tracking}的派送改到{weekday}
reschedule parcel {tracking} for {weekday} | 将包裹{tracking}改约到{weekday}
receive parcel {tracking} on {weekday} instead | 改在{weekday}收包裹{tracking}
have parcel {tracking} brought on {weekday} | 让快递员{weekday}送包裹{tracking}
> Parcel {tracking} will now be delivered on {weekday}. | 包裹{tracking}将改为{weekday}派送。
? Can the driver call me first? | 送货前能先打电话吗？
! Yes, the driver will call before bringing parcel {tracking}. | 可以，送包裹{tracking}之前司机会打电话。
[delivery_time]
get parcel {tracking} after {time} | 在{time}以后收包裹{tracking}
choose {time} as the earliest delivery time for parcel {tracking} | 把包裹{tracking}的最早派送时间定为{time}
ask the driver not to bring parcel {tracking} before {time} | 叫司机不要在{time}前送包裹{tracking}
delay parcel {tracking} until {time} that day | 将包裹{tracking}推迟到当天{time}再送
> The driver will bring parcel {tracking} after {time}. | 司机会在{time}以后送包裹{tracking}。
? Does this cost extra? | 要额外付费吗？
! No, delivery after {time} is free. | 不用，{time}以后派送是免费的。
[missing_parcel]
report parcel {tracking} as missing | 报告包裹{tracking}丢失
file a claim for the lost parcel {tracking} | 为丢失的包裹{tracking}申请理赔
start a search for parcel {tracking} | 申请查找包裹{tracking}
report that parcel {tracking} never arrived | 反映包裹{tracking}一直没有收到
> We are searching for parcel {tracking} and will write to you within two days.
  | 我们正在查找包裹{tracking}，两天内给您答复。
? What happens if you cannot find it? | 找不到怎么办？
! Then we replace everything in parcel {tracking}. | 那我们会补发包裹{tracking}里的全部商品。
[damaged_parcel]
report that parcel {tracking} arrived damaged | 反映包裹{tracking}到货时已损坏
file a damage report for parcel {tracking} | 为包裹{tracking}提交破损报告
register a crushed box for parcel {tracking} | 登记包裹{tracking}外箱破损
send photos of the broken parcel {tracking} | 发送破损包裹{tracking}的照片
> We are sorry about parcel {tracking}. Please upload two photos of the damage.
  | 包裹{tracking}的情况我们很抱歉，请上传两张破损照片。
? Should I keep the box? | 箱子要留着吗？
! Yes, please keep the box of parcel {tracking}. | 要，请保留包裹{tracking}的箱子。
[express_delivery]
upgrade order {order_id} to express delivery | 把订单{order_id}升级为特快配送
speed up the shipping of order {order_id} | 加快订单{order_id}的发货
get order {order_id} by the fastest service | 用最快的方式收到订单{order_id}
choose next-day delivery for order {order_id} | 为订单{order_id}选择次日达
> Express delivery for order {order_id} costs eight dollars and takes one day.
  | 订单{order_id}的特快配送需加收八美元，一天送达。
? Does express also run on weekends? | 特快周末也送吗？
! Yes, order {order_id} can arrive on a weekend. | 送，订单{order_id}周末也能送到。
[pickup_point]
collect parcel {tracking} from a pickup point in {city} | 到{city}的自提点领取包裹{tracking}
send parcel {tracking} to a locker in {city} | 把包裹{tracking}寄到{city}的快递柜
pick up parcel {tracking} myself in {city} | 自己在{city}取包裹{tracking}
leave parcel {tracking} at a collection point in {city} | 将包裹{tracking}存放在{city}的代收点
> Parcel {tracking} will wait for you at the central pickup point in {city}.
  | 包裹{tracking}会存放在{city}中心自提点等您领取。
? How long will it be kept there? | 能保留多久？
! Parcel {tracking} is kept for seven days. | 包裹{tracking}保留七天。
[shipping_cost]
find out the shipping cost to {city} | 查询寄到{city}的运费
check how much delivery to {city} costs | 查看送货到{city}要多少钱
calculate the postage for {city} | 计算寄往{city}的邮费
get a delivery quote for {city} | 获取发往{city}的运费报价
> Delivery to {city} costs six dollars, and nothing above fifty dollars. | 送到{city}运费六美元，满五十美元免运费。
? How long does it take? | 要多长时间？
! A parcel to {city} takes three to five days. | 寄到{city}需要三到五天。
[hold_parcel]
hold parcel {tracking} until {date} | 把包裹{tracking}保管到{date}
keep parcel {tracking} at the depot until {date} | 将包裹{tracking}存放在仓库直到{date}
pause the delivery of parcel {tracking} until {date} | 在{date}之前暂停派送包裹{tracking}
store parcel {tracking} while I am away until {date} | 在{date}我回来之前寄存包裹{tracking}
> We will keep parcel {tracking} safe until {date}. | 我们会妥善保管包裹{tracking}到{date}。
? Can I ask for it earlier? | 可以提前送吗？
! Yes, parcel {tracking} can be sent on any day before {date}. | 可以，{date}之前随时都能派送包裹{tracking}。
[return_product]
return the {product} | 退回{product}
send the {product} back to you | 把{product}寄回给你们
give the {product} back because I do not like it | 因为不喜欢而退掉{product}
request a return for the {product} | 申请{product}退货
> You may return the {product} within thirty days, unused and in its box.
  | {product}未使用且包装完好，三十天内可以退货。
? Who pays for the return? | 退货运费谁出？
! We pay for the return of the {product}. | {product}的退货运费由我们承担。
[return_label]
print a return label for order {order_id} | 打印订单{order_id}的退货单
get a new return slip for order {order_id} | 重新领取订单{order_id}的退货标签
download the return form of order {order_id} | 下载订单{order_id}的退货表格
receive the return label of order {order_id} by email | 用邮件接收订单{order_id}的退货面单
> The return label for order {order_id} is in your mailbox now. | 订单{order_id}的退货单已发到您的邮箱。
? I have no printer. What now? | 我没有打印机，怎么办？
! Show the code of order {order_id} at any post office. | 在任何邮局出示订单{order_id}的二维码即可。
[exchange_size]
exchange the {garment} for size {size} | 把{garment}换成{size}
swap the {garment} for one in size {size} | 拿{garment}调换{size}的
get the {garment} in size {size} because mine does not fit | 因为{garment}不合身而换{size}
trade my {garment} for the {size} size | 将{garment}调成{size}
> We will exchange the {garment} for size {size} free of charge. | 我们免费为您把{garment}换成{size}。
? Must I send the old one first? | 要先把旧的寄回吗？
! Yes, send the {garment} back, then size {size} leaves. | 要，先寄回{garment}，我们再发{size}。
[refund_status]
check the status of my refund of {amount} | 查询{amount}退款的状态
find out when the refund of {amount} arrives | 了解{amount}的退款什么时候到账
ask about the {amount} you owe me | 询问你们欠我的{amount}
trace my missing refund of {amount} | 追查没收到的{amount}退款
> Your refund of {amount} was sent and arrives within three days. | {amount}的退款已经汇出，三天内到账。
? To which account does it go? | 退到哪个账户？
! The {amount} goes to the account you paid from. | {amount}会退回您付款时使用的账户。
[wrong_item]
report that you sent me the wrong {product} | 反映你们发错了{product}
report that my {product} is not the one I ordered | 说明收到的{product}不是我订的
get the right {product} in place of the wrong one | 把发错的{product}换成正确的
correct a mix-up with my {product} | 处理{product}发错货的问题
> We are sorry for the mistake. The right {product} leaves today. | 很抱歉出了差错，正确的{product}今天寄出。
? What do I do with the wrong one? | 发错的那件怎么处理？
! The courier takes it when bringing the right {product}. | 快递员送来正确的{product}时会一并取走。
[missing_part]
get a missing part for the {device} | 补领{device}缺少的零件
report that parts of the {device} were not in the box | 反映{device}的箱子里少了零件
request the missing accessories of the {device} | 索取{device}漏发的配件
complete the {device} that came without all its parts | 把零件不全的{device}补齐
> The missing part of the {device} will be sent to you tomorrow. | {device}缺少的零件明天给您寄出。
? Do I have to pay for it? | 我要付钱吗？
! No, parts for the {device} are free. | 不用，{device}的零件是免费的。
[extend_return]
extend the return period of the {product} to {date} | 把{product}的退货期限延长到{date}
keep the {product} until {date} before returning it | 把{product}留到{date}再退
postpone the return of the {product} to {date} | 将{product}的退货推迟到{date}
move the return deadline of the {product} to {date} | 把{product}的退货截止日改为{date}
> You can now return the {product} until {date}. | 您现在可以在{date}之前退回{product}。
? Can it be extended once more? | 还能再延长一次吗？
! No, {date} is the last day for the {product}. | 不能，{date}是{product}的最后退货日。
[change_payment]
pay for order {order_id} by {payment} instead | 改用{payment}支付订单{order_id}的货款
change the payment method of order {order_id} to {payment} | 把订单{order_id}的付款方式改为{payment}
switch order {order_id} to {payment} | 将订单{order_id}换成用{payment}付款
settle order {order_id} by {payment} | 通过{payment}结清订单{order_id}
> Order {order_id} can be paid by {payment}. Please open Payment and confirm.
  | 订单{order_id}可以用{payment}付款，请打开“支付”页面确认。
? Is there a fee? | 有手续费吗？
! No, paying by {payment} is free. | 没有，用{payment}付款不收手续费。
[request_invoice]
get an invoice for order {order_id} | 开订单{order_id}的发票
download the bill for order {order_id} | 下载订单{order_id}的账单
receive a receipt for order {order_id} | 索取订单{order_id}的收据
print the tax document of order {order_id} | 打印订单{order_id}的税务凭证
> The invoice for order {order_id} has been sent to your email. | 订单{order_id}的发票已发送到您的邮箱。
? Can you put my company on it? | 可以写公司名称吗？
! Yes, reply with the company name for order {order_id}. | 可以，请回复订单{order_id}要用的公司名称。
[double_charge]
report that {amount} was charged twice | 反映{amount}被重复扣款
get back the {amount} you took twice | 追回多扣一次的{amount}
dispute a second charge of {amount} | 对第二笔{amount}的扣款提出异议
correct the double payment of {amount} | 更正重复支付的{amount}
> The second charge of {amount} will be paid back within three days. | 多扣的{amount}会在三天内退还。
? Why did this happen? | 为什么会这样？
! The bank sent the {amount} twice by mistake. | 银行误将{amount}提交了两次。
[use_coupon]
use coupon {coupon} | 使用优惠券{coupon}
redeem the discount code {coupon} | 兑换折扣码{coupon}
apply the voucher {coupon} to my basket | 在购物车里使用代金券{coupon}
enter the promotion code {coupon} | 输入优惠码{coupon}
> Type {coupon} into the coupon field before you pay; it takes ten percent off.
  | 付款前在优惠券栏输入{coupon}，可享九折。
? How long is it valid? | 有效期到什么时候？
! Coupon {coupon} is valid until the end of the month. | 优惠券{coupon}月底前有效。
[pay_in_instalments]
pay {amount} in instalments | 分期支付{amount}
split {amount} into monthly payments | 把{amount}分成按月付款
spread the {amount} over several months | 将{amount}分摊到几个月
set up a payment plan for {amount} | 为{amount}办理分期计划
> You can pay {amount} in three equal parts without interest. | {amount}可以分三期等额支付，免利息。
? When is the first payment due? | 第一期什么时候付？
! The first part of the {amount} is due today. | {amount}的第一期今天支付。
[failed_payment]
fix the failed payment for order {order_id} | 解决订单{order_id}支付失败的问题
repeat the rejected payment of order {order_id} | 重新支付被拒付的订单{order_id}
find out why the payment for order {order_id} was declined | 了解订单{order_id}的付款为什么被拒绝
complete the interrupted checkout of order {order_id} | 完成订单{order_id}中断的结账
> The bank declined the payment for order {order_id}. Please try again or use another card.
  | 银行拒绝了订单{order_id}的付款，请重试或换一张卡。
? Is my order still reserved? | 订单还保留吗？
! Yes, order {order_id} is reserved for one more hour. | 还保留，订单{order_id}再保留一小时。
[buy_gift_card]
buy a gift card worth {amount} | 购买面值{amount}的礼品卡
order a gift voucher for {amount} | 订一张{amount}的礼券
give {amount} as a gift card to a friend | 把{amount}的礼品卡送给朋友
load a new gift card with {amount} | 给新礼品卡充值{amount}
> A gift card worth {amount} is sent by email as soon as you pay. | 付款后，{amount}的礼品卡会立即通过邮件发出。
? Does it expire? | 会过期吗？
! The gift card worth {amount} never expires. | {amount}的礼品卡永久有效。
[price_match]
buy the {product} for {amount} as in another shop | 按别家店的{amount}买{product}
have the {product} reduced to the rival price of {amount} | 把{product}降到同行的价格{amount}
request a price match of {amount} for the {product} | 申请{product}按{amount}比价
report that the {product} costs only {amount} elsewhere | 反映{product}在别处只要{amount}
> We will match {amount} for the {product}. Please send a link to the offer.
  | {product}可以按{amount}卖给您，请发来对方的报价链接。
? Does it also apply after I have bought it? | 买了以后也可以吗？
! Yes, within a week of buying the {product}. | 可以，购买{product}后一周内有效。
[reset_password]
reset my password | 重置密码
get a new password for my account | 给账户换一个新密码
log in again after I forgot my password | 在忘记密码后重新登录
recover a lost password | 找回丢失的密码
> Choose Forgot password on the login page; we will email you a link.
  | 请在登录页点击“忘记密码”，我们会发邮件给您链接。
? The email did not come. What now? | 没收到邮件，怎么办？
! Please look in your spam folder or ask for a new link. | 请查看垃圾邮件文件夹，或重新申请链接。
[change_phone]
change my phone number to {phone} | 把手机号改成{phone}
save {phone} as my new number | 将{phone}保存为新号码
link my account to the number {phone} | 把账户绑定到号码{phone}
update my contact number to {phone} | 将联系电话更新为{phone}
> We have sent a code to {phone}. Enter it to confirm the new number. | 验证码已发送到{phone}，输入后即可确认新号码。
? Will the old number still work? | 旧号码还能用吗？
! No, from now on only {phone} works. | 不能，以后只能用{phone}。
[delete_account]
delete my account | 注销账户
close my customer account for good | 永久关闭客户账户
have all my personal data erased | 清除全部个人资料
remove my profile from your shop | 从商城删除个人档案
> Open Settings, then Privacy, and choose Delete account. This cannot be undone.
  | 请打开“设置”中的“隐私”，选择“注销账户”，此操作无法撤销。
? What happens to my points? | 积分怎么办？
! All points are lost when the account is deleted. | 账户注销后，积分全部作废。
[unsubscribe]
unsubscribe from the newsletter | 退订新闻邮件
stop your advertising emails | 停止接收广告邮件
get off your mailing list | 退出邮件列表
turn off marketing messages | 关闭营销消息
> You will receive no more advertising from us as of tomorrow. | 从明天起，您不会再收到我们的广告。
? Will I still get order updates? | 还能收到订单通知吗？
! Yes, messages about your orders continue. | 能，订单相关的消息照常发送。
[login_code]
receive the login code on {phone} | 用{phone}接收登录验证码
get a new security code sent to {phone} | 把新的安全码发到{phone}
request another verification code for {phone} | 为{phone}再申请一个验证码
sign in with a text message to {phone} | 用{phone}的短信登录
> A new code is on its way to {phone}. It is valid for ten minutes. | 新的验证码正在发往{phone}，十分钟内有效。
? What if nothing arrives? | 如果收不到呢？
! Then check that {phone} has a signal and try again. | 请检查{phone}是否有信号，然后重试。
[check_stock]
check whether the {product} is available in {colour} | 查询{product}有没有{colour}的
find out if the {colour} {product} is in stock | 了解{colour}的{product}是否有货
look for the {product} in {colour} in your shop | 在店里找{colour}的{product}
see how many {colour} versions of the {product} are left | 查看{colour}款{product}还剩多少
> Yes, the {product} in {colour} is in stock. | {colour}的{product}目前有货。
? Can you put one aside for me? | 能给我留一个吗？
! Yes, we keep the {product} in {colour} for two days. | 可以，{colour}的{product}为您保留两天。
[restock_alert]
get a message when the {product} is back in stock | 在{product}到货时收到通知
set up a restock alert for the {product} | 设置{product}的补货提醒
join the waiting list for the sold-out {product} | 登记等候卖完的{product}
hear from you once the {product} is sold again | 在{product}重新开卖时得到消息
> We will write to you as soon as the {product} is back. | {product}一到货，我们就通知您。
? When will that be? | 大概什么时候？
! The {product} should be back in two weeks. | {product}预计两周后到货。
[ask_price]
find out the price of the {product} | 查询{product}的价格
check how much the {product} costs today | 查看{product}今天卖多少钱
get a price quote for the {product} | 获取{product}的报价
see whether the {product} is on sale | 了解{product}有没有打折
> The current price of the {product} is shown on its page; members pay ten percent less.
  | {product}的现价见商品页面，会员享九折。
? Will it get cheaper soon? | 最近会降价吗？
! The {product} will be cheaper in the summer sale. | {product}夏季促销时会降价。
[ask_measurements]
find out the measurements of the {product} | 查询{product}的尺寸
check how heavy the {product} is | 查看{product}有多重
learn how long and wide the {product} is | 了解{product}的长和宽
get the exact dimensions of the {product} | 获取{product}的精确规格
> Size and weight of the {product} are listed under Details on its page. | {product}的尺寸和重量列在商品页的“详情”里。
? Do the numbers include the box? | 数字包括包装盒吗？
! No, they are for the {product} alone. | 不包括，只是{product}本身的数据。
[check_warranty]
check the warranty of the {device} | 查询{device}的保修
find out how long the {device} is under guarantee | 了解{device}保修多久
see whether my {device} is still covered | 查看{device}是否还在保修期内
register the {device} for the warranty | 为{device}登记保修
> The {device} has a two-year warranty from the day of purchase. | {device}自购买之日起保修两年。
? Does it cover water damage? | 进水也保修吗？
! No, water damage to the {device} is not covered. | 不保，{device}进水不在保修范围内。
[get_manual]
download the manual of the {device} | 下载{device}的说明书
get the user guide for the {device} | 获取{device}的使用指南
read the instructions for the {device} online | 在线阅读{device}的操作说明
find a replacement for the lost handbook of the {device} | 补一份丢失的{device}手册
> The manual of the {device} is on our website under Support. | {device}的说明书在我们网站的“支持”栏目里。
? Is it available in Chinese? | 有中文版吗？
! Yes, the manual of the {device} is in English and Chinese. | 有，{device}的说明书有中英文两种。
[device_not_starting]
get the {device} to switch on | 让{device}正常开机
start the {device} that shows no lights | 启动指示灯不亮的{device}
fix the {device} that does not turn on | 修好打不开的{device}
wake up the dead {device} | 唤醒毫无反应的{device}
> Please plug in the {device}, then hold the power button for ten seconds.
  | 请给{device}接通电源，再长按电源键十秒。
? It still does nothing. What now? | 还是没反应，怎么办？
! Then send us the {device} for a free check. | 那请把{device}寄来，我们免费检测。
[connect_network]
connect the {device} to the wireless network | 把{device}连上无线网络
get the {device} online | 让{device}上网
pair the {device} with my home network | 将{device}接入家里的网络
repair the network connection of the {device} | 修复{device}的网络连接
> Open Settings on the {device}, choose Network and enter your password.
  | 请在{device}上打开“设置”，选择“网络”并输入密码。
? It cannot find my network. | 它找不到我家的网络。
! Move the {device} closer to the access point and restart it. | 请把{device}移近信号源，然后重启。
[factory_reset]
reset the {device} to factory settings | 把{device}恢复出厂设置
erase everything on the {device} | 清空{device}上的所有内容
restore the {device} to its original state | 将{device}还原到初始状态
wipe the {device} before I sell it | 在转卖前抹掉{device}的数据
> On the {device}, open Settings, then System, and choose Factory reset.
  | 请在{device}上打开“设置”中的“系统”，选择“恢复出厂设置”。
? Will my files be lost? | 文件会丢失吗？
! Yes, please back up the {device} first. | 会，请先备份{device}。
[update_software]
update the software of the {device} | 更新{device}的软件
install the latest version on the {device} | 给{device}安装最新版本
upgrade the system of the {device} | 升级{device}的系统
download the new firmware for the {device} | 下载{device}的新固件
> Keep the {device} plugged in, open Settings and choose Update. | 请让{device}保持通电，打开“设置”并选择“更新”。
? How long does the update take? | 更新要多久？
! The update of the {device} takes about twenty minutes. | {device}的更新大约需要二十分钟。
[book_repair]
book a repair of the {device} for {weekday} | 预约{weekday}维修{device}
have a technician look at the {device} on {weekday} | 叫技术员{weekday}检查{device}
bring the {device} in for service on {weekday} | 在{weekday}送修{device}
arrange to have the {device} mended on {weekday} | 安排{weekday}修理{device}
> A technician will repair the {device} on {weekday}. | 技术员将在{weekday}维修{device}。
? What will it cost? | 要多少钱？
! We will tell you the price before we repair the {device}. | 维修{device}之前，我们会先告诉您价格。
[points_balance]
check my points balance | 查询积分余额
see how many points I have | 查看有多少积分
find out the state of my bonus account | 了解奖励账户的情况
look up the points from my last purchase | 查找上次购物获得的积分
> Your points are shown at the top of the page My Account. | 积分显示在“我的账户”页面顶部。
? Do points expire? | 积分会过期吗？
! Yes, points expire after two years. | 会，积分两年后过期。
[redeem_points]
exchange my points for the {product} | 用积分兑换{product}
pay for the {product} with points | 用积分支付{product}
get the {product} as a bonus reward | 领取{product}作为积分奖品
spend my points on the {product} | 把积分花在{product}上
> You can pay for the {product} with points: choose Points at the checkout.
  | {product}可以用积分支付，结账时选择“积分”即可。
? What if I do not have enough points? | 积分不够怎么办？
! Then you pay the rest of the {product} in money. | {product}的差额可以用现金补足。
[join_membership]
become a member of the loyalty programme | 加入会员计划
sign up for a membership card | 办理会员卡
join your customer club | 加入客户俱乐部
register for member benefits | 登记享受会员优惠
> Membership is free: open My Account and choose Join. | 会员免费加入，请打开“我的账户”，点击“加入”。
? What are the benefits? | 有什么好处？
! Members save ten percent and collect points. | 会员享九折，还能积分。
[refer_friend]
recommend your shop to my friend {recipient} | 把商城推荐给朋友{recipient}
invite {recipient} to your shop | 邀请{recipient}来商城购物
send {recipient} a referral link | 给{recipient}发推荐链接
get a reward for bringing {recipient} as a customer | 因介绍{recipient}成为顾客而领取奖励
> Send {recipient} the link in My Account; you both get five dollars.
  | 请把“我的账户”里的链接发给{recipient}，双方各得五美元。
? When do I receive the reward? | 我什么时候拿到奖励？
! As soon as {recipient} places a first order. | {recipient}下第一单之后就能拿到。
[opening_hours]
find out the opening hours in {city} on {weekday} | 查询{city}门店{weekday}的营业时间
check whether the shop in {city} is open on {weekday} | 查看{city}的店{weekday}开不开门
learn when the {city} branch closes on {weekday} | 了解{city}分店{weekday}几点关门
get the {weekday} timetable of the shop in {city} | 获取{city}门店{weekday}的时间表
> Our shop in {city} is open from 9 am to 8 pm on {weekday}. | {city}门店{weekday}上午9点到晚上8点营业。
? Is it busy then? | 那时候人多吗？
! On {weekday} the shop in {city} is quiet before noon. | {weekday}中午前，{city}门店人比较少。
[find_store]
find a shop in {city} | 找到{city}的门店
get the address of your branch in {city} | 获取{city}分店的地址
see your shops in {city} on a map | 在地图上查看{city}的门店
get directions to your shop in {city} | 查询去{city}门店的路线
> Our shop in {city} is next to the main railway station. | {city}门店就在火车站旁边。
? Can I park there? | 那里能停车吗？
! Yes, parking at the shop in {city} is free for an hour. | 能，{city}门店可免费停车一小时。
[book_visit]
book an appointment in the {city} shop on {weekday} at {time} | 预约{weekday}{time}到{city}门店
reserve {weekday} at {time} for advice in the {city} branch | 预订{weekday}{time}在{city}分店的咨询
come to your {city} shop for a demonstration on {weekday} at {time} | 在{weekday}{time}去{city}门店看演示
meet an adviser in {city} on {weekday} at {time} | 在{weekday}{time}和{city}的顾问见面
> You have an appointment in {city} on {weekday} at {time}. | 已为您预约{weekday}{time}到{city}门店。
? Can I still change it? | 还能改吗？
! Yes, until the evening before {weekday}. | 能，{weekday}的前一天晚上之前都可以。
[store_pickup]
pick up order {order_id} in the {city} shop | 到{city}门店自取订单{order_id}
have order {order_id} sent to your shop in {city} | 把订单{order_id}发到你们{city}的店里
collect order {order_id} at the counter in {city} | 在{city}的柜台领取订单{order_id}
change order {order_id} to store pickup in {city} | 把订单{order_id}改成{city}到店自提
> Order {order_id} will be ready in our shop in {city} tomorrow. | 订单{order_id}明天可在{city}门店领取。
? What do I need to bring? | 要带什么？
! Just show the number {order_id} in {city}. | 在{city}出示订单号{order_id}即可。
[complain_staff]
complain about the rude staff in {city} on {date} | 投诉{city}员工{date}态度恶劣
report bad service in the {city} shop on {date} | 反映{date}在{city}门店遇到的差劲服务
make a complaint about my visit to {city} on {date} | 就{date}到{city}门店的经历提出投诉
tell a manager how I was treated in {city} on {date} | 向经理反映{date}在{city}受到的对待
> We are sorry about your visit on {date}. The manager in {city} will call you.
  | {date}的经历我们深感抱歉，{city}的经理会给您打电话。
? Will I hear what was decided? | 会告诉我处理结果吗？
! Yes, the manager in {city} will write to you. | 会，{city}的经理会写信告诉您。
[complain_late]
complain that order {order_id} is late | 投诉订单{order_id}迟到
ask for compensation for the delay of order {order_id} | 为订单{order_id}的延误要求赔偿
express my anger about the long wait for order {order_id} | 对订单{order_id}久等不到表示不满
protest against the broken delivery promise for order {order_id} | 抗议订单{order_id}没有按时送达
> We are sorry that order {order_id} is late. You get the shipping fee back.
  | 订单{order_id}迟到，我们很抱歉，运费将退还给您。
? What caused the delay? | 为什么会延误？
! Bad weather delayed order {order_id}. | 恶劣天气耽误了订单{order_id}。
[complain_quality]
complain about the poor quality of the {product} | 投诉{product}质量差
report that the {product} broke after a few days | 反映{product}用了几天就坏了
express my disappointment with the {product} | 表达对{product}的失望
give negative feedback on the {product} | 给{product}差评
> We are sorry that the {product} let you down. You may choose a refund or a new one.
  | {product}让您失望了，非常抱歉，您可以选择退款或换新。
? How do I get the refund? | 怎么退款？
! Send the {product} back and we pay within five days. | 寄回{product}后，我们五天内退款。
[human_agent]
talk to a human agent | 转人工客服
speak with a real person | 和真人通话
chat with one of your employees | 跟你们的工作人员聊
get through to a member of staff | 接通一位客服人员
> I am connecting you with a colleague. Please stay in the chat. | 正在为您转接同事，请不要离开对话。
? How long is the queue? | 要排多久？
! The waiting time is about three minutes. | 等候时间大约三分钟。
[call_back]
get a call back on {phone} at {time} | 在{time}接到打给{phone}的回电
have someone ring me at {time} on {phone} | 让人{time}打电话到{phone}
arrange a phone call to {phone} at {time} | 约定{time}给{phone}打电话
request a callback at {time} to the number {phone} | 申请{time}回拨号码{phone}
> We will call {phone} at {time}. | 我们会在{time}拨打{phone}。
? What if I miss the call? | 没接到怎么办？
! Then we try {phone} again an hour later. | 那我们一小时后再拨打{phone}。
"""
