# %% [markdown]
# # 00 · Start here
#
# **Goal:** meet the model that every chapter accelerates, put its first honest point on the speed-quality plot, and
# learn what this machine can do at best.
#
# | | |
# | --- | --- |
# | Prerequisites | Python, a little PyTorch |
# | Time | 110 minutes for you; all cells run in about a minute on one core (measured: 51 and 62 s, the core shared) |
# | Memory, download | 1.6 GB at the peak (measured); nothing is downloaded |
# | Hardware | any computer; a GPU is used where there is one |
# | Exercises | 7, each checked in the cell below it |

# %% [markdown]
# ## 1 · The model speaks
#
# **LabLM** is a small Llama-architecture model that this course trained itself, on Python's standard library and on a
# grammar of customer-service dialogues. It is small enough for a laptop and good enough to lose something when we
# compress it. It loads like any Hugging Face model, and so does one from the hub: online, try
# `load_model("Qwen/Qwen2.5-0.5B-Instruct")`.

# %%
import math
import statistics
from itertools import pairwise

import torch

from labutils.lab.models.load import load_model

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load_model("lablm", device=device)
size_mb = model.num_parameters() * 4 / 1e6
print(f"{model.num_parameters() / 1e6:.2f} million parameters, {size_mb:.0f} MB in float32, on {device}")

# %% [markdown]
# It serves customers, in English and in Chinese, and the text appears token by token, as it is made. A chat is a list of messages; the
# tokenizer's template puts a mark before each turn. `chat_ids` keeps what a customer writes as text, even if it spells such a mark.


# %%
from labutils.generation.stream import CachedDecoder, stream
from labutils.lab.models.tokenizer import chat_ids


def show(tokens):
    for token in tokens:
        print(token.text, end="", flush=True)
    print()


def ask(text):
    chat = [{"role": "system", "content": "You are the service desk."}, {"role": "user", "content": text}]
    ids = torch.tensor([chat_ids(tokenizer, chat, add_generation_prompt=True)], device=device)
    print(f"> {text}")
    show(stream(CachedDecoder(model), tokenizer, ids, max_new_tokens=60, stop={tokenizer.eos_token_id}))


ask("Can you help me cancel order B73025?")
ask("请帮我取消订单B73025。")

# %% [markdown]
# It also continues code. A model does not choose the next token: it gives every token a probability, and we choose. **Greedy** decoding
# always takes the likeliest, so a model this small soon repeats itself. **Sampling** draws a token instead: `temperature` below 1 makes the
# draw more careful, and `top_p` leaves out the unlikely tail. Compare the two texts: both have Python's shape, neither has much of its sense.

# %%
from labutils.generation.sampling import Sampler, greedy

code = "<|endoftext|>import os\n\n\ndef read_lines(path):\n    "
prompt_ids = tokenizer(code, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
sampler = Sampler(torch.Generator(device).manual_seed(0), temperature=0.8, top_p=0.95)
for name, choose in {"greedy": greedy, "sampled": sampler}.items():
    print(f"--- {name}\n{code.removeprefix('<|endoftext|>')}", end="")
    show(stream(CachedDecoder(model), tokenizer, prompt_ids, max_new_tokens=60, choose=choose))

# %% [markdown]
# ## 2 · Predict, then measure
#
# **Predict first:** how many tokens does this machine write per second with LabLM? Write your guess into the cell below, in place of
# `None`. It is stored, set beside the measurement, and at the chapter's end you see how near your guesses were.

# %%
from labutils.course.predictions import calibration, predict

my_speed = predict("LabLM's tokens per second on this machine", None, unit="tokens/s")

# %% [markdown]
# "Fast" has several meanings, and this course keeps to these words:
#
# | words | meaning |
# | --- | --- |
# | time to first token (TTFT) | from handing in the prompt to the first new token |
# | inter-token latency | the gap between two tokens of one text |
# | time per output token (TPOT) | the median of those gaps; some benchmarks take the mean |
# | tokens/s *after the first* | 1 / TPOT |
# | tokens/s *of a whole call* | new tokens over the whole time, TTFT included; the ledger keeps this one |
#
# Here is the greedy text once more, with its times. The text is the same; are they?

# %%
from labutils.lab.widgets.stream import print_stream

for _ in range(3):
    print_stream(stream(CachedDecoder(model), tokenizer, prompt_ids, max_new_tokens=24))

# %% [markdown]
# One run tells you little: the first call warms up the caches, other programs interfere, and clock speeds drift. So we run several
# times, drop the warm-up, and report the **median** with its spread.

# %% [markdown]
# ## Exercise 0.1: tokens_per_second
#
# Write `tokens_per_second(runs)`. A run is a list of clock readings in seconds: the first is taken when the prompt is handed in, and one more
# as each new token arrives. Run 0 is the warm-up. Return a tuple of two rates, as the table above defines them: tokens/s *of a whole call*
# and tokens/s *after the first*, each the median over the other runs. Runs may differ in length.
# 6 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many tokens has a run of five readings, and how many gaps between two tokens? Which of the readings is no token's?</details>
# <details><summary>Hint 2</summary>Readings 10, 12, 13, 14, 18: the prompt came in at 10 and the last token at 18. The gaps are 1, 1 and 4; which of them stands for a typical one, and where have the first two seconds gone?</details>
# <details><summary>Hint 3</summary><code>for start, *arrivals in runs[1:]</code> takes a run apart, <code>pairwise(arrivals)</code> gives neighbours; collect both rates in lists.</details>


# %%
# EXERCISE tokens_per_second
def tokens_per_second(runs):
    """Median rates of a whole call and after the first token, the warm-up left out."""
    ### BEGIN SOLUTION
    whole, after = [], []
    for start, *arrivals in runs[1:]:
        whole.append(len(arrivals) / (arrivals[-1] - start))
        after.append(1 / statistics.median(b - a for a, b in pairwise(arrivals)))
    return statistics.median(whole), statistics.median(after)
    ### END SOLUTION


# %%
# CHECK tokens_per_second
from labutils.course.checks import ch00

ch00.tokens_per_second(tokens_per_second)

# %% [markdown]
# How many threads should PyTorch use? More is not always faster: for a model as small as LabLM, starting and joining threads can cost
# more than they save, and threads that wait for a busy core cost most. So we try, and keep the fastest count for the whole chapter.

# %%
from labutils.generation.decode import generate_cached
from labutils.measurement.threads import best_thread_count

choice = best_thread_count(lambda: generate_cached(model, prompt_ids, 8))
torch.set_num_threads(choice.threads)
print(f"fastest: {choice}, the medians of {len(choice.timings[choice.threads].samples_s)} interleaved rounds")

# %% [markdown]
# `labutils.measurement` measures as your function does, and more: it synchronises the GPU, enforces at least five repeats, and gives a 95%
# **bootstrap interval** (draw as many runs again from those measured, with repetition; take the median; a thousand times over, 95 of 100
# such medians lie inside). All chapters time with it.

# %%
from labutils.measurement.timing import measure

NEW_TOKENS = 48
timing = measure(lambda: generate_cached(model, prompt_ids, NEW_TOKENS), name="own KV cache", repeats=7, device=device)
rates = [NEW_TOKENS / seconds for seconds in timing.samples_s]
print(timing)
print(
    f"tokens/s of a whole call: median {statistics.median(rates):.0f}, slowest {min(rates):.0f}, fastest {max(rates):.0f}"
)
my_speed.compare(statistics.median(rates))

# %% [markdown]
# ## 3 · Speed means nothing without quality
#
# A model that writes nonsense can be as fast as you like. Our measure of quality is **bits per byte** on text that the
# model was never trained on:
#
# $$\text{bits per byte} = \frac{1}{\ln 2}\cdot\frac{\sum_i -\ln p(x_i \mid x_{<i})}{\text{bytes of the text}}$$
#
# It is what a perfect compressor driven by the model would need for one byte (Shannon, 1948). Unlike perplexity per
# token it does not depend on the tokenizer, so models can be compared.

# %% [markdown]
# ## Exercise 0.2: bits_per_byte
#
# Write `bits_per_byte(nats, text)`: `nats` is a tensor of shape (n,) with −ln p of each token, `text` the string that
# those tokens spell. Return a float: bits per UTF-8 byte.
# 1 line, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>How many bits is one nat? What does <code>len</code> of a string count?</details>
# <details><summary>Hint 2</summary>Try one token with p = 1/2 that spells one byte: it has 0.693 nats. How many bits should come out?</details>
# <details><summary>Hint 3</summary>Sum the nats, divide by <code>math.log(2)</code>, divide by the length of the encoded text.</details>


# %%
# EXERCISE bits_per_byte
def bits_per_byte(nats, text):
    """Bits per UTF-8 byte from the nats of a text's tokens."""
    ### BEGIN SOLUTION
    return nats.sum().item() / math.log(2) / len(text.encode())
    ### END SOLUTION


# %%
# CHECK bits_per_byte
ch00.bits_per_byte(bits_per_byte)

# %% [markdown]
# Now measure it on the beginnings of standard-library modules that no model of this course has seen. A number of bits per byte belongs to
# its text: the first characters of a file have little before them and cost more than later ones, so the length is printed with it.
#
# Is the model any good? Two rivals know nothing of language: `xz`, which looks for repetitions in these texts, and a table that counts, in
# 200 other modules, which byte follows which.

# %%
from labutils.lab.data.compressors import bigram_bits_per_byte, xz_bits_per_byte
from labutils.lab.data.corpus import Document, stdlib_documents
from labutils.lab.models import evaluate_text

CHARACTERS = 2000
held_out = [Document(d.name, d.text[:CHARACTERS]) for d in stdlib_documents("test")]
quality = evaluate_text.bits_per_byte(model, tokenizer, held_out, context=512)
rivals = {"xz": xz_bits_per_byte(held_out)}
rivals["byte pairs"] = bigram_bits_per_byte(held_out, stdlib_documents("train")[:200])
print(f"bits per byte on the first {CHARACTERS} characters of {len(held_out)} held-out modules")
print(f"LabLM {quality:.3f},", *(f"{name} {bits:.3f}," for name, bits in rivals.items()), "no prediction at all 8")

# %% [markdown]
# ## 4 · The first point on the plot
#
# Every measurement of this course becomes one record in **your ledger**: speed with its raw samples, quality, machine.
# All records share one plot. Up and to the right is better. A record without quality cannot be drawn. Later plots also draw the **Pareto
# front**, the line through those records that no other beats in both speed and quality.

# %%
from labutils.measurement import ledger

record = ledger.Record(
    technique="own KV cache",
    model="lablm",
    device=device,
    dtype="float32",
    threads=torch.get_num_threads(),
    prompt_tokens=prompt_ids.shape[1],
    output_tokens=NEW_TOKENS,
    samples=rates,
    bits_per_byte=quality,
    quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in held_out),
    chapter="00",
)
ledger.append(record)
print(f"{record.tokens_per_s:.0f} tokens/s of a whole call, at {record.bits_per_byte:.3f} bits per byte")

# %%
import matplotlib.pyplot as plt

from labutils.lab.plots.speed_quality import draw_speed_quality

figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
draw_speed_quality([record], ax=axes)
for name, bits in rivals.items():
    axes.axhline(bits, color="0.6", linestyle=":")
    axes.annotate(f"{name} ({bits:.2f})", (0, bits), xytext=(4, 4), textcoords="offset points", color="0.3")
axes.set(xlim=(0, 1.4 * record.tokens_per_s), ylim=(1.1 * max(rivals.values()), 0))
axes.set_title(f"LabLM's first point: {record.tokens_per_s:.0f} tokens/s at {quality:.2f} bits per byte")
plt.show()

# %% [markdown]
# *Your first point, from zero on both axes; its bar is the interval of the repeats, and the dotted lines are the rivals on the same text.*
# Every later chapter adds its own points.

# %% [markdown]
# ## 5 · What this machine can do at best
#
# To write one token, a dense model must read all its weights from memory once. (A mixture of experts reads only the experts that
# the token is sent to, and an embedding table that is not also the head is read by one row. Chapter 10's speculative decoding checks
# several tokens in one reading; here a reading gives each text one token.) So memory bandwidth sets a ceiling for one stream of text,
# however fast the arithmetic is. First measure the bandwidth: several probes, the best taken, on data that does not fit the cache. On a
# busy machine even the best is too low: measure again when nothing else runs.

# %%
from labutils.measurement.roofline import measure_roofline

machine = measure_roofline(2.0, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
print(machine)

# %% [markdown]
# ## Exercise 0.3: best_tokens_per_s
#
# A checkpoint is a list of tensors. Write `best_tokens_per_s(tensors, bandwidth_bytes_per_s)`: the most tokens per second that one stream can
# reach. A tensor is a dictionary with its number of `parameters` and the `bits` of each. An embedding also has `rows`, one for each token
# of the vocabulary; with `"tied": True` it serves as the head, too. The MLPs of a mixture also have `experts`, all of one size, and
# `used`, to how many of them a token is sent. 8 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Go through the tensors and ask of each: how much of it does one token need?</details>
# <details><summary>Hint 2</summary>A table of 100 rows that only looks tokens up, 1,000 parameters of 16 bits: a token reads 20 bytes of its 2,000. How many does it read if the head multiplies by the same table?</details>
# <details><summary>Hint 3</summary>Each tensor is read by a share: 1, or 1 / rows, or used / experts. Sum share · parameters · bits / 8.</details>


# %%
# EXERCISE best_tokens_per_s
def best_tokens_per_s(tensors, bandwidth_bytes_per_s):
    """Ceiling of single-stream decoding, in tokens per second."""
    ### BEGIN SOLUTION
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if "experts" in tensor:
            share = tensor["used"] / tensor["experts"]
        elif "rows" in tensor and not tensor.get("tied"):
            share = 1 / tensor["rows"]
        read_bytes += share * tensor["parameters"] * tensor["bits"] / 8
    return bandwidth_bytes_per_s / read_bytes
    ### END SOLUTION


# %%
# CHECK best_tokens_per_s
ch00.best_tokens_per_s(best_tokens_per_s)

# %% [markdown]
# The ceiling for models of several sizes on *this* machine, at 32, 16, 8 and 4 bits per weight. The lower the number of
# bits, the higher the ceiling: that is why quantization is chapter 02. Other machines have other bandwidths; the right panel takes them
# from data sheets, which promise more than a program reaches.

# %%
from labutils.lab.plots.style import plain_log_scale, series_style

SIZES, BITS = {"0.2B": 0.2e9, "1B": 1e9, "7B": 7e9, "70B": 70e9}, (32, 16, 8, 4)
READING = 240 / 60 * 1.3  # tokens/s: 240 words a minute, about 1.3 tokens an English word
DATA_SHEETS = {"laptop, DDR5": 80, "Apple M4 Max": 546, "RTX 5090": 1792, "H200": 4800, "B200": 8000}  # GB/s


def ceiling(parameters, bits):
    return machine.bandwidth_bytes_per_s / (parameters * bits / 8)


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for index, bits in enumerate(BITS):
    best = [ceiling(n, bits) for n in SIZES.values()]
    left.plot(list(SIZES.values()), best, **series_style(index))
    left.annotate(f"{bits} bits", (0.2e9, best[0]), xytext=(6, 2), textcoords="offset points")
left.set(xscale="log", xlabel="parameters", ylabel="tokens/s at best", title="This machine")
plain_log_scale(left, "y")
left.set_xticks(list(SIZES.values()), list(SIZES))
own = {"this machine, measured": machine.bandwidth_bytes_per_s / 1e9}
for index, (name, gb_per_s) in enumerate((own | DATA_SHEETS).items()):
    right.plot(gb_per_s, gb_per_s / 3.5, linestyle="none", **series_style(0 if index == 0 else 1))
    at = {"xytext": (7, -3)} if index == 0 else {"xytext": (-7, 2), "ha": "right"}
    right.annotate(name, (gb_per_s, gb_per_s / 3.5), textcoords="offset points", fontsize=8, **at)
right.set(xlabel="memory bandwidth (GB/s)", ylabel="tokens/s at best", title="7B in 4 bits: 3.5 GB for each token")
for axes, at in ((left, 0.02), (right, 1)):
    axes.axhline(READING, color="grey", linestyle=":")
    axes.annotate(
        "you read this fast",
        (at, READING),
        xycoords=("axes fraction", "data"),
        ha="left" if at < 1 else "right",
        va="bottom",
    )
for which in "xy":
    plain_log_scale(right, which)
right.set_xticks([10, 100, 1000, 10000], ["10", "100", "1,000", "10,000"])
right.margins(x=0.25)
figure.suptitle(
    f"{machine.bandwidth_bytes_per_s / 1e9:.1f} GB/s: a 7B model in 4 bits writes {ceiling(7e9, 4):.1f} tokens/s at best here"
)
plt.show()

# %% [markdown]
# *Both axes are logarithmic: each doubling of the model or of its bits halves the ceiling, and each doubling of the bandwidth doubles it.*
# LabLM itself fits into many processors' cache, so it may beat its own memory ceiling; that is why we make claims about bandwidth only on
# larger models. A machine that serves many texts at once reads the weights once for all of them: chapter 01 measures how far that carries.


# %%
def ceilings(parameters):
    """The ceiling at each number of bits, as text."""
    best = {bits: ceiling(parameters, bits) for bits in BITS}
    rows = [f"{bits:2} bits: {rate:7.2f} tokens/s at best" for bits, rate in best.items()]
    enough = [bits for bits, rate in best.items() if rate >= READING]
    return "\n".join([*rows, f"as fast as you read: {f'{max(enough)} bits or fewer' if enough else 'none of these'}"])


print(ceilings(7e9))

# %% [markdown]
# **Question for the slider:** how few bits per weight let a 7B model write as fast as you read here? And a 70B model? And a mixture of
# experts that keeps 30B parameters in memory but reads 3.3B of them for a token? Click the slider and move it with the arrow keys. The
# figure above shows the same without a click, and `print(ceilings(70e9))` prints it.

# %%
import ipywidgets as widgets

choices = [*SIZES.items(), ("30B-A3B", 3.3e9)]  # the mixture counts with its active parameters
size_slider = widgets.SelectionSlider(options=choices, value=7e9, description="model")
ceiling_box = widgets.HTML()


def show_ceilings(_change=None):
    ceiling_box.value = f"<pre>{ceilings(size_slider.value)}</pre>"


size_slider.observe(show_ceilings, names="value")
show_ceilings()
widgets.VBox([size_slider, ceiling_box])

# %% [markdown]
# ## 6 · Fix the article: its program
#
# This course began with a Chinese article, «秒推时代：LLM极速推理引领新风潮» ("The age of the instant answer"). We found
# a copy of its text but no address to link, so we quote what we discuss. It asks the right questions, and this course follows its list of
# subjects. Its evidence is one program. The loop below does what that program does, in our own words and on your machine; read it like a colleague's pull
# request, because loops like it are common. Twenty inputs go in. **Predict:** how many answers come out?

# %%
my_answers = predict("answers that come out of the article's loop", None)

# %%
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
batches = list(torch.randn(20, 10).split(4))

wrapped = network
for batch in batches:
    wrapped = nn.DataParallel(wrapped, device_ids=[0])  # around itself, once for every batch; on the first GPU, if any
    output = wrapped(batch)
    answers = output.mean(dim=1)  # said to merge the GPUs' results
depth = str(wrapped).count("DataParallel")
print(f"inputs: 20, answers: {len(answers)}, wrappers around the network: {depth}")
my_answers.compare(len(answers))

# %% [markdown]
# Find three bugs before you open the list.
#
# <details><summary>The bugs</summary>
#
# - `output` is overwritten, so only the last batch's answers survive.
# - The network is wrapped again for every batch.
# - The mean runs over *features*: `DataParallel` already gathers the GPUs' results along dimension 0.
#
# </details>

# %% [markdown]
# ## Exercise 0.4: predict_all
#
# The loop wanted several GPUs to share the work. Let them. Write `predict_all(replicas, batches)`: `replicas` is a list of copies of one
# model, which would each be on a GPU of its own, and `batches` a list of tensors of shape (batch, in_features). Return one tensor of shape
# (total, out_features) with every output in order, without gradients. Of a batch of n rows each of the r replicas may read at most
# ⌈n / r⌉; a batch may have fewer rows than there are replicas. 6 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What must be cut, along which dimension, and what must be joined? Would a mean over replicas save any work?</details>
# <details><summary>Hint 2</summary>Five rows and two replicas: one reads rows 0 to 2, the other rows 3 and 4. In which order do their outputs go into the result, and before or after those of the next batch?</details>
# <details><summary>Hint 3</summary><code>batch.tensor_split(len(replicas))</code> cuts, <code>torch.cat</code> joins, and <code>torch.inference_mode()</code> keeps no graph.</details>


# %%
# EXERCISE predict_all
def predict_all(replicas, batches):
    """Outputs of all batches, in order, each replica with a part of every batch."""
    ### BEGIN SOLUTION
    outputs = []
    with torch.inference_mode():
        for batch in batches:
            for replica, part in zip(replicas, batch.tensor_split(len(replicas)), strict=True):
                outputs.append(replica(part))
    return torch.cat(outputs)
    ### END SOLUTION


# %%
# CHECK predict_all
ch00.predict_all(predict_all)

# %% [markdown]
# ## 7 · Fix the article: its result
#
# The program prints ten numbers near 0.5, made by an **untrained** network from random input, with no labels and no timer. From these the
# article concludes 「我们成功实现了对随机数据的分类，且推理速度显著提高」: that random data were classified, and that inference became much
# faster. Here is what such a network knows: its accuracy (the fraction of rows whose largest logit is at the label's index) on two balanced classes, for 300
# random initialisations. **Predict** the shape before you run it.

# %%
inputs = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
labels = torch.arange(200) % 2
scores, one_class = [], 0
for seed in range(300):
    torch.manual_seed(seed)
    untrained = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.inference_mode():
        chosen = untrained(inputs).argmax(dim=1)
    scores.append((chosen == labels).float().mean().item())
    one_class += len(chosen.unique()) == 1
print(f"mean accuracy {statistics.mean(scores):.3f}, between {min(scores):.3f} and {max(scores):.3f}")
print(f"exactly one half: {scores.count(0.5)} of 300; the same class for every row: {one_class} of 300")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(scores, bins=25, color="#0072B2")
axes.axvline(0.5, color="black", linestyle="--")
axes.annotate("guessing", (0.5, 1), xycoords=("data", "axes fraction"), xytext=(5, -14), textcoords="offset points")
axes.set(xlabel="accuracy", ylabel="networks", title="An untrained network guesses")
plt.show()

# %% [markdown]
# *A hill around 0.5: an accuracy near one half is what a network that knows nothing gets.* Why is the bar at one half so tall?
#
# <details><summary>An answer</summary>
#
# A network that gives every row the same class is right for exactly half of balanced labels, however it was drawn; the cell above counts
# such networks. The other exact halves are chance: 200 rows can split evenly.
#
# </details>
#
# A result needs labels, a comparison and a clock. A *claim* needs a number that could turn out false.

# %% [markdown]
# ## Exercise 0.5: refuted
#
# Six claims with numbers, made up for this exercise. Which of them can a memory bandwidth alone refute? Write
# `refuted(claims, bandwidth_bytes_per_s)`: the list of the names of those that are too fast to be true. A claim is a dictionary: `name`,
# `parameters`, `active_parameters` (what one token reads; fewer than all in a mixture of experts), `bits` per weight, `streams` (texts
# written at once, which share one read of the weights) and `tokens_per_s`, of all streams together.
# 5 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many bytes does one step read, and how many tokens does it give?</details>
# <details><summary>Hint 2</summary>Take the reading that is kindest to the claim. If even that is too slow, the claim is refuted.</details>
# <details><summary>Hint 3</summary>The ceiling is streams · bandwidth / (active parameters · bits / 8).</details>


# %%
# EXERCISE refuted
def refuted(claims, bandwidth_bytes_per_s):
    """Names of the claims that are faster than this bandwidth allows."""
    ### BEGIN SOLUTION
    found = []
    for claim in claims:
        read_bytes = claim["active_parameters"] * claim["bits"] / 8
        if claim["tokens_per_s"] > claim["streams"] * bandwidth_bytes_per_s / read_bytes:
            found.append(claim["name"])
    return found
    ### END SOLUTION


# %%
# CHECK refuted
ch00.refuted(refuted)

# %%
for claim in ch00.CLAIMS:
    bound = claim["streams"] * ceiling(claim["active_parameters"], claim["bits"])
    verdict = "refuted here" if claim["tokens_per_s"] > bound else "not refuted here"
    print(f"{claim['name']:<24} claims {claim['tokens_per_s']:3.0f} tokens/s, at best {bound:6.1f} here: {verdict}")

# %% [markdown]
# "Not refuted" is all that a ceiling can say. Whether a claim is *true* takes a measurement.

# %% [markdown]
# ## 8 · Fix the article: its orders of magnitude
#
# The article's introduction says of BERT: 「需要成百上千的 GPU 时钟周期」, it takes hundreds to thousands of cycles of a GPU's clock. A
# transformer multiplies and adds once per parameter and token, so a pass needs about
#
# $$\text{operations} \approx 2 \cdot \text{parameters} \cdot \text{tokens}$$
#
# (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; parameters without embeddings). Is the claim right, at least for a short text?

# %% [markdown]
# ## Exercise 0.6: clock_cycles
#
# Write `clock_cycles(parameters, tokens, bytes_per_parameter, gpu)`: the fewest cycles of a GPU's clock in which one forward pass over `tokens`
# tokens can end. `gpu` is a dictionary of what it does at best: `flops_per_s`, `bytes_per_s` from its memory, and `clock_hz`. Be as kind to
# the claim as you can be, and forget nothing that the pass cannot do without. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Sections 5 and 8 each name one thing that every pass must do. Which of the two depends on the number of tokens?</details>
# <details><summary>Hint 2</summary>If arithmetic alone takes 3 s and reading alone 5 s, and a GPU can do both at the same time: after how many seconds can the pass end? How many cycles are that with a clock of 2 Hz?</details>
# <details><summary>Hint 3</summary>The larger of operations / flops_per_s and bytes / bytes_per_s, times clock_hz.</details>


# %%
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, bytes_per_parameter, gpu):
    """The fewest clock cycles of one forward pass."""
    ### BEGIN SOLUTION
    arithmetic_s = 2 * parameters * tokens / gpu["flops_per_s"]
    reading_s = parameters * bytes_per_parameter / gpu["bytes_per_s"]
    return max(arithmetic_s, reading_s) * gpu["clock_hz"]
    ### END SOLUTION


# %%
# CHECK clock_cycles
ch00.clock_cycles(clock_cycles)

# %%
BERT = 85e6  # parameters of BERT-base without embeddings, here in 16 bits
A100 = {"flops_per_s": 312e12, "bytes_per_s": 2.039e12, "clock_hz": 1.41e9}  # NVIDIA's data sheet: dense bf16, 80 GB
reading = 2 * BERT / A100["bytes_per_s"] * A100["clock_hz"]
for tokens in (1, 128, 1024):
    arithmetic = 2 * BERT * tokens / A100["flops_per_s"] * A100["clock_hz"]
    print(f"tokens: {tokens:4}; {arithmetic:9,.0f} cycles of arithmetic and {reading:9,.0f} of reading, at least")
in_1000 = 1000 / A100["clock_hz"] * A100["bytes_per_s"]
print(f"in 1,000 cycles an A100 reads {in_1000 / 1e6:.1f} MB: all of a model of {in_1000 / 2e6:.1f} million parameters")

# %% [markdown]
# ## 9 · Break the benchmark
#
# If you can measure, you can also deceive, and most often yourself. Here is a benchmark that looks reasonable; you choose its settings.
# **Predict:** the same model runs twice on this machine, and each run writes 16 tokens. By how many times can the settings alone make the
# second look faster than the first?


# %%
import time

my_lie = predict("how many times as fast as itself careless settings make LabLM look", None, unit="times")
NEW = 16


def careless_rate(generate, prompt_tokens, warmup, runs, statistic, clock=time.perf_counter):
    """Tokens per second, as some reports count them."""
    for _ in range(warmup):
        generate(prompt_tokens)
    seconds = []
    for _ in range(runs):
        start = clock()
        generate(prompt_tokens)  # reads the prompt and writes 16 tokens
        seconds.append(clock() - start)
    return (prompt_tokens + NEW) / statistic(seconds)


# %% [markdown]
# ## Exercise 0.7: lying_settings
#
# Write `lying_settings()`: two dictionaries of settings for `careless_rate`, *theirs* and *ours*, in this order. Allowed are `prompt_tokens` from 16
# to 512, `warmup` from 0 to 3, `runs` from 1 to 9, and as `statistic` the functions `statistics.mean`, `statistics.median` and `min`. Both measure
# one program, and ours must look at least twice as fast, on each of three simulated machines: one sets itself up during the first call,
# one reads a prompt much faster than it writes, and one is disturbed in every third call.
# 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>For each machine look for one setting that hides, or shows, what is special about it. What does the last line of the benchmark count?</details>
# <details><summary>Hint 2</summary>Calls of 1, 1 and 5 seconds have the mean 2.3 and the minimum 1. And if the first of three calls takes a setup of 6 seconds more?</details>
# <details><summary>Hint 3</summary>Theirs: a short prompt, no warm-up, and the mean of just enough runs to meet a disturbed call. Ours: the opposite of each.</details>


# %%
# EXERCISE lying_settings
def lying_settings():
    """Settings that make one program look slow, and settings that make it look fast."""
    ### BEGIN SOLUTION
    theirs = {"prompt_tokens": 16, "warmup": 0, "runs": 3, "statistic": statistics.mean}
    ours = {"prompt_tokens": 512, "warmup": 1, "runs": 9, "statistic": min}
    return theirs, ours
    ### END SOLUTION


# %%
# CHECK lying_settings
ch00.lying_settings(lying_settings, careless_rate)

# %% [markdown]
# Now on this machine, with LabLM. It is warm already, so one of the three lies may have nothing to work on.

# %%
long_ids = tokenizer(stdlib_documents("test")[0].text[:8000], return_tensors="pt")["input_ids"].to(device)


def write(prompt_tokens):
    generate_cached(model, long_ids[:, :prompt_tokens], NEW)


slow = careless_rate(write, prompt_tokens=16, warmup=0, runs=3, statistic=statistics.mean)
fast = careless_rate(write, prompt_tokens=512, warmup=1, runs=9, statistic=min)
fair = measure(lambda: write(16), name="16 new tokens", device=device)
print(f"LabLM looks {fast / slow:.1f} times as fast as LabLM: {fast:.0f} against {slow:.0f} 'tokens/s'")
print(f"new tokens alone, median of {len(fair.samples_s)} runs after a warm-up: {NEW / fair.median_s:.0f} tokens/s")
my_lie.compare(fast / slow)

# %% [markdown]
# <details><summary>How does one read such a report?</summary>
#
# Ask what a token is: one that was *read* costs far less than one that was *written*, and servers' "total throughput" counts both. Ask what happened
# before the clock started. Ask which of the runs is shown. Then ask whether both sides had the same settings. This course prints new tokens, the
# median, its interval and the settings with each rate; chapter 01 repairs a benchmark that breaks these rules.
#
# </details>

# %% [markdown]
# ## Words
#
# | word | meaning |
# | --- | --- |
# | token | a piece of text that the model reads and writes as one number |
# | logit | the model's score of one token; softmax turns all of them into probabilities |
# | greedy | always the token with the largest logit |
# | bits per byte | −log₂ p of a text over its bytes; lower is better |
# | bootstrap interval | where the median lies in 95 of 100 redraws of the runs |
# | Pareto front | the records that no other beats in both speed and quality |
# | mixture of experts | a model that reads only a part of its weights for each token |

# %% [markdown]
# ## What you have
#
# - a model that speaks, and a point on the plot that anyone can repeat;
# - three habits: *median of repeats, warm-up dropped*, *no speed without quality*, and *the same settings for both*;
# - the ceiling of your machine, and which claims it refutes;
# - a first score of your guesses, which the next cell prints.
#
# **Open question:** the article promises answers "within a second". Which of your numbers would you need, and for which
# model, to know whether this machine can keep that promise?
#
# Next: **01 · How a language model generates**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()
