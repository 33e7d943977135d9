# %% [markdown]
# # 00 · Start here
#
# **Goal:** meet the model that every chapter accelerates, put its first honest point on the speed-quality plot, and
# learn what this machine can do at best.
#
# | | |
# | --- | --- |
# | Prerequisites | Python, a little PyTorch |
# | Time | 90 minutes for you; all cells run in about a minute on one core (measured: 51 and 62 s, the core shared) |
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
# Write `tokens_per_second(new_tokens, seconds)`: `seconds` is a list with the duration of each run, each of which made
# `new_tokens` tokens; the first run is the warm-up. Return the median rate in tokens per second.
# 1 line, 3 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Which element of the list must not count?</details>
# <details><summary>Hint 2</summary>Of the durations 3, 1 and 2 seconds, which is the typical one? Does a longer duration mean a higher rate or a lower one?</details>
# <details><summary>Hint 3</summary><code>statistics.median</code> of the rest gives a typical duration; a rate is tokens over time.</details>


# %%
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    """Median tokens per second over all runs but the first."""
    ### BEGIN SOLUTION
    return new_tokens / statistics.median(seconds[1:])
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
# the token is sent to, and an embedding table that is not also the head is read by one row.) So memory bandwidth sets a ceiling for
# one stream of text, however fast the arithmetic is. First measure the bandwidth: several probes, the best taken, on data
# that does not fit the cache. On a busy machine even the best is too low: measure again when nothing else runs.

# %%
from labutils.measurement.roofline import measure_roofline

machine = measure_roofline(2.0, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
print(machine)

# %% [markdown]
# ## Exercise 0.3: best_tokens_per_s
#
# Write `best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s)`: the most tokens per second that one
# stream can reach when every parameter is read from memory once per token.
# 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>How many bytes must move for one token?</details>
# <details><summary>Hint 2</summary>A model of 10 bytes, and a memory that delivers 100 bytes per second: how often can the model be read in a second?</details>
# <details><summary>Hint 3</summary>Bytes per second over bytes per token gives tokens per second.</details>


# %%
# EXERCISE best_tokens_per_s
def best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s):
    """Ceiling of single-stream decoding, in tokens per second."""
    ### BEGIN SOLUTION
    return bandwidth_bytes_per_s / (parameters * bytes_per_parameter)
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
    right.annotate(name, (gb_per_s, gb_per_s / 3.5), xytext=(-7, 2), textcoords="offset points", ha="right", fontsize=8)
right.set(xlabel="memory bandwidth (GB/s)", ylabel="tokens/s at best", title="7B in 4 bits: 3.5 GB for each token")
for axes in (left, right):
    axes.axhline(READING, color="grey", linestyle=":")
    axes.annotate("you read this fast", (1, READING), xycoords=("axes fraction", "data"), ha="right", va="bottom")
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
# This course began with a Chinese article, «秒推时代：LLM极速推理引领新风潮» ("The age of the instant answer"). It asks the right questions, and
# this course follows its list of subjects. Its evidence is one program. The loop below does what that program does, in our own words and on
# your machine; read it like a colleague's pull request, because loops like it are common. Twenty inputs go in. **Predict:** how many answers
# come out?

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
# Write `predict_all(model, batches)`: `batches` is a list of tensors of shape (batch, in_features). Return one tensor of
# shape (total, out_features) with every output in order, without gradients.
# 2 lines, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Collect first, join once. Along which dimension?</details>
# <details><summary>Hint 2</summary>Batches of 3 and 2 rows give 5 rows of outputs. The gradients are not needed: how do you tell PyTorch?</details>
# <details><summary>Hint 3</summary><code>torch.cat</code> of a list, inside <code>with torch.inference_mode():</code>.</details>


# %%
# EXERCISE predict_all
def predict_all(model, batches):
    """Outputs of all batches, in order."""
    ### BEGIN SOLUTION
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in batches])
    ### END SOLUTION


# %%
# CHECK predict_all
ch00.predict_all(predict_all)

# %% [markdown]
# ## 7 · Fix the article: its result
#
# The article's evidence is ten numbers near 0.5 from an **untrained** network on random input, with no labels and no timer. Here is what
# such a network knows: its accuracy (the fraction of rows whose largest logit is at the label's index) on two balanced classes, for 300
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
# The same article says that BERT needs "hundreds or thousands of GPU clock cycles" (our translation). A transformer multiplies and adds
# once per parameter and token, so it needs about
#
# $$\text{operations} \approx 2 \cdot \text{parameters} \cdot \text{tokens}$$
#
# (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; parameters without embeddings). Try the claim, then correct it.

# %% [markdown]
# ## Exercise 0.6: clock_cycles
#
# Write `clock_cycles(parameters, tokens, flops_per_s, clock_hz)`: how many cycles of its clock a GPU needs at its peak
# for one forward pass over `tokens` tokens.
# 2 lines, 5 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many operations does the GPU do in one cycle at its peak?</details>
# <details><summary>Hint 2</summary>A GPU that does 10 operations per second with a clock of 5 Hz does 2 operations in each cycle. How many cycles do 6 operations take?</details>
# <details><summary>Hint 3</summary>Operations per cycle = flops_per_s / clock_hz. Divide the operations by that.</details>


# %%
# EXERCISE clock_cycles
def clock_cycles(parameters, tokens, flops_per_s, clock_hz):
    """Clock cycles of one forward pass at peak arithmetic."""
    ### BEGIN SOLUTION
    operations = 2 * parameters * tokens
    return operations / (flops_per_s / clock_hz)
    ### END SOLUTION


# %%
# CHECK clock_cycles
ch00.clock_cycles(clock_cycles)

# %%
bert_parameters, bert_tokens = 85e6, 128  # BERT-base without embeddings
a100_flops_per_s, a100_clock_hz = 312e12, 1.41e9  # NVIDIA's data sheet, dense bf16
operations = 2 * bert_parameters * bert_tokens
cycles = operations / (a100_flops_per_s / a100_clock_hz)
print(f"{operations:.1e} operations: about {cycles:,.0f} cycles even at peak, which no program reaches")

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
