# %% [markdown]
# # 02 · Quantization formulas
#
# **Goal:** turn numbers into few bits and back, know what that costs before you measure it, and see on the course's own
# model what a bit buys.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 00 and 01; logarithms; a little PyTorch |
# | Time | 3 hours for you; all cells run in one to two minutes on one core (measured: 69 and 124 s, the core shared) |
# | Memory, download | 0.6 GB at the peak (measured); nothing is downloaded |
# | Hardware | any computer; no GPU is needed |
# | Exercises | 12, each checked in the cell below it; three repair a published article; those marked *core* fit into one session of two hours |
# | Words | a **code** is the integer that stands for a number; a **step** or **scale** is the distance between two codes; a table at the end has the others |

# %%
import math

import matplotlib.pyplot as plt
import torch

from labutils.course.predictions import calibration, predict
from labutils.lab.layers.linears import linear_layers, set_weight_, weight_of
from labutils.lab.models.load import load_model
from labutils.lab.plots.style import series_style

model, tokenizer = load_model("lablm")
weights = {name: weight_of(layer).clone() for name, layer in linear_layers(model)}
weight = weights["model.layers.5.self_attn.k_proj"]
stored = sum(w.numel() for w in weights.values())
print(f"{stored:,} of the {model.num_parameters():,} parameters are in {len(weights)} linear layers")
print(f"the layer of our examples: {tuple(weight.shape)}, from {weight.min():.3f} to {weight.max():.3f}")

# %% [markdown]
# ## 1 · A formula, as printed
#
# To quantize is to keep few of many values. Here is a shaded ball, with all its greys and with 16, 8 and 4 of them. How few would you accept?

# %%
y, x = torch.meshgrid(torch.linspace(-1, 1, 200), torch.linspace(-1, 1, 200), indexing="ij")
inside = 1 - x**2 - y**2
ball = torch.where(inside > 0, 0.1 + 0.9 * (0.7 * inside.clamp(min=0).sqrt() - 0.5 * x - 0.5 * y).clamp(0, 1), 0.0)
figure, panels = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
for axes, bits in zip(panels, (8, 4, 3, 2), strict=True):
    steps = 2**bits - 1
    axes.imshow((ball * steps).round() / steps, cmap="gray", vmin=0, vmax=1)
    axes.set(title=f"{bits} bits: {2**bits} greys", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *The same picture in 8, 4, 3 and 2 bits: bands appear where neighbours share a level. Weights are no picture, and what they may lose is what this
# chapter measures.*
#
# When a large model decodes, it waits for its weights to come out of memory (chapter 01). With half the bits it waits half as long,
# and that is why we quantize. The article from which this course began («秒推时代：LLM极速推理引领新风潮») gives this formula, with
# `scale = 1` and `quant_bit = 2^8 = 256`:
#
# $$x_{\text{quant}} = \operatorname{round}\left(\frac{x_{\text{float}} \cdot \text{scale}}{\text{quant\_bit}}\right)$$
#
# and says that 0.5 becomes 1. Our weights lie between −1 and 1. **Predict:** which codes will they get? How many different ones?

# %%
my_codes = predict("different codes that the article's formula gives a layer of LabLM", None)


# %%
def article_quantize(x, scale=1, quant_bit=2**8):
    return torch.round(x * scale / quant_bit).int()


numbers = torch.tensor([-0.9, 0.0, 0.5, 1.0, 100.0, 127.0, 129.0, 1e6])
print("numbers       ", numbers.tolist())
print("as printed    ", article_quantize(numbers).tolist())
print("its own 0.5   ", article_quantize(torch.tensor(0.5), scale=256).item(), "with 256 where the scale was: a tie")
found = article_quantize(weight).unique().tolist()
print("LabLM's layer ", found, "are all the codes it gets")
my_codes.compare(len(found))

# %% [markdown]
# Everything up to 128 rounds to 0, and a million overflows 8 bits. (0.5 would become 1 if 256 took the place of the scale and
# .5 were rounded up.) The formula has four mistakes. It *multiplies* by the scale, it takes 256, the number of *levels*, for bits, it
# keeps no code in range, and it has no way back. The formula that works (Jacob et al. 2017, arXiv:1712.05877, equation 1):
#
# $$\begin{aligned} q &= \operatorname{clamp}\left(\operatorname{round}(x / S) + Z,\; q_{\min},\; q_{\max}\right) \\
# \hat x &= S\,(q - Z) \end{aligned}$$
#
# S, the **scale**, is the width of a step; Z, the **zero point**, is the code of 0. **Tiny numbers:** S = 0.5, Z = 1,
# codes −8 … 7. Then 1.2 → round(2.4) + 1 = 3 → 0.5 · (3 − 1) = 1.0, and 9 → 19 → 7 → 3.0.

# %% [markdown]
# ## Exercise 2.1: affine_codes (core)
#
# **Fix the article.** Write `affine_codes(x, scale, zero_point, qmin, qmax)`: `x` is a tensor of any shape, the rest are
# numbers; return int32 codes of the same shape. Ties go to the even neighbour. 2 lines, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>How many steps of width <code>scale</code> is x away from 0?</details>
# <details><summary>Hint 2</summary>With scale 0.5 and zero point 1, 9.0 is 18 steps away from 0. Which code would it get, and which one must it get if the codes end at 7?</details>
# <details><summary>Hint 3</summary><code>torch.round</code>, add the zero point, <code>.clamp(qmin, qmax)</code>, <code>.to(torch.int32)</code>, in this order.</details>


# %%
# EXERCISE affine_codes
def affine_codes(x, scale, zero_point, qmin, qmax):
    """Integer codes of x."""
    ### BEGIN SOLUTION
    codes = torch.round(x / scale) + zero_point
    return codes.clamp(qmin, qmax).to(torch.int32)
    ### END SOLUTION


# %%
# CHECK affine_codes
from labutils.course.checks import ch02

ch02.affine_codes(affine_codes)

# %% [markdown]
# Now the article's worked example, a small network with `scale = 1/255`. The article prints [127, 102], [102, 127] and
# [153, 153], so it multiplied by 255 where it says that it multiplies by 1/255. With the repaired formula
# (`labutils.quantization.affine` does what you wrote), Z = 0 and codes 0 … 255:

# %%
from labutils.quantization.affine import QParams, Scheme, choose_qparams, dequantize, fake_quantize, quantize

network = {"w1": [0.5, 0.3], "w2": [0.4, 0.2], "b": [0.6, 0.4]}
printed = {"w1": [127, 102], "w2": [102, 127], "b": [153, 153]}
bytes_of_article = QParams(torch.tensor(1 / 255, dtype=torch.float64), torch.tensor(0), qmin=0, qmax=255)
for name, values in network.items():
    as_said = [round(v * (1 / 255)) for v in values]
    codes = quantize(torch.tensor(values, dtype=torch.float64), bytes_of_article).tolist()
    print(f"{name:2} {values}: as the text says {as_said}, as printed {printed[name]}, repaired {codes}")
halves = [value / (1 / 255) for value in (0.5, 0.3)]
print("two ties:", halves, "; in float32 the first is no tie:", (torch.tensor(0.5) / torch.tensor(1 / 255)).item())
print("a weight of -0.4:", quantize(torch.tensor([-0.4]), bytes_of_article).tolist())

# %% [markdown]
# ## 2 · Scale and zero point from the data
#
# The last line shows what is left: unsigned codes with Z = 0 have no room for negative weights. Let the data choose.
# With low = min(x, 0) and high = max(x, 0), so that 0 always has an exact code (padding and ReLU live on it):
#
# $$S = \frac{\text{high} - \text{low}}{q_{\max} - q_{\min}}, \qquad Z = q_{\min} - \operatorname{round}(\text{low} / S)$$
#
# **Tiny numbers:** −1 … 3 on codes −8 … 7: S = 4/15, Z = −8 + round(3.75) = −4. The **symmetric** choice, common for
# weights, is simpler: S = max|x| / q_max and Z = 0, with codes −7 … 7.

# %% [markdown]
# ## Exercise 2.2: affine_qparams (core)
#
# **Fix the article.** Write `affine_qparams(x, qmin, qmax)`: return the tuple (scale, zero_point), a float and an int,
# for the affine formula above. Not all of x is 0. 4 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Which code must <code>low</code> get, and how many steps lie between the lowest and the highest code?</details>
# <details><summary>Hint 2</summary>Numbers from −1 to 3 on codes −8 … 7: a range of 4 is spread over 15 steps. Which code does −1 get, and how many steps above it is 0?</details>
# <details><summary>Hint 3</summary><code>low = min(x.min().item(), 0.0)</code>; Python's <code>round</code> gives an int.</details>


# %%
# EXERCISE affine_qparams
def affine_qparams(x, qmin, qmax):
    """Scale and zero point that fit the range of x, and 0, onto the codes."""
    ### BEGIN SOLUTION
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (qmax - qmin)
    return scale, qmin - round(low / scale)
    ### END SOLUTION


# %%
# CHECK affine_qparams
ch02.affine_qparams(affine_qparams)

# %% [markdown]
# What is lost? Inside the range at most half a step; outside, whatever was cut. Four bits show it best.

# %%
x = torch.linspace(-1.5, 2.5, 801)
qparams = choose_qparams(x, Scheme(bits=4, symmetric=False, granularity="tensor"), low=-1.0, high=2.0)
back = dequantize(quantize(x, qparams), qparams)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(x, x, "--", color="0.6", label="x")
left.plot(x, back, color=series_style(0)["color"], label="x after its codes")
left.set(xlabel="x", ylabel="x after its codes", title=f"{len(back.unique())} values are left")
left.legend()
steps = (back - x) / qparams.scale
right.plot(x, steps, color=series_style(1)["color"])
inside = steps[(x > back.min()) & (x < back.max())].abs().max().item()
right.set(xlabel="x", ylabel="error (steps)", title=f"Inside at most {inside:.2f} steps, outside no limit")
plt.show()

# %% [markdown]
# *4-bit affine quantization of the numbers −1.5 … 2.5 onto a range of −1 … 2. Left: the staircase. Right:
# its error, a saw inside the range and a growing loss where numbers are clipped.*

# %% [markdown]
# ## 3 · "Global" and "local"
#
# The article calls one scale for everything *global*, one for each part *local*. The field says **per tensor**, **per
# channel** (a row of the weight: one output), **per group** (a run of neighbours in a row), and for activations **per
# token**. Fewer numbers share a scale, so one large number spoils fewer others; more scales must be stored.
#
# **Tiny numbers:** a row 0.1, −0.2, 7.0, 3.5 with codes −7 … 7. One scale: S = 1, and 0.1, −0.2 become 0. Groups of two:
# S = 0.2/7 for the first two, which come back as 0.114 and −0.2.

# %%
row = torch.tensor([[0.1, -0.2, 7.0, 3.5]])
for scheme in (Scheme(bits=4), Scheme(bits=4, granularity="group", group_size=2)):
    qparams = choose_qparams(row, scheme)
    codes = quantize(row, qparams)
    rounded = [round(v, 3) for v in dequantize(codes, qparams)[0].tolist()]
    print(f"per {scheme.granularity}: scales {[round(s, 4) for s in qparams.scale.flatten().tolist()]}", end=", ")
    print(f"codes {codes[0].tolist()}, back {rounded}")

# %% [markdown]
# ## Exercise 2.3: group_scales (core)
#
# Write `group_scales(weight, qmax, group_size)`: `weight` has shape (out_features, in_features); return symmetric scales,
# shape (out_features, in_features / group_size): max|w| of each group over `qmax`. 2 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Give the groups an axis of their own, then take the largest magnitude along it.</details>
# <details><summary>Hint 2</summary>A row of 6 numbers in groups of 2 is 3 groups: one more axis. Which shape has a whole weight then, and along which axis do neighbours lie?</details>
# <details><summary>Hint 3</summary><code>weight.unflatten(1, (-1, group_size))</code> has shape (out, groups, group_size); <code>.abs().amax(dim=-1)</code>.</details>


# %%
# EXERCISE group_scales
def group_scales(weight, qmax, group_size):
    """Symmetric scales, one for each group of neighbours in a row."""
    ### BEGIN SOLUTION
    groups = weight.unflatten(1, (-1, group_size))
    return groups.abs().amax(dim=-1) / qmax
    ### END SOLUTION


# %%
# CHECK group_scales
ch02.group_scales(group_scales)

# %% [markdown]
# ## 4 · True bits per weight
#
# A 4-bit code in an int8 tensor takes 8 bits. To gain anything, codes must be **packed**, and the scales count too.
# **Tiny numbers:** signed 4-bit codes 3 and −2, counted from −8: 11 and 6. One byte holds both: 6·16 + 11 = 107.

# %%
from labutils.quantization.packing import pack, unpack

codes = torch.tensor([3, -2, 7, -8, 0])
packed = pack(codes + 8, bits=4)
print("4 bits:", packed.tolist(), "and back:", (unpack(packed, bits=4, count=5).int() - 8).tolist())
three = pack(torch.tensor([5, 3, 7]), bits=3)
print("3 bits:", [f"{byte:08b}" for byte in three.tolist()], "the third code is cut in two")
scheme = Scheme(bits=4)
codes = quantize(weight, choose_qparams(weight, scheme)).int() - scheme.qmin
print(f"our layer: {weight.numel() * 4:,} bytes in float32, {codes.byte().numel():,} in int8, ", end="")
print(f"{pack(codes, bits=4).numel():,} packed, and {weight.shape[0] * 4} for its scales")

# %% [markdown]
# ## Exercise 2.4: smallest_group
#
# Your memory allows `budget` bits for each weight, with everything that is stored. Write `smallest_group(columns, bits, scale_bits,
# zero_point_bits, budget)`: the smallest group size, a power of two that divides the `columns` of a row, whose groups can each store a scale and
# a zero point (0 bits where the scheme is symmetric) within that budget; None if no size can. 5 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What does one weight pay for its group's scale in a group of 16, and what in a group of 32? Do the rows matter?</details>
# <details><summary>Hint 2</summary>A row of 96 can be cut into groups of 1, 2, 4, 8, 16 or 32. Which of these do you try first, if you want the smallest that is cheap enough?</details>
# <details><summary>Hint 3</summary>A size fits if <code>bits + (scale_bits + zero_point_bits) / size &lt;= budget</code>; double it as long as <code>columns % size == 0</code>.</details>


# %%
# EXERCISE smallest_group
def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
    """The smallest group size that the budget allows."""
    ### BEGIN SOLUTION
    size = 1
    while columns % size == 0:
        if bits + (scale_bits + zero_point_bits) / size <= budget:
            return size
        size *= 2
    ### END SOLUTION


# %%
# CHECK smallest_group
ch02.smallest_group(smallest_group)

# %% [markdown]
# How good is a layer? The **signal-to-quantization-noise ratio** compares powers, in decibels (10 dB: a tenth of the noise
# power):
#
# $$\text{SQNR} = 10 \log_{10} \frac{\sum x^2}{\sum (x - \hat x)^2}$$
#
# **Predict:** on our layer with 4 bits, does it pay to spend bits on more scales, or on more codes? How many dB does one scale per
# channel gain over one for the whole tensor?

# %%
my_gain = predict("dB that a scale per channel gains over one per tensor, at 4 bits", None, unit="dB")

# %%
from labutils.quantization.packing import bits_per_weight
from labutils.quantization.theory import gaussian_bound_db, sqnr_db

PARTS = {"tensor": {}, "channel": {}, "group of 64": {"group_size": 64}, "group of 16": {"group_size": 16}}
curves = {}
for name, size in PARTS.items():
    fields = {"granularity": name.split()[0], "scale_dtype": torch.float16, **size}
    schemes = [Scheme(bits=bits, **fields) for bits in range(2, 9)]
    costs = [bits_per_weight(tuple(weight.shape), scheme) for scheme in schemes]
    curves[name] = costs, [sqnr_db(weight, fake_quantize(weight, scheme)) for scheme in schemes]
    print(f"4 bits, one scale per {name}: {curves[name][1][2]:.1f} dB at {costs[2]:.3f} bits per weight")

# %%
figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
for index, (name, (costs, ratios)) in enumerate(curves.items()):
    axes.plot(costs, ratios, label=f"one scale per {name}", **series_style(index))
bound = [gaussian_bound_db(bits, weight.var(dim=1)) for bits in range(2, 9)]
axes.plot(range(2, 9), bound, ":", color="0.3", label="no code can do better (normal numbers)")
gain = curves["channel"][1][2] - curves["tensor"][1][2]
my_gain.compare(gain)
axes.set(xlabel="bits per weight, scales included", ylabel="SQNR (dB)")
axes.set_title(f"At 4 bits, a scale per channel is worth {gain:.1f} dB over one per tensor")
axes.grid(alpha=0.25)
axes.legend()
plt.show()

# %% [markdown]
# *The SQNR of one LabLM layer (k_proj of the last layer, symmetric, scales in float16) against its true
# bits, for 2 to 8 bits a code: higher and further left is better. The dotted line is the best that any code could do on
# normal numbers with the spreads of this layer's rows (section 10 says how one gets nearer to it).*
#
# A scale per channel costs almost nothing and is the first thing to buy. A group costs 16 bits: read the plot
# along a vertical line to see which way of spending a bit gains more.

# %% [markdown]
# ## 5 · Rounding
#
# `torch.round` sends ties to the even neighbour, as IEEE 754 does by default: always rounding .5 up would shift the mean.
# **Stochastic rounding** (Gupta et al. 2015, arXiv:1502.02551) goes further: it rounds up with a probability equal to the
# fraction, ⌊x/S + u⌋ with u uniform in [0, 1). A single number gets noisier; sums become right. It matters where
# many small changes add up, as in training.
#
# **Predict:** add 0.1 a thousand times to a number stored with step 1. Where does it end?

# %%
one = QParams(torch.tensor(1.0), torch.tensor(0), qmin=-10_000, qmax=10_000)
print("ties:", torch.round(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).int().tolist())
for rounding in ("nearest-even", "stochastic"):
    total, generator = torch.zeros(100), torch.Generator().manual_seed(0)
    for _ in range(1000):
        codes = quantize(total + 0.1, one, rounding=rounding, generator=generator)
        total = dequantize(codes, one)
    print(f"{rounding:12} after 1000 times +0.1: {total.mean():.1f} on average of 100 numbers, std {total.std():.1f}")
stochastic = fake_quantize(weight, Scheme(bits=4), rounding="stochastic", generator=torch.Generator().manual_seed(0))
nearest = fake_quantize(weight, Scheme(bits=4))
print(f"one weight layer: nearest {sqnr_db(weight, nearest):.1f} dB, stochastic {sqnr_db(weight, stochastic):.1f} dB")

# %% [markdown]
# So: stochastic for sums that grow, nearest for weights that are rounded once.
#
# ## 6 · Clipping
#
# One outlier sets the step for all. Cutting the range to a share c of max|x| makes steps smaller and errs more on the
# few numbers outside. **Min–max** cuts nothing; a **percentile** cuts a fixed share of numbers; **least squared error**
# searches:
#
# $$c^* = \arg\min_c \sum_i \left(x_i - \hat x_i(c)\right)^2$$
#
# **Tiny numbers:** 0.4, 0.4, 0.4, 3.0 on codes −1, 0, 1. With c = 1, S = 3: error 3 · 0.16 = 0.48. With c = 0.9,
# S = 2.7: 0.48 + 0.09. Here cutting does not pay. With a hundred numbers of 0.4 beside the 3.0 it does: with S = 3 the error is 16, with
# S = 0.43 it is 6.7.

# %% [markdown]
# ## Exercise 2.5: best_share (core)
#
# Write `best_share(x, bits, shares)`: `x` is a tensor, `shares` a list of numbers up to 1. Quantize x symmetrically with
# one scale, S = share · max|x| / qmax, codes −qmax … qmax, and return the share with the smallest sum of squared errors.
# 6 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>A function of one share that returns the error; Python's <code>min</code> takes a <code>key</code>.</details>
# <details><summary>Hint 2</summary>Three numbers 0.4 and one 3.0 with codes −1 … 1 and share 1: the step is 3, all but one come back as 0, and the error is 0.48. Do the same for a share of 0.9.</details>
# <details><summary>Hint 3</summary><code>qmax = 2 ** (bits - 1) - 1</code>; back = <code>torch.round(x / scale).clamp(-qmax, qmax) * scale</code>.</details>


# %%
# EXERCISE best_share
def best_share(x, bits, shares):
    """The share of max |x| to clip at, by squared error."""
    ### BEGIN SOLUTION
    qmax = 2 ** (bits - 1) - 1

    def squared_error(share):
        scale = share * x.abs().max() / qmax
        back = torch.round(x / scale).clamp(-qmax, qmax) * scale
        return (x - back).square().sum().item()

    return min(shares, key=squared_error)
    ### END SOLUTION


# %%
# CHECK best_share
ch02.best_share(best_share)

# %% [markdown]
# **Predict:** who gains more from clipping, 8 bits or 2? And how many dB do 2 bits gain?

# %%
my_clipping = predict("dB that clipping gains at 2 bits, one scale for the tensor", None, unit="dB")

# %%
shares, best = torch.linspace(0.1, 1, 46).tolist(), {}
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
for index, bits in enumerate((2, 3, 4, 8)):
    scheme = Scheme(bits=bits, granularity="tensor")
    peak = weight.abs().max().item()
    ratios = [sqnr_db(weight, fake_quantize(weight, scheme, low=-c * peak, high=c * peak)) for c in shares]
    best[bits] = shares[ratios.index(max(ratios))], max(ratios) - ratios[-1]
    axes.plot(shares, ratios, label=f"{bits} bits", markevery=5, **series_style(index))
axes.set(xlabel="clipped at this share of max |w|", ylabel="SQNR (dB)")
axes.set_title(f"Clipping gains {best[2][1]:.1f} dB at 2 bits and {best[8][1]:.1f} dB at 8")
axes.grid(alpha=0.25)
axes.legend()
plt.show()
print({bits: f"best share {share:.2f}, gain {gain:.1f} dB" for bits, (share, gain) in best.items()})
my_clipping.compare(best[2][1])

# %% [markdown]
# *One LabLM layer with one scale for the whole tensor: SQNR against the share of max|w| at which it is
# clipped. To the left of each peak too much is cut, to the right the steps are too wide.*
#
# **Now with your hands.** Drag the point where the range is cut, and watch the levels move over the weights. Where is the
# SQNR largest? (Arrow keys move the slider too. The figure below it shows the default choice; `draw_clipping` draws any other.)

# %%
from labutils.lab.plots.quantization import draw_clipping
from labutils.lab.widgets.slider import picture_slider

picture_slider("cut", 46, lambda axes, cut: draw_clipping(axes, weight, bits=3, share=1 - cut / 50), figsize=(8, 3.4))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for axes, share in ((left, 1.0), (right, best[3][0])):
    draw_clipping(axes, weight, bits=3, share=share)
plt.show()

# %% [markdown]
# *One LabLM layer in 3 bits, cut at its largest weight (left) and at the best share (right). Each stem is a level, as high as the
# share of weights that round to it; the outline shows where the weights are. Without a cut the outermost levels are nearly empty.*
#
# Now bits and granularity as well. **Question:** what is the cheapest setting, in bits per weight, that still reaches 20 dB?
# `print(quantized_layer(weight, bits=3, granularity="channel", clipping="least error"))` gives the same as text.

# %%
from labutils.lab.widgets.quantization import quantization_widget

quantization_widget(weight)

# %%
from labutils.lab.plots.quantization import draw_quantized_layer, quantized_layer

figure = plt.figure(figsize=(10, 4), layout="constrained")
draw_quantized_layer(quantized_layer(weight, bits=4, granularity="channel"), figure=figure)
plt.show()
for clipping in ("min-max", "99th percentile", "least error"):
    print(quantized_layer(weight, bits=3, granularity="channel", clipping=clipping))

# %% [markdown]
# *The layer at 4 bits, one scale per channel, min–max. Left: how many weights have which value, before
# (dashed) and after; every row has levels of its own. Right: how far each weight moved; a row with a large weight has coarse steps
# and bright errors.*

# %% [markdown]
# ## 7 · How much noise? Predicted, then measured
#
# If a number falls anywhere within its step, the error is uniform in ±S/2 and has variance S²/12 (Bennett 1948):
#
# $$\text{SQNR} \approx 10 \log_{10} \frac{\overline{x^2}}{S^2 / 12}$$
#
# One bit more halves S: 20 log₁₀ 2 = **6.02 dB a bit**. The prediction needs no quantized tensor, only the step.
# **Tiny numbers:** x = ±1, S = 0.1: 1 / (0.01/12) = 1200, that is 30.8 dB.

# %% [markdown]
# ## Exercise 2.6: bits_for (core)
#
# You design a converter. Write `bits_for(x, target_db)`: how few bits, from 2 to 16, does a tensor need if the *predicted* SQNR is
# to reach `target_db`? Codes are symmetric with one scale for the tensor, as at the end of section 2. Quantize nothing.
# 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Each number of bits gives a step, each step a noise. How many steps lie between 0 and max|x|?</details>
# <details><summary>Hint 2</summary>With 3 bits the codes are −3 … 3, so max|x| is 3 steps away from 0. Try the bits from 2 upwards and stop at the first that is enough.</details>
# <details><summary>Hint 3</summary>The step is <code>x.abs().max().item() / (2 ** (bits - 1) - 1)</code>; compare <code>10 * math.log10(signal / (step**2 / 12))</code> with the target.</details>


# %%
# EXERCISE bits_for
def bits_for(x, target_db):
    """The fewest bits whose predicted SQNR reaches the target."""
    ### BEGIN SOLUTION
    signal, peak = x.square().mean().item(), x.abs().max().item()
    for bits in range(2, 17):
        step = peak / (2 ** (bits - 1) - 1)
        if 10 * math.log10(signal / (step**2 / 12)) >= target_db:
            return bits
    ### END SOLUTION


# %%
# CHECK bits_for
ch02.bits_for(bits_for)

# %% [markdown]
# Four kinds of numbers: uniform; LabLM's layer; the same clipped at 30% of its maximum; and a ReLU-like tensor, of which
# nine in ten are exactly 0. **Predict:** for which of them will the formula be too hopeful, and for which too gloomy? By how many dB does it
# miss the clipped layer at 8 bits?

# %%
my_miss = predict("dB by which the S²/12 formula misses a layer clipped at 30%, at 8 bits", None, unit="dB")

# %%
from labutils.quantization import theory

generator = torch.Generator().manual_seed(0)
uniform = torch.rand(40_000, generator=generator) * 2 - 1
mostly_zero = torch.randn(40_000, generator=generator) * (torch.rand(40_000, generator=generator) < 0.1)
limit = 0.3 * weight.abs().max().item()
KINDS = {
    "uniform": (uniform, None),
    "LabLM layer": (weight, None),
    "layer, clipped at 30%": (weight, limit),
    "nine in ten are 0": (mostly_zero, None),
}


def measured_and_predicted(x, limit, bits):
    scheme, cut = Scheme(bits=bits, granularity="tensor"), {} if limit is None else {"low": -limit, "high": limit}
    predicted = theory.predicted_sqnr_db(x, choose_qparams(x, scheme, **cut))
    return sqnr_db(x, fake_quantize(x, scheme, **cut)), predicted


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
BITS, gaps = range(2, 9), {}
for index, (name, (x, limit)) in enumerate(KINDS.items()):
    measured, predicted = zip(*(measured_and_predicted(x, limit, bits) for bits in BITS), strict=True)
    gaps[name] = [m - p for m, p in zip(measured, predicted, strict=True)]
    left.plot(BITS, measured, label=name, **series_style(index))
    left.plot(BITS, predicted, ":", color=series_style(index)["color"])
    right.plot(BITS, gaps[name], **series_style(index))
    print(f"{name:22} measured − predicted at 2, 4, 8 bits: {[f'{gaps[name][b - 2]:+.1f}' for b in (2, 4, 8)]} dB")
my_miss.compare(abs(gaps["layer, clipped at 30%"][-1]))
left.set(xlabel="bits", ylabel="SQNR (dB)", title="Measured (marks), predicted (dotted)")
left.legend(fontsize="small")
right.axhline(0, color="0.6")
worst = max(gaps, key=lambda name: max(map(abs, gaps[name])))
right.set(xlabel="bits", ylabel="measured − predicted (dB)", title=f"Furthest off: {worst}")
plt.show()

# %% [markdown]
# *Measured and predicted SQNR for four kinds of numbers at 2 to 8 bits (left), and their difference
# (right): above the line the quantizer does better than the theory says. (Two dotted lines nearly coincide: the uniform numbers and
# the clipped layer happen to have about the same mean square, measured in their ranges.)*
#
# <details><summary>Explain</summary>
#
# With many codes and data spread over them, 6 dB a bit holds. **Clipping:** the numbers outside err by much
# more than a step, so the line flattens and more bits buy nothing. **Zeros** have no error at all, which is better than predicted.
# **Few bits:** numbers much smaller than a step all become 0, and the error is the number itself, not uniform.
# </details>

# %% [markdown]
# **Repair the theory.** For normal numbers (σ = 1) clipped at c, with Δ = 2c/2^bits, φ the density and Q its upper tail,
# add what the cut tails lose (Banner et al. 2018, arXiv:1810.05723, weigh the same two terms):
#
# $$\text{noise}(c) = \frac{\Delta^2}{12}\,(1 - 2Q(c)) + 2\left[(1 + c^2)\,Q(c) - c\,\varphi(c)\right]$$
#
# Its minimum says where to clip without trying. **Predict:** does it find section 6's best shares for LabLM's
# layer?


# %%
def kurtosis(x):
    return ((x - x.mean()) ** 4).mean().item() / x.var().item() ** 2


sigma = weight.std().item()
evened = weight / weight.std(dim=1, keepdim=True)
print(f"kurtosis (3 for a normal): {kurtosis(weight):.2f}, and {kurtosis(evened):.2f} with each row divided by its σ")
for bits, (share, _) in best.items():
    found = share * weight.abs().max().item() / sigma
    predicted = max((c / 50 for c in range(25, 400)), key=lambda c: theory.gaussian_sqnr_db(bits, c))
    at_best = theory.gaussian_sqnr_db(bits, predicted)
    print(f"{bits} bits: clip at {predicted:.2f} σ predicted ({at_best:.1f} dB), at {found:.2f} σ found by search")

# %% [markdown]
# Near, not equal. The layer's tails are heavier than a normal's, and the first line says why: its rows differ in spread. With many
# codes these tails deserve more room. And at 2 bits our symmetric range uses three codes of the four that the formula counts.
#
# ## 8 · One bit
#
# The article also names *binary* formats. XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279) keeps a sign for each weight
# and one scale a row: W ≈ α·B. Least squares gives α = mean|W|. If the inputs are signs too, a product needs no
# multiplication. Signs as bits (1 for +1, 0 for −1): equal bits contribute +1 (XNOR), different ones −1 (XOR), so
#
# $$x \cdot w = n - 2\,\operatorname{popcount}(x \oplus w)$$
#
# **Tiny numbers:** + − + + and + + − +: two of four differ, 4 − 2·2 = 0.

# %%
from labutils.quantization.binary import POPCOUNT, pack_signs

left, right = (torch.tensor(signs) for signs in ([1, -1, 1, 1], [1, 1, -1, 1]))
left_bits, right_bits = pack_signs(left), pack_signs(right)
print(f"bits, lowest first: {left_bits.item():04b} and {right_bits.item():04b}", end=", ")
print(f"different: {(left_bits ^ right_bits).item():04b}, that is {POPCOUNT[(left_bits ^ right_bits).int()].item()}")
print(
    "product:", 4 - 2 * POPCOUNT[(left_bits ^ right_bits).int()].item(), "and in floats:", (left * right).sum().item()
)

# %% [markdown]
# ## Exercise 2.7: xnor_product
#
# Write `xnor_product(x_bits, weight_bits, count)`: packed signs, uint8, shapes (rows, bytes) and (outputs, bytes); return
# the (rows, outputs) products of sign vectors with `count` entries. The last byte may be padded with 0 bits on both sides.
# `POPCOUNT[b]` (b an int tensor of bytes) says how many bits are 1. 2 lines, 10 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Every row meets every output: <code>x_bits[:, None]</code> and <code>weight_bits[None]</code>. Do padding bits differ?</details>
# <details><summary>Hint 2</summary>Two vectors of 8 signs that differ in 3 places: how many +1 and how many −1 does the sum of their products have?</details>
# <details><summary>Hint 3</summary><code>POPCOUNT[(x_bits[:, None] ^ weight_bits[None]).int()].sum(dim=-1)</code> counts the different bits.</details>


# %%
# EXERCISE xnor_product
def xnor_product(x_bits, weight_bits, count):
    """Products of sign vectors, by counting bits."""
    ### BEGIN SOLUTION
    different = POPCOUNT[(x_bits[:, None] ^ weight_bits[None]).int()].sum(dim=-1)
    return count - 2 * different
    ### END SOLUTION


# %%
# CHECK xnor_product
from labutils.course.checks import ch02_formats

ch02_formats.xnor_product(xnor_product)

# %% [markdown]
# Exact, but is it *good*? The product of signs is computed without error; the error is in taking signs.

# %%
from labutils.quantization import binary

signs, alpha = binary.binarize(weight)
x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
x_signs, beta = binary.binarize(x)
counted = binary.xnor_product(binary.pack_signs(x_signs), binary.pack_signs(signs), weight.shape[1])
print("bits equal floats:", torch.equal(counted.float(), x_signs.float() @ signs.float().T))
print(f"bytes for the signs of {tuple(weight.shape)}: {binary.pack_signs(signs).numel():,} of {weight.numel() * 4:,}")
print(f"weights: SQNR {sqnr_db(weight, alpha * signs):.1f} dB at {1 + 16 / weight.shape[1]:.2f} bits")
print(f"outputs, binary weights:            {sqnr_db(x @ weight.T, x @ (alpha * signs).T):.1f} dB")
print(f"outputs, binary weights and inputs: {sqnr_db(x @ weight.T, beta * counted * alpha.T):.1f} dB")

# %% [markdown]
# ## 9 · Small floats
#
# Integers have one step everywhere; floats have small steps near 0. Eight bits as s eeee mmm (**E4M3**,
# Micikevicius et al. 2022, arXiv:2209.05433):
#
# $$x = \begin{cases} (-1)^s\, 2^{e-7}\,(1 + m/8) & e > 0 \\ (-1)^s\, 2^{-6}\,(m/8) & e = 0 \text{ (subnormal)} \end{cases}$$
#
# All ones but the sign is NaN; there is no infinity; the largest number is 448. E5M2 trades a mantissa bit for range: up
# to 57344, with infinities. **Tiny numbers:** 0 0111 000 is 2⁰ · 1 = 1; 1 1000 100 is −2 · 1.5 = −3.

# %% [markdown]
# ## Exercise 2.8: decode_e4m3
#
# Write `decode_e4m3(code)`: an int from 0 to 255 (never NaN's); return the float. Take the bits apart by hand.
# 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>code >> 7</code> is the sign; <code>code >> 3 & 15</code> the exponent field; <code>code & 7</code> the mantissa.</details>
# <details><summary>Hint 2</summary>0 0111 000 is 1. Which bits would you change for 2, and which for 1.125? And what is different where the four bits in the middle are all 0?</details>
# <details><summary>Hint 3</summary>Exponent field 0: <code>mantissa / 8 * 2.0**-6</code>; else <code>(1 + mantissa / 8) * 2.0 ** (exponent - 7)</code>.</details>


# %%
# EXERCISE decode_e4m3
def decode_e4m3(code):
    """The number of an E4M3 code."""
    ### BEGIN SOLUTION
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = normal if exponent > 0 else mantissa / 8 * 2.0**-6
    return -value if sign else value
    ### END SOLUTION


# %%
# CHECK decode_e4m3
ch02_formats.decode_e4m3(decode_e4m3)

# %% [markdown]
# `labutils.quantization.floats` decodes and encodes any such format; its tests compare every code with `ml_dtypes`.
# Here: all 256 codes against PyTorch's own type, and the relative error over the magnitude.

# %%
from labutils.quantization.floats import E2M1, E4M3, E5M2, decode, encode

codes = torch.arange(256, dtype=torch.uint8)
ours, theirs = decode(codes, E4M3), codes.view(torch.float8_e4m3fn).float()
print("all codes as in torch.float8_e4m3fn:", torch.equal(ours.nan_to_num(), theirs.nan_to_num()))
print("E2M1, four bits:", decode(torch.arange(8, dtype=torch.uint8), E2M1).tolist(), "and their opposites")
x = torch.logspace(-5, 0, 4000)
ways = {
    "int8, step 1/127": fake_quantize(x, Scheme(granularity="tensor")),
    "E4M3, scaled to 448": decode(encode(x * 448, E4M3), E4M3) / 448,
    "E5M2, scaled to 57344": decode(encode(x * 57344, E5M2), E5M2) / 57344,
}

# %%
from labutils.quantization.floats import fake_quantize_float

rounded_by = {"int8": fake_quantize(weight, Scheme()), "E4M3": fake_quantize_float(weight, E4M3, Scheme())}
print("our layer, a scale per channel:", {name: f"{sqnr_db(weight, back):.1f} dB" for name, back in rounded_by.items()})
bins = x.unflatten(0, (40, 100))[:, 0]
errors = {name: ((back - x) / x).abs().unflatten(0, (40, 100)).amax(dim=1) for name, back in ways.items()}
int8_error, e4m3_error, _ = errors.values()
crossing = bins[int8_error < e4m3_error].min().item()
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
for index, (name, error) in enumerate(errors.items()):
    axes.loglog(bins, error, label=name, markevery=4, **series_style(index))
axes.set(xlabel="|x| as a share of the largest", ylabel="largest relative error")
axes.set_title(f"int8 errs less than E4M3 only above {crossing:.2f} of the largest number")
axes.grid(alpha=0.25)
axes.legend()
plt.show()

# %% [markdown]
# *The largest relative error of numbers of a given size (40 bins), for three 8-bit formats scaled so that 1 is the
# largest number. Floats keep their relative error over a wide range, and E4M3 loses it in its subnormals, at the left edge; int8's
# error grows as soon as numbers get smaller.*
#
# **Flip the bits yourself.** Each button is a bit. Which single flip changes a number most, and which least? Try the same bits
# in another format. (Tab and the space bar work too; `spell_bits` gives the same as text.)

# %%
from labutils.lab.widgets.quantization import bits_widget, spell_bits

for form, bits in (("E4M3", "00111000"), ("E4M3", "01111000"), ("E4M3", "00111001"), ("int8", "10111000")):
    print(form, spell_bits(bits, form))
bits_widget()

# %% [markdown]
# A row of weights rarely spans five powers of ten, so there int8 may well be the better one: compare the two numbers printed above
# the figure. Activations with outliers, and gradients, are where floats earn their bits.

# %% [markdown]
# ## 10 · Four bits, better spent: NF4, MXFP4, NVFP4, Q4_K
#
# **NF4** (Dettmers et al. 2023, arXiv:2305.14314) puts its 16 levels at quantiles of the normal distribution, meant to be
# used about equally often: evenly spaced *probabilities*, turned into numbers, divided by the largest. Each block of 64
# weights is divided by its max|w| and stored as the numbers of the nearest levels. Does the figure below bear the idea out? Yoshida
# (2023, arXiv:2306.06965) says why not: numbers divided by their block's maximum are no longer normal.
#
# **Double quantization** stores those maxima in 8 bits: 4 + 8/64 + 32/(64 · 256) bits per weight instead of 4 + 32/64.

# %%
from labutils.quantization import nf4

levels = nf4.nf4_levels()
print([round(level, 3) for level in levels.tolist()])
print(f"{nf4.nf4_bits_per_weight(double=False)} bits, or {nf4.nf4_bits_per_weight():.3f} with double quantization")
blocks = weight.unflatten(1, (-1, 64))
ratio = (blocks / blocks.abs().amax(dim=-1, keepdim=True)).flatten()
shares = {
    "NF4": nf4.nf4_quantize(weight)[0].flatten().bincount(minlength=16) / weight.numel(),
    "int4": (quantize(ratio, QParams(torch.tensor(1 / 7), torch.tensor(0), -7, 7)).int() + 7)
    .bincount(minlength=15)
    .div(weight.numel()),
}

# %%
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
places = {"NF4": levels, "int4": torch.arange(-7, 8) / 7}
for index, (name, share) in enumerate(shares.items()):
    axes.plot(places[name], 100 * share, label=name, **series_style(index))
axes.set(xlabel="level (as a share of the block's largest |w|)", ylabel="weights at this level (%)")
most = {name: 100 * share.max().item() for name, share in shares.items()}
axes.set_title(f"The busiest level holds {most['NF4']:.0f}% of the weights in NF4, {most['int4']:.0f}% in int4")
axes.legend()
plt.show()

# %% [markdown]
# *How often each level of NF4 and of int4 is used in our layer, blocks of 64. NF4 is flatter than int4 and far from flat. Each
# block's largest weight lands on an outermost level, so neither curve falls to 0.*

# %% [markdown]
# ## Exercise 2.9: nf4_codes
#
# Write `nf4_codes(block, levels)`: `block` is a 1-D tensor, `levels` the 16 sorted levels. Return the number of the
# nearest level for each entry of block / max|block|, an integer tensor. 2 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>All distances at once: shape (entries, 16).</details>
# <details><summary>Hint 2</summary>Ratios 0.4 and −1 and levels −1, 0, 1: write the table of 2 × 3 distances. Where in each row is the least?</details>
# <details><summary>Hint 3</summary><code>(ratio[:, None] - levels).abs().argmin(dim=1)</code>.</details>


# %%
# EXERCISE nf4_codes
def nf4_codes(block, levels):
    """Numbers of the nearest levels."""
    ### BEGIN SOLUTION
    ratio = block / block.abs().max()
    return (ratio[:, None] - levels).abs().argmin(dim=1)
    ### END SOLUTION


# %%
# CHECK nf4_codes
ch02_formats.nf4_codes(nf4_codes)

# %% [markdown]
# **MXFP4** (OCP Microscaling Formats 1.0) is what newer GPUs such as NVIDIA's Blackwell multiply directly: blocks of 32, elements in
# E2M1, and a scale that is a power of two stored as its exponent in 8 bits (E8M0): 4 + 8/32 = 4.25 bits.
# **Tiny numbers:** the largest of a block is 12 = 1.5 · 2³. E2M1 reaches 1.5 · 2², so the shared exponent is 3 − 2 = 1:
# 12 → 6 · 2, and 1.0 → 0.5 · 2. Ties go to the even code: 5/2 lies between 2 and 3, 7/2 between 3 and 4. The rule rounds the exponent
# *down*: had the largest been 14 = 7 · 2, it would be cut to 12. **Predict:** in how many blocks of our layer does that happen?

# %%
my_cut = predict("% of the blocks whose largest weight MXFP4 cuts", None, unit="%")

# %%
from labutils.quantization.floats import mxfp4_dequantize, mxfp4_quantize

codes, exponents = mxfp4_quantize(torch.tensor([[12.0, 1.0, 5.0, 7.0] + [0.0] * 28]))
print("codes", codes[0, :4].tolist(), "exponent", exponents.item() - 127, end=", ")
print("back", mxfp4_dequantize(codes, exponents)[0, :4].tolist())

# %%
largest = weight.unflatten(1, (-1, 32)).abs().amax(dim=-1)
steps = largest / 2.0 ** (mxfp4_quantize(weight)[1].float() - 127)
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
axes.hist(steps.flatten(), bins=40, color=series_style(0)["color"])
axes.axvline(6, color=series_style(1)["color"], linestyle="--", label="E2M1 ends here")
cut, far = ((steps > limit).float().mean().item() for limit in (6, 7))
axes.set(xlabel="a block's largest |w|, in its own scale", ylabel="blocks")
axes.set_title(f"MXFP4 cuts the largest weight in {cut:.0%} of the blocks")
axes.legend()
plt.show()
print(f"beyond 7, where more than half of the top step is lost: {far:.0%}")
my_cut.compare(100 * cut)

# %% [markdown]
# *The largest weight of each block of 32, divided by the block's power of two. The rule puts it between 4 and 8, and what lies beyond
# 6 is cut to 6.*
#
# **NVFP4** avoids that: blocks of 16, each with a scale in E4M3 that can put the largest weight *on* 6, and one float32 for the
# tensor, so that E4M3's range is enough: 4 + 8/16 = 4.5 bits.
#
# $$t = \frac{\max |x|}{6 \cdot 448}, \qquad s_b = \text{E4M3}\left(\frac{\max |x_b|}{6\,t}\right), \qquad q = \text{E2M1}\left(\frac{x}{s_b\,t}\right)$$
#
# ## Exercise 2.10: nvfp4_back (core)
#
# Write `nvfp4_back(block, tensor_scale)`: `block` holds 16 numbers, `tensor_scale` is t. Return the 16 numbers that come back.
# `encode(x, form)` and `decode(codes, form)` of section 9 turn tensors into codes of `E4M3` or `E2M1` and back.
# 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Which two numbers are rounded to a small float? The scale is one of them.</details>
# <details><summary>Hint 2</summary>A step is what one unit of E2M1 means. It is a product of two scales, of which one went through 8 bits.</details>
# <details><summary>Hint 3</summary><code>step = decode(encode(block.abs().max() / (6 * tensor_scale), E4M3), E4M3) * tensor_scale</code>, then round block / step.</details>


# %%
# EXERCISE nvfp4_back
def nvfp4_back(block, tensor_scale):
    """What NVFP4 leaves of a block."""
    ### BEGIN SOLUTION
    scale = decode(encode(block.abs().max() / (6 * tensor_scale), E4M3), E4M3)
    step = scale * tensor_scale
    return decode(encode(block / step, E2M1), E2M1) * step
    ### END SOLUTION


# %%
# CHECK nvfp4_back
ch02_formats.nvfp4_back(nvfp4_back)

# %% [markdown]
# **Q4_K**, a common "4 bits" of llama.cpp's GGUF files, quantizes its scales too: a super-block of 256
# weights has 8 blocks of 32, and each block a scale and a minimum *in 6 bits*, counted in two float16 steps of the super-block:
#
# $$w \approx d\,a_b\,q - d_{\min}\,m_b, \qquad q \in 0 \dots 15, \quad a_b, m_b \in 0 \dots 63$$
#
# **Tiny numbers:** 256 · 4 bits of codes, 8 · (6 + 6) of scales and minima, 2 · 16 for d and d_min: 1152 bits, so 4.5 a
# weight. (llama.cpp also searches for the scales, and weights the search by an *importance matrix*, the mean x² of each input. Its IQ
# formats replace codes by entries of a codebook.)
#
# **Predict:** which of the six spends its bits best on our layer?

# %%
from labutils.quantization.floats import nvfp4_dequantize, nvfp4_quantize
from labutils.quantization.superblocks import BITS_PER_WEIGHT as Q4_K_BITS
from labutils.quantization.superblocks import q4_k_round

by_32 = {"bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": torch.float16}
codes, absmax = nf4.nf4_quantize(weight)
four_bits = {
    "int4, group of 64": (fake_quantize(weight, Scheme(**by_32 | {"group_size": 64})), 4.25),
    "int4, group of 32": (fake_quantize(weight, Scheme(**by_32)), 4.5),
    "NF4, double quantized": (nf4.nf4_dequantize(codes, nf4.double_quantize(absmax)), nf4.nf4_bits_per_weight()),
    "MXFP4, block of 32": (mxfp4_dequantize(*mxfp4_quantize(weight)), 4.25),
    "NVFP4, block of 16": (nvfp4_dequantize(*nvfp4_quantize(weight)), 4.5),
    "Q4_K, super-block of 256": (q4_k_round(weight), Q4_K_BITS),
}
spreads = weight.var(dim=1)
for name, (back, bits) in four_bits.items():
    reached = sqnr_db(weight, back)
    print(
        f"{name:24} {bits:.3f} bits {reached:5.1f} dB, {gaussian_bound_db(bits, spreads) - reached:.1f} below the bound"
    )

# %% [markdown]
# The last column measures against the **rate-distortion bound**: no code of R bits on average can bring normal numbers of variance σ²
# below the squared error D (Shannon 1959; where rows differ, each gets its share of the bits),
#
# $$D = \sigma^2\, 2^{-2R}, \qquad \text{SQNR} = 20 \log_{10} 2 \cdot R = 6.02\,R \text{ dB}$$
#
# A uniform quantizer with small steps stays 10 log₁₀(πe/6) = 1.53 dB below, even if its codes were zipped perfectly. To gain the rest,
# one must round several numbers *together*: codebooks of vectors, lattices, trellises. Chapter 03 measures one.

# %% [markdown]
# ## 11 · Integers from end to end
#
# So far we dequantized before multiplying. Hardware without floating point cannot. With symmetric weights, a layer's output
# code is (Jacob et al. 2017, section 2.2 to 2.4)
#
# $$q_y = Z_y + M \Big( q_b + \sum_i (q_{x,i} - Z_x)\, q_{w,i} \Big), \qquad M = \frac{s_x s_w}{s_y}$$
#
# where q_b is the bias as a code. The article puts its bias into 8 bits at the weights' scale, 1/255. **Predict** what that adds to
# the sum.

# %%
my_bias = predict("what the article's code for a bias of 0.6 adds to the sum", None)

# %%
x_scale, w_scale, bias = 0.02, 1 / 255, 0.6
article_code = round(bias / w_scale)
print(f"the article's code for a bias of {bias}: {article_code}")
print(f"added to the sum, it means {article_code * x_scale * w_scale:.4f}")
my_bias.compare(article_code * x_scale * w_scale)

# %% [markdown]
# ## Exercise 2.11: quantize_bias
#
# **Fix the article.** Write `quantize_bias(bias, x_scale, weight_scale)`: the codes that mean `bias` when they are added to the sum.
# `bias` and `weight_scale` have one entry for each output, `x_scale` is a number; return int32. 1 line, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>What is the unit of a product of an input code and a weight code?</details>
# <details><summary>Hint 2</summary>With x_scale 0.5 and weight_scale 0.1, a sum of 1 means 0.05. Which sum means 0.6?</details>
# <details><summary>Hint 3</summary><code>torch.round(bias / …).to(torch.int32)</code>.</details>


# %%
# EXERCISE quantize_bias
def quantize_bias(bias, x_scale, weight_scale):
    """Bias codes in the unit of the sums."""
    ### BEGIN SOLUTION
    return torch.round(bias / (x_scale * weight_scale)).to(torch.int32)
    ### END SOLUTION


# %%
# CHECK quantize_bias
ch02_formats.quantize_bias(quantize_bias)

# %%
from labutils.quantization import integer

code = integer.quantize_bias(torch.tensor([bias]), x_scale, torch.tensor([w_scale])).item()
print(f"the code that means {bias} in the sum: {code}, more than 8 bits hold")

# %% [markdown]
# M is a real number, usually below 1. Write it as an integer m of 31 bits over a power of two, M ≈ m / 2ⁿ, once and for
# all; then every multiplication by M is a multiplication and a shift. A shift rounds *down*, and adding half of what it drops
# makes it round to nearest:
#
# $$q_y = Z_y + \left\lfloor \frac{\text{sum} \cdot m + 2^{n-1}}{2^n} \right\rfloor$$
#
# **Tiny numbers:** M = 0.75 = 1610612736 / 2³¹. For a sum of 3: (3 · 1610612736 + 2³⁰) >> 31 = 2, as 2.25 rounds to 2.

# %% [markdown]
# ## Exercise 2.12: requantize (core)
#
# Write `requantize(sums, multiplier, shift, zero_point)`: `sums` is int32, the rest are ints; return int8 codes, clamped to
# −128 … 127. Integers only: no division, no float. 2 lines, 10 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>An int32 times a 31-bit number does not fit int32.</details>
# <details><summary>Hint 2</summary>With m = 3 and n = 2, a sum of 3 must become 2 (9/4 = 2.25). What does 9 &gt;&gt; 2 give, what does 11 &gt;&gt; 2, and what if you add 2 first?</details>
# <details><summary>Hint 3</summary><code>(sums.long() * multiplier + (1 << (shift - 1))) >> shift</code>, then the zero point, then <code>clamp</code>.</details>


# %%
# EXERCISE requantize
def requantize(sums, multiplier, shift, zero_point):
    """Int8 codes of int32 sums, in integer arithmetic."""
    ### BEGIN SOLUTION
    rounded = (sums.long() * multiplier + (1 << (shift - 1))) >> shift
    return (rounded + zero_point).clamp(-128, 127).to(torch.int8)
    ### END SOLUTION


# %%
# CHECK requantize
ch02_formats.requantize(requantize)

# %% [markdown]
# A real layer now, in integers only: LabLM's k_proj with inputs that really flow into it. `IntegerLinear` prepares codes,
# bias, m and n beforehand; after that no float takes part. It is compared with its float twin (the same quantized weights
# and inputs, multiplied in float64) and with the unquantized layer.

# %%
from labutils.quantization.integer import IntegerLinear, fixed_point

inputs = []
layer = model.model.layers[5].self_attn.k_proj
hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
with torch.inference_mode():
    model(**tokenizer("def read_lines(path):\n    with open(path) as file:\n        return ", return_tensors="pt"))
hook.remove()
x, bias = inputs[0], torch.zeros(weight.shape[0])
activations = Scheme(symmetric=False, granularity="tensor")
x_qparams, y_qparams = choose_qparams(x, activations), choose_qparams(x @ weight.T, activations)
integer_layer = IntegerLinear.prepare(weight, bias, x=x_qparams, y=y_qparams)
x_codes = quantize(x, x_qparams)
y = dequantize(integer_layer(x_codes), y_qparams)

# %%
twin = dequantize(x_codes, x_qparams).double() @ fake_quantize(weight, Scheme()).double().T
steps_off = ((y - twin).abs() / y_qparams.scale).max().item()
print(f"x {tuple(x_codes.shape)} {x_codes.dtype}, weight {integer_layer.weight.dtype}, bias {integer_layer.bias.dtype}")
print(f"first output: M = {integer_layer.multiplier[0]} / 2^{integer_layer.shift[0]}; 0.25 is {fixed_point(0.25)}")
print(f"against the float twin: at most {steps_off:.3f} output steps off (half a step is the rounding of the output)")
print(f"against the unquantized layer: SQNR {sqnr_db(x @ weight.T, y):.1f} dB")
tokenwise = fake_quantize(x, Scheme(symmetric=False, granularity="token"))
print(f"the inputs alone: one scale {sqnr_db(x, dequantize(x_codes, x_qparams)):.1f} dB, ", end="")
print(f"a scale per token {sqnr_db(x, tokenwise):.1f} dB")

# %% [markdown]
# ## 12 · What a bit buys
#
# SQNR is about weights. What we want to keep is the *model*. So: replace the weights of all linear layers by what each way
# leaves of them (weight-only **fake quantization**: the model still computes in float32), and measure bits per byte on
# text it was never trained on, paired with the float32 model on the same documents (the first 1,000 bytes of each held-out module; the
# interval resamples documents). The tied embedding stays in float32.
#
# A fake-quantized model is not faster, so nothing goes into the ledger here. Chapter 03 has kernels that are.
#
# A newcomer: **ternary** weights, −1, 0 or 1 times one scale, mean|W| (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764). Three values
# carry log₂ 3 = 1.58 bits, and five of them fit into a byte, since 3⁵ = 243.

# %%
from functools import partial

from labutils.quantization.clipping import mse_range


def rounded(w, scheme):
    return fake_quantize(w, scheme), bits_per_weight(tuple(w.shape), scheme)


def clipped(w, scheme):
    low, high = mse_range(w, scheme, smallest=0.4, steps=12)
    return fake_quantize(w, scheme, low=low, high=high), bits_per_weight(tuple(w.shape), scheme)


def by_group(bits, size, **more):
    return Scheme(bits=bits, granularity="group", group_size=size, scale_dtype=torch.float16, **more)


def one_bit(w):
    signs, alpha = binary.binarize(w)
    return alpha.half() * signs, 1 + 16 / w.shape[1]


def three_values(w):
    codes, scale = binary.ternarize(w)
    return scale.half() * codes, 8 / 5 + 16 / w.numel()


def nf4_double(w):
    codes, absmax = nf4.nf4_quantize(w)
    return nf4.nf4_dequantize(codes, nf4.double_quantize(absmax)), nf4.nf4_bits_per_weight()


# %%
channel = {"scale_dtype": torch.float16}
WAYS = {
    "int8 per tensor": partial(rounded, scheme=Scheme(granularity="tensor", **channel)),
    "int8 per channel": partial(rounded, scheme=Scheme(**channel)),
    "E4M3 per channel": lambda w: (fake_quantize_float(w, E4M3, Scheme(**channel)), 8 + 16 / w.shape[1]),
    "int4 per tensor": partial(rounded, scheme=Scheme(bits=4, granularity="tensor", **channel)),
    "int4 per channel": partial(rounded, scheme=Scheme(bits=4, **channel)),
    "int4 group 64": partial(rounded, scheme=by_group(4, 64)),
    "int4 group 64, affine": partial(rounded, scheme=by_group(4, 64, symmetric=False)),
    "NF4, double quantized": nf4_double,
    "MXFP4": lambda w: (mxfp4_dequantize(*mxfp4_quantize(w)), 4 + 8 / 32),
    "NVFP4": lambda w: (nvfp4_dequantize(*nvfp4_quantize(w)), 4 + 8 / 16 + 32 / w.numel()),
    "Q4_K": lambda w: (q4_k_round(w), Q4_K_BITS),
    "int3 group 64, affine": partial(rounded, scheme=by_group(3, 64, symmetric=False)),
    "int3 group 64, affine, clipped": partial(clipped, scheme=by_group(3, 64, symmetric=False)),
    "int2 group 32, affine": partial(rounded, scheme=by_group(2, 32, symmetric=False)),
    "int2 group 32, affine, clipped": partial(clipped, scheme=by_group(2, 32, symmetric=False)),
    "ternary (BitNet b1.58)": three_values,
    "one bit (XNOR-Net)": one_bit,
}

# %% [markdown]
# **Predict:** how many bits can go before it hurts? Where will one bit land: at the text's own 8 bits per byte, or below?

# %%
my_one_bit = predict("bits per byte of LabLM with one bit for each weight", None)

# %%
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.lab.plots.quantization import BitsPoint, bits_quality_table, draw_bits_quality

LIMIT_BYTES = 1000  # chapter 00 reads 2,000 characters of each module: a shorter beginning costs more a byte
documents = held_out_documents(limit_bytes=LIMIT_BYTES)
baseline = bits_by_document(model, tokenizer, documents)
points = []
for way_name, way in WAYS.items():
    spent = 0.0
    for name, layer in linear_layers(model):
        back, bits = way(weights[name])
        spent += bits * weights[name].numel()
        set_weight_(layer, back)
    measured = bits_by_document(model, tokenizer, documents)
    points.append(BitsPoint(way_name, spent / stored, paired_quality(measured, baseline), measured))
for name, layer in linear_layers(model):
    set_weight_(layer, weights[name])
before = points[0].quality.baseline_bits_per_byte
print(f"float32: {before:.4f} bits per byte on the first {LIMIT_BYTES:,} bytes of {len(documents)} held-out modules")
print(bits_quality_table(points))
my_one_bit.compare(points[-1].quality.bits_per_byte)

# %%
figure, (axes, near) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", width_ratios=(3, 2))
draw_bits_quality(points, ax=axes)
draw_bits_quality([p for p in points if 3 < p.bits_per_weight < 5], ax=near)
near.set(title="The crowd between 3 and 5 bits", ylabel="")
plt.show()

# %% [markdown]
# *What each way of storing LabLM's linear layers costs in bits per byte (with the paired 95% interval)
# against its true bits per weight; right, the crowded part again. The scale is linear near 0 and logarithmic above. The dashed line
# joins the ways that no other beats on average in both. In the table, a star marks a way that none of as few bits **surely** beats.*
#
# **Explain**, with your own table: which ways has another one beaten for sure? Does a scale per channel help int8? Which
# spends its four bits best, and does its SQNR in section 10 say so too? What do one bit and three values cost, *without
# training for them*? (XNOR-Net and BitNet train with their codes.)

# %% [markdown]
# <details><summary>How to read it</summary>
#
# A way without a star is surely worse than another of as few bits. Where two intervals overlap, the table says nothing about the two: their
# difference needs an interval of its own. SQNR weighs all weights of a layer alike, and the model does not, so the two rankings may differ.
# </details>

# %% [markdown]
# ## Words
#
# | word | meaning |
# | --- | --- |
# | scale, zero point | the width of a step; the code of 0 |
# | symmetric, affine | zero point 0; zero point from the data |
# | per tensor, channel, group, token | which numbers share a scale |
# | SQNR, dB | power of the numbers over power of their errors; 10 dB is a factor of ten |
# | clipping | cutting the range, so that steps get smaller |
# | subnormal | a float whose exponent field is 0: it has no hidden 1 |
# | block, super-block | weights that share a scale; blocks whose scales share one |
# | fake quantization | floats rounded to what codes can say, and multiplied as floats |
# | requantize | from sums in int32 to codes in int8, by a multiplication and a shift |

# %% [markdown]
# ## What you have
#
# - one formula with its inverse, and three repairs of a published one;
# - the currency: true bits per weight on one side, SQNR and bits per byte on the other;
# - a prediction of the noise that needs only the step, three places where it fails, and a bound that no code passes;
# - formats down to one bit, among them those that hardware and llama.cpp use, each checked against a standard or by hand;
# - a layer that computes in integers from end to end.
#
# **Open question:** we rounded each weight to its own nearest level, as if weights did not know of one another. A layer's
# *output* is a sum over them. Could a weight be rounded the wrong way on purpose, to make up for its neighbours' errors?
# What would you have to know about the inputs?
#
# Next: **03 · Quantizing a language model**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()
