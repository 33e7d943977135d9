# %% [markdown]
# # 00 · Start here
#
# **Goal:** meet the model that every chapter accelerates, put its first honest point on the speed-quality plot, and
# learn what this machine can do at best.
#
# | | |
# | --- | --- |
# | Prerequisites | Python, a little PyTorch |
# | Time | 45 minutes for you; all cells run in about a minute on one core (measured: 51 and 62 s, the core shared) |
# | Memory, download | 1.6 GB at the peak (measured); nothing is downloaded |
# | Hardware | any computer; a GPU is used where there is one |
# | Exercises | 6, each checked in the cell below it |

# %% [markdown]
# ## 1 · The model speaks
#
# **LabLM** is a small Llama-architecture model that this course trained itself, on Python's standard library and on a
# grammar of customer-service dialogues. It is small enough for a laptop and good enough to lose something when we
# compress it. It loads like any Hugging Face model.

# %%
import math
import statistics

import torch

from labutils.models.load import load_model

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load_model("lablm", device=device)
size_mb = model.num_parameters() * 4 / 1e6
print(f"{model.num_parameters() / 1e6:.2f} million parameters, {size_mb:.0f} MB in float32, on {device}")

# %% [markdown]
# It continues code. The text appears token by token, as it is made, with the rate at the end. Always taking the likeliest
# token makes a model this small repeat itself: the text has Python's shape, not its sense.

# %%
from labutils.generation.stream import CachedDecoder, stream
from labutils.widgets.stream import print_stream

code = "<|endoftext|>import os\n\n\ndef read_lines(path):\n    "
prompt_ids = tokenizer(code, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
print(code.removeprefix("<|endoftext|>"), end="")
times = print_stream(stream(CachedDecoder(model), tokenizer, prompt_ids, max_new_tokens=60))

# %% [markdown]
# And it serves customers, in English and in Chinese. A chat is a list of messages; the tokenizer's template puts a mark before each
# turn. `chat_ids` keeps what a customer writes as text, even if it spells such a mark.


# %%
from labutils.models.tokenizer import chat_ids


def ask(text):
    chat = [{"role": "system", "content": "You are the service desk."}, {"role": "user", "content": text}]
    ids = torch.tensor([chat_ids(tokenizer, chat, add_generation_prompt=True)], device=device)
    print(f"> {text}")
    tokens = stream(CachedDecoder(model), tokenizer, ids, max_new_tokens=60, stop={tokenizer.eos_token_id})
    print_stream(tokens)


ask("Can you help me cancel order B73025?")
ask("请帮我取消订单B73025。")

# %% [markdown]
# ## 2 · Predict, then measure
#
# **Predict first:** how many tokens does this machine write per second? Note your guess.
#
# One run tells you nothing: the first call warms up the caches, other programs interfere, and clock speeds drift. So we run several
# times, drop the warm-up, and report the **median** with its spread.

# %% [markdown]
# ## Exercise 0.1: tokens_per_second
#
# Write `tokens_per_second(new_tokens, seconds)`: `seconds` is a list with the duration of each run, each of which made
# `new_tokens` tokens; the first run is the warm-up. Return the median rate in tokens per second.
# 1 line, 3 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Which element of the list must not count?</details>
# <details><summary>Hint 2</summary><code>statistics.median</code> of the rest gives a typical duration; a rate is tokens over time.</details>


# %%
# EXERCISE tokens_per_second
def tokens_per_second(new_tokens, seconds):
    """Median tokens per second over all runs but the first."""
    ### BEGIN SOLUTION
    return new_tokens / statistics.median(seconds[1:])
    ### END SOLUTION


# %%
# CHECK tokens_per_second
from labutils.checks import ch00

ch00.tokens_per_second(tokens_per_second)

# %% [markdown]
# `labutils.measurement` does the same and more: it synchronises the GPU, enforces at least five repeats, and gives a
# bootstrap interval. All chapters time with it.

# %%
from labutils.generation.decode import generate_cached
from labutils.measurement.timing import measure

NEW_TOKENS = 48
timing = measure(lambda: generate_cached(model, prompt_ids, NEW_TOKENS), name="own KV cache", repeats=7, device=device)
rates = [NEW_TOKENS / seconds for seconds in timing.samples_s]
print(timing)
print(f"median {statistics.median(rates):.0f} tokens/s, slowest {min(rates):.0f}, fastest {max(rates):.0f}")

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
# <details><summary>Hint 2</summary>Sum the nats, divide by <code>math.log(2)</code>, divide by the length of the encoded text.</details>


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
# Now measure it on the beginnings of standard-library modules that no model of this course has seen.

# %%
from labutils.data.corpus import Document, stdlib_documents
from labutils.models import evaluate_text

held_out = [Document(d.name, d.text[:2000]) for d in stdlib_documents("test")]
quality = evaluate_text.bits_per_byte(model, tokenizer, held_out, context=512)
print(f"{quality:.3f} bits per byte on {len(held_out)} held-out modules (8 would be no prediction at all)")

# %% [markdown]
# ## 4 · The first point on the plot
#
# Every measurement of this course becomes one record in **your ledger**: speed with its raw samples, quality, machine.
# All records share one plot. Up and to the right is better. A record without quality cannot be drawn.

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
print(f"{record.tokens_per_s:.0f} tokens/s at {record.bits_per_byte:.3f} bits per byte")

# %%
import matplotlib.pyplot as plt

from labutils.plots.speed_quality import draw_speed_quality

figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
draw_speed_quality([record], ax=axes)
axes.set_title(f"LabLM's first point: {record.tokens_per_s:.0f} tokens/s at {quality:.2f} bits per byte")
plt.show()

# %% [markdown]
# *The figure shows one point: LabLM's tokens per second, with the interval of the repeats, against its bits per byte.
# Every later chapter adds its own.*

# %% [markdown]
# ## 5 · What this machine can do at best
#
# To write one token, a dense model must read all its weights from memory once. (A mixture of experts reads only the experts that
# the token is sent to, and an embedding table that is not also the head is read by one row.) So memory bandwidth sets a ceiling for
# one stream of text, however fast the arithmetic is. First measure the bandwidth: several probes, the best taken, on data
# that does not fit the cache. On a busy machine even the best is too low: measure again when nothing else runs.

# %%
from labutils.measurement.roofline import measure_roofline

machine = measure_roofline(2.0, device=device)
print(machine)

# %% [markdown]
# ## Exercise 0.3: best_tokens_per_s
#
# Write `best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s)`: the most tokens per second that one
# stream can reach when every parameter is read from memory once per token.
# 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>How many bytes must move for one token?</details>
# <details><summary>Hint 2</summary>Bytes per second over bytes per token gives tokens per second.</details>


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
# bits, the higher the ceiling: that is why quantization is chapter 02.

# %%
from labutils.plots.style import series_style

SIZES, BITS = {"0.2B": 0.2e9, "1B": 1e9, "7B": 7e9, "70B": 70e9}, (32, 16, 8, 4)


def ceiling(parameters, bits):
    return machine.bandwidth_bytes_per_s / (parameters * bits / 8)


figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for index, bits in enumerate(BITS):
    axes.plot(list(SIZES), [ceiling(n, bits) for n in SIZES.values()], label=f"{bits} bits", **series_style(index))
axes.axhline(5, color="grey", linestyle=":", label="reading speed,\nabout 5 tokens/s")
title = f"{machine.bandwidth_bytes_per_s / 1e9:.1f} GB/s: a 7B model in 4 bits writes {ceiling(7e9, 4):.1f} tokens/s at best"
axes.set(yscale="log", xlabel="parameters", ylabel="tokens/s at best", title=title)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# *The figure shows four falling lines, one per number of bits: each doubling of the model or of its bits halves the
# ceiling.* LabLM itself fits into many processors' cache, so it may beat its own memory ceiling; that is why we make
# claims about bandwidth only on larger models.


# %%
def ceilings(parameters):
    """The ceiling at each number of bits, as text."""
    best = {bits: ceiling(parameters, bits) for bits in BITS}
    rows = [f"{bits:2} bits: {rate:7.2f} tokens/s at best" for bits, rate in best.items()]
    enough = [bits for bits, rate in best.items() if rate >= 5]
    return "\n".join([*rows, f"as fast as you read: {f'{max(enough)} bits or fewer' if enough else 'none of these'}"])


print(ceilings(7e9))

# %% [markdown]
# **Question for the slider:** how few bits per weight let a 7B model write as fast as you read here? And a 70B model?
# Click the slider and move it with the arrow keys. The figure above shows the same without a click, and
# `print(ceilings(70e9))` prints it.

# %%
import ipywidgets as widgets

size_slider = widgets.SelectionSlider(options=list(SIZES.items()), value=7e9, description="model")
ceiling_box = widgets.HTML()


def show_ceilings(_change=None):
    ceiling_box.value = f"<pre>{ceilings(size_slider.value)}</pre>"


size_slider.observe(show_ceilings, names="value")
show_ceilings()
widgets.VBox([size_slider, ceiling_box])

# %% [markdown]
# ## 6 · Fix the article: its program
#
# This course began with a Chinese article on fast LLM inference that offers a program as its only evidence. The loop below does what
# that program does, in our own words and on your machine. Twenty inputs go in. **Predict:** how many answers come out?

# %%
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
batches = list(torch.randn(20, 10).split(4))

wrapped = network
for batch in batches:
    wrapped = nn.DataParallel(
        wrapped, device_ids=[0]
    )  # once more around itself for every batch; on the first GPU, if any
    output = wrapped(batch)
    answers = output.mean(dim=1)  # said to merge the GPUs' results
depth = str(wrapped).count("DataParallel")
print(f"inputs: 20, answers: {len(answers)}, wrappers around the network: {depth}")

# %% [markdown]
# Sixteen answers are lost, the wrappers nest once per batch, and the mean runs over *features*: `DataParallel` already
# gathers the GPUs' results along dimension 0.

# %% [markdown]
# ## Exercise 0.4: predict_all
#
# Write `predict_all(model, batches)`: `batches` is a list of tensors of shape (batch, in_features). Return one tensor of
# shape (total, out_features) with every output in order, without gradients.
# 2 lines, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Collect first, join once. Along which dimension?</details>
# <details><summary>Hint 2</summary><code>torch.cat</code> of a list, inside <code>with torch.inference_mode():</code>.</details>


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
# The article's evidence is ten numbers near 0.5 from an **untrained** network on random input, with no labels and no
# timer, called a success. Here is what such a network knows: its accuracy on two balanced classes, for 300 random
# initialisations. **Predict** the shape before you run it; first write the measure.

# %% [markdown]
# ## Exercise 0.5: accuracy
#
# Write `accuracy(logits, labels)`: logits of shape (n, classes), labels of shape (n,). Return the share of rows whose
# largest logit stands at the label, as a float.
# 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Which function gives the position of the largest value in each row?</details>
# <details><summary>Hint 2</summary>Compare <code>logits.argmax(dim=1)</code> with the labels, turn it into floats, take the mean.</details>


# %%
# EXERCISE accuracy
def accuracy(logits, labels):
    """Share of rows whose largest logit stands at the label."""
    ### BEGIN SOLUTION
    return (logits.argmax(dim=1) == labels).float().mean().item()
    ### END SOLUTION


# %%
# CHECK accuracy
ch00.accuracy(accuracy)

# %%
inputs = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
labels = torch.arange(200) % 2
scores = []
for seed in range(300):
    torch.manual_seed(seed)
    untrained = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.inference_mode():
        scores.append((untrained(inputs).argmax(dim=1) == labels).float().mean().item())
print(f"mean accuracy {statistics.mean(scores):.3f}, between {min(scores):.3f} and {max(scores):.3f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(scores, bins=25, color="#0072B2")
axes.axvline(0.5, color="black", linestyle="--", label="guessing")
axes.set(xlabel="accuracy", ylabel="networks", title="An untrained network guesses")
axes.legend()
plt.show()

# %% [markdown]
# *A hill around 0.5: an accuracy near one half is what a network that knows nothing gets.* Why is the bar at exactly one half so tall?
# (Look at what a network answers that gives every row the same class.) A result needs labels, a comparison and a clock.

# %% [markdown]
# ## 8 · Fix the article: its orders of magnitude
#
# The article says that BERT "needs hundreds or thousands of GPU clock cycles". A transformer multiplies and adds once
# per parameter and token, so it needs about
#
# $$\text{operations} \approx 2 \cdot \text{parameters} \cdot \text{tokens}$$
#
# (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; parameters without embeddings). Try the claim, then repair it.

# %% [markdown]
# ## Exercise 0.6: clock_cycles
#
# Write `clock_cycles(parameters, tokens, flops_per_s, clock_hz)`: how many cycles of its clock a GPU needs at its peak
# for one forward pass over `tokens` tokens.
# 2 lines, 5 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many operations does the GPU do in one cycle at its peak?</details>
# <details><summary>Hint 2</summary>Operations per cycle = flops_per_s / clock_hz. Divide the operations by that.</details>


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
print(f"{operations:.1e} operations, at least {cycles:.0e} cycles: {cycles / 1000:.0f} times a thousand")

# %% [markdown]
# ## What you have
#
# - a model that speaks, and a point on the plot that anyone can repeat;
# - two habits: *median of repeats, warm-up dropped* and *no speed without quality*;
# - the ceiling of your machine, and what an article's program did not show.
#
# **Open question:** the article promises answers "within a second". Which of your numbers would you need, and for which
# model, to know whether this machine can keep that promise?
#
# Next: **01 · How a language model generates**.

# %%
from labutils.course.progress import progress

progress()
