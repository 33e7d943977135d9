# %% [markdown]
# # 07 · TPU and XLA
#
# **Goal:** turn LabLM into a pure function, let a compiler make programs of it, count and read those programs, and write
# a kernel for the matrix unit of a TPU.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 00 and 01; NumPy |
# | Time | 4 hours for you; all cells run in one to two minutes on one core (measured: 71 and 78 s, the core shared) |
# | Memory, download | 1.6 GB at the peak (measured); JAX, about 130 MB, is installed by the first cell |
# | Hardware | any computer; a Colab TPU is used where there is one |
# | Exercises | 11, each checked in the cell below it; those marked *core* fit into one session of two hours |

# %% [markdown]
# **What is real here: compiled for TPU, executed on CPU.** Nothing in the outputs you see ran on a TPU: no TPU was at
# hand. All programs were executed on a CPU, and those of section 9 compiled for a TPU by its real compiler. Several devices are simulated on one CPU: their results
# are right, their speed means nothing.

# %%
from labutils.course.extras import install_extra
from labutils.xla import runtime

install_extra("tpu")  # JAX; where it is already installed, or built for an accelerator, nothing happens
devices = runtime.start(devices=4)  # before anything else touches JAX: simulated devices are made at its start

# %%
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from jax.experimental import pallas as pl

from labutils.acceleration.formats import cpu_units
from labutils.course.predictions import calibration, predict
from labutils.lab.models.load import load_model
from labutils.lab.plots.style import series_style

# %%
model, tokenizer = load_model("lablm")
prompt_ids = tokenizer(tokenizer.bos_token + "import os\n\n\ndef read_lines(path):\n    ")["input_ids"]
kind = "simulated" if jax.default_backend() == "cpu" else "real"
print(f"JAX {jax.__version__} on {jax.default_backend()}: {len(devices)} {kind} devices, one thread per operation")
print(f"a prompt of {len(prompt_ids)} tokens")

# %% [markdown]
# ## 1 · What a compiler sees
#
# A TPU is a matrix unit with little around it. It cannot run Python, and it cannot choose at run time how large an array
# is: it runs *programs* that XLA compiled for fixed shapes. `jax.jit(f)` makes one at the first call: Python runs `f`
# once with **tracers**, stand-ins that have a shape and a dtype but no value, and notes every operation. XLA compiles
# what was noted. Later calls with the same shapes run the program, not Python.
#
# What happens to such a function, stage by stage: Python → *jaxpr* (what was noted) → *StableHLO* (portable, section 10) → *HLO* (optimised by XLA,
# section 6) → a program for one chip. Pallas kernels (section 8) join at the end, through *Mosaic*, the TPU's kernel compiler.
#
# **Predict:** the function below prints. How often will its own `print` run in two calls?


# %%
def double_plus_one(x):
    print("    Python runs; x is", x)
    return 2 * x + 1


compiled = jax.jit(double_plus_one)
for value in (1.0, 20.0):
    print(value, "->", compiled(jnp.float32(value)))
print(jax.make_jaxpr(lambda x: 2 * x + 1)(jnp.float32(1.0)).pretty_print(use_color=False))

# %% [markdown]
# Once: the second call found its program. Below it stands what was noted, a *jaxpr*.
#
# A tracer has no value, so Python cannot branch on one. Both branches become part of the program instead, and a mask
# chooses:

# %%
try:
    jax.jit(lambda x: x / 2 if x > 10 else x)(jnp.float32(12.0))
except jax.errors.TracerBoolConversionError as error:
    print("Python's if: ", str(error).split("\n")[0])
print("jnp.where:   ", jax.jit(lambda x: jnp.where(x > 10, x / 2, x))(jnp.float32(12.0)))

# %% [markdown]
# ## Exercise 7.1: programs (core)
#
# `jit` keeps a program for each *key*: above all the arguments' shapes and dtypes, and the values of arguments declared static.
# (Also in the key, and left out of this exercise: whether a number came from Python, a *weak type*, the nesting of tuples and
# lists, and how arrays are spread over devices. The cell after the check shows it.)
# Write `programs(calls)`: how many programs are compiled for a list of calls, each a tuple
# (shape, dtype, static value). 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>What happens at the third call of a list whose third entry equals its first?</details>
# <details><summary>Hint 2</summary>A Python <code>set</code> keeps one of each.</details>


# %%
# EXERCISE programs
def programs(calls):
    """How many programs jit compiles for these calls."""
    ### BEGIN SOLUTION
    return len(set(calls))
    ### END SOLUTION


# %%
# CHECK programs
from labutils.course.checks import ch07

ch07.programs(programs)

# %% [markdown]
# JAX announces every compilation, and `runtime.compilations` listens. **Predict** the count for these seven calls, then
# run the cell.


# %%
def repeat_sum(x, times):
    return jnp.sum(x) * times


jitted = jax.jit(repeat_sum, static_argnames="times")
calls = [(4, "float32", 1), (8, "float32", 1), (4, "float32", 1), (4, "int32", 1), (4, "float32", 2), (8, "float32", 1)]
calls.append((5, "float32", 1))
with runtime.compilations("repeat_sum") as seen:
    for length, dtype, times in calls:
        jitted(np.ones(length, dtype), times=times)
print(f"{len(calls)} calls, {len(seen)} compilations, {sum(c.seconds for c in seen) * 1e3:.0f} ms of compiling")

# %% [markdown]
# The everyday trap is the rest of the key. A Python number has a *weak* type, for it takes the other operand's dtype; the same number from NumPy has not.
# **Question:** which of these five calls compile?


# %%
def doubled(tree):
    return jax.tree.map(lambda leaf: 2 * leaf, tree)


jitted = jax.jit(doubled)
for words in ("1.0", "2.0", "np.float32(1.0)", "(1.0, 2.0)", "[1.0, 2.0]"):
    value = eval(words)
    with runtime.compilations("doubled") as seen:
        jitted(value)
    print(f"f({words}):".ljust(20), f"type {jax.typeof(jax.tree.leaves(value)[0])}, {len(seen)} new program(s)")

# %% [markdown]
# ## 2 · LabLM as a pure function
#
# Chapter 01's cache grew, an object that changed. XLA wants a function of arrays: weights, tokens and cache in, states
# and the *new* cache out, every shape fixed. So the cache gets room for `max_length` positions at once, and a mask hides
# what is still empty:
#
# $$o = \operatorname{softmax}\!\left(\tfrac{K q}{\sqrt d} + m\right)^{\!\top} V, \qquad
# m_j = \begin{cases} 0 & j \le \text{position} \\ -\infty & j > \text{position} \end{cases}$$
#
# (Vaswani et al. 2017, equation 1, for one query.) The position is an argument: one program serves every position.
# **Tiny numbers:** three slots, of which two are filled.

# %%
keys, values = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]), jnp.array([[10.0], [20.0], [999.0]])
scores = keys @ jnp.array([1.0, 1.0]) / 2**0.5
visible = jnp.arange(3) <= 1
attention = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
print("attention weights:", attention, "  output:", attention @ values)

# %% [markdown]
# ## Exercise 7.2: cached_attention (core)
#
# Write `cached_attention(query, keys, values, position)` for one head in `jnp`: query (head_dim,), keys and values
# (max_length, head_dim), `position` the query's own, a traced number. Slots after it contain arbitrary finite numbers. The check runs it
# compiled, at several positions. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>keys[: position + 1]</code> would have a shape that depends on a value. What did the tiny example do instead?</details>
# <details><summary>Hint 2</summary><code>jnp.where(jnp.arange(len(keys)) <= position, scores, -jnp.inf)</code>, then <code>jax.nn.softmax</code>.</details>


# %%
# EXERCISE cached_attention
def cached_attention(query, keys, values, position):
    """One query over a static cache: (head_dim,)."""
    ### BEGIN SOLUTION
    scores = keys @ query / query.shape[0] ** 0.5
    visible = jnp.arange(len(keys)) <= position
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)) @ values
    ### END SOLUTION


# %%
# CHECK cached_attention
ch07.cached_attention(cached_attention)

# %% [markdown]
# `labutils/xla/llama.py` is the whole decoder in about a hundred lines, on the weights of any Hugging Face Llama
# checkpoint. The layers' weights are stacked along a first axis, (layers, out_features, in_features): section 5 walks
# along it.

# %%
from labutils.xla import llama

MAX_LENGTH = 160
shape = llama.shape_of(model.config, max_length=MAX_LENGTH)
params = llama.params_of(model, shape)
print(shape)
for name in ("q", "k", "down", "mlp_gain"):
    print(f"{name:9} {params['layers'][name].shape}")
print("cache:   ", llama.empty_cache(shape)[0].shape, " keys, and as many values")

# %% [markdown]
# Is it the same model? Feed a text token by token, and hold every logit of every step against torch's. A comparison that
# cannot fail proves nothing, so three bugs are planted as well, each a real one: the two norms swapped; the rotary pairs
# in the *other* common layout (neighbours instead of halves); and the first token at position 1 instead of 0.


# %%
def logits_of_steps(params, ids, shift=0):
    """Logits of every position, one token at a time through the static cache."""
    run = jax.jit(partial(llama.forward, shape=shape))
    cache, rows = llama.empty_cache(shape), []
    for position, token in enumerate(ids):
        hidden, cache = run(params, jnp.array([token]), cache, position + shift)
        rows.append(llama.logits_of(params, hidden, shape)[0])
    return np.stack(rows)


def with_layers(**changed):
    return params | {"layers": params["layers"] | changed}


def other_pairs(name, heads):
    """The rows of a projection as if neighbours (0, 1), (2, 3), … were the pairs."""
    w = params["layers"][name]
    return w.reshape(shape.layers, heads, 2, shape.head_dim // 2, -1).swapaxes(2, 3).reshape(w.shape)


# %%
from labutils.lab.models.compare import held_out_documents

documents = held_out_documents(limit_bytes=1500)
text_ids = tokenizer(tokenizer.bos_token + documents[0].text)["input_ids"][:100]
layers = params["layers"]
bugs = {
    "as it should be": (params, 0),
    "norms swapped": (with_layers(attention_gain=layers["mlp_gain"], mlp_gain=layers["attention_gain"]), 0),
    "rotary pairs": (with_layers(q=other_pairs("q", shape.heads), k=other_pairs("k", shape.kv_heads)), 0),
    "position + 1": (params, 1),
}
with torch.inference_mode():
    wanted = model(input_ids=torch.tensor([text_ids])).logits[0].numpy()
with jax.default_matmul_precision("highest"):  # a TPU would round float32 products to bfloat16 otherwise
    for name, (weights, shift) in bugs.items():
        worst = np.abs(logits_of_steps(weights, text_ids, shift) - wanted).max()
        print(f"{name:16} largest difference in {len(text_ids)} steps: {worst:.1e}, equal to torch: {worst < 1e-4}")

# %% [markdown]
# Rotary embeddings see only *differences* of positions. **Question:** why, then, does it matter that all positions are shifted by one?
#
# <details><summary>Answer</summary>The first token is written into slot 1, so slot 0 stays empty, and the mask (j ≤ position) makes it visible: every
# query gives a share of its attention to a key of zeros.</details>

# %% [markdown]
# ## 3 · Buckets
#
# Prompts have all lengths, and each length would be a program of its own. So prompts are padded on the right to one of a
# few lengths, **buckets**. The padding's keys lie behind the text, where the mask hides them, and the new tokens
# overwrite them. The price: padding is computed like text.
#
# **Tiny numbers:** prompts of 5, 16 and 17 tokens, buckets 16 and 32: two programs instead of three, and
# 16 + 16 + 32 = 64 positions computed for 38 tokens, 41% padding.
#
# ## Exercise 7.3: bucket_for (core)
#
# Write `bucket_for(length, buckets)`: the smallest bucket that holds `length` tokens; the buckets may come in any order. No
# such bucket: raise `ValueError`. 4 lines, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>First collect the buckets that are long enough. Is a text of 16 tokens too long for 16?</details>
# <details><summary>Hint 2</summary><code>fitting = [b for b in buckets if b >= length]</code>; the smallest is <code>min(fitting)</code>.</details>


# %%
# EXERCISE bucket_for
def bucket_for(length, buckets):
    """The smallest bucket that holds a text."""
    ### BEGIN SOLUTION
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise ValueError(f"no bucket of {buckets} holds {length} tokens")
    return min(fitting)
    ### END SOLUTION


# %%
# CHECK bucket_for
ch07.bucket_for(bucket_for)

# %% [markdown]
# Twelve prompts, read once with a program for every length and once with four buckets. **Predict** both counts of
# compilations, and which of the two is faster *the second time* it reads all twelve.

# %%
from labutils.measurement.timing import measure_interleaved, paired_ratio
from labutils.xla.generate import XlaLlama, padding_share

LENGTHS, FOUR = (5, 9, 12, 16, 21, 30, 37, 48, 60, 77, 98, 120), (16, 32, 64, 128)
readers, compile_s = {"each length": LENGTHS, "four buckets": FOUR}, []


def read_all(decoder):
    for length in LENGTHS:
        logits, _ = decoder.read((text_ids * 2)[:length])
    return logits.block_until_ready()


measured = []
for name, buckets in readers.items():
    readers[name] = XlaLlama(model, max_length=MAX_LENGTH, buckets=buckets)
    with runtime.compilations("prefill") as seen:
        read_all(readers[name])
    compile_s += [c.seconds for c in seen]
    measured.append((sum(c.seconds for c in seen), 100 * padding_share(LENGTHS, buckets)))
    print(f"{name:13} {len(seen):2} compilations, {measured[-1][0]:.1f} s, padding {measured[-1][1]:.0f}%")

# %%
from labutils.measurement.threads import thread_count

with thread_count(1):  # as many as XLA uses here
    again = measure_interleaved({n: partial(read_all, d) for n, d in readers.items()}, repeats=7, warmup=1)
print(*again.values(), sep="\n")
longer = paired_ratio(again["four buckets"].samples_s, again["each length"].samples_s)
positions = 1 / (1 - measured[1][1] / 100)
verdict = "less than" if longer.high < positions else "more than" if longer.low > positions else "not told apart from"
print(f"four buckets compute {positions:.2f} times the positions in {longer} the time: {verdict} in proportion")

# %% [markdown]
# Padding need not cost in proportion: a pass has fixed costs, and a matrix that is read for few rows may take more at little cost. Whether it does so
# here, the line above tells by its interval. The second reading compiles nothing, so each prompt pays for its padding alone.
#
# How many buckets are enough? Each number below uses the last of every group of prompts as its bucket, buckets made for these twelve prompts.
# The padding is counted; the compile time is the median of the compilations above, times the number of buckets. The crosses are what was
# measured above, with four powers of two and with a program for each length.

# %%
counts = (1, 2, 3, 4, 6, 12)
shares = [100 * padding_share(LENGTHS, LENGTHS[len(LENGTHS) // n - 1 :: len(LENGTHS) // n]) for n in counts]
seconds = [n * statistics.median(compile_s) for n in counts]
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
axes.plot(seconds, shares, **series_style(0))
for n, x, y in zip(counts, seconds, shares, strict=True):
    axes.annotate(f" {n}", (x, y), xytext=(3, 4), textcoords="offset points")
axes.plot(*zip(*measured, strict=True), "x", color="black", markersize=11, label="measured: 12 lengths, 16 32 64 128")
axes.set(xlabel="compiling prefill (s)", ylabel="padding (% of positions computed)")
axes.margins(0.1)
axes.set_title(f"1 bucket leaves {shares[0]:.0f}% padding, 4 leave {shares[3]:.0f}%, 12 none")
axes.grid(alpha=0.25)
axes.legend()
plt.show()

# %% [markdown]
# *The figure shows padding over compile time for 1 to 12 buckets (the number at each point) and these twelve prompts; crosses: as measured above.*
#
# **Explain.** The first buckets buy most. With a program for every length nothing is padded, and the next unseen length
# compiles again while a user waits. Serving systems compile a few buckets *before* the first request.

# %% [markdown]
# ## 4 · Donation
#
# A pure function returns a *new* cache. Would each token copy it? `donate_argnames="cache"` gives the old one away: the
# program may write the new one into the same memory. The compiled program says how many bytes it reuses.

# %%
for donate in (False, True):
    decoder = XlaLlama(model, max_length=MAX_LENGTH, donate=donate)
    logits, cache = decoder.read(prompt_ids)
    compiled = decoder.step.lower(decoder.params, np.int32(5), cache, np.int32(len(prompt_ids))).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(part.nbytes for part in cache)
    print(f"donate={donate!s:5}  cache {cache_bytes} bytes, reused for the new one: {memory.alias_size_in_bytes}")

decoder.step(decoder.params, np.int32(5), cache, np.int32(len(prompt_ids)))
try:
    print(cache[0] + 1)
except RuntimeError as error:
    print("the old cache afterwards:", str(error).split(".")[0])

# %% [markdown]
# What was given away is gone, and JAX says so instead of handing out rubbish. Forgetting to donate costs a second cache:
# on a device whose memory the cache fills, that is the difference between running and not.

# %% [markdown]
# ## 5 · Loops inside the program
#
# `lax.scan(body, carry, xs, length=…)` is a loop that XLA sees as *one* body and a count:
#
# $$(\text{carry}_{t+1},\; y_t) = \text{body}(\text{carry}_t,\; x_t), \qquad \text{scan returns } (\text{carry}_n,\; [y_0, \dots, y_{n-1}])$$
#
# It serves twice here: over the layers, so that the program holds one layer instead of six; and over the tokens, so that
# Python leaves the decoding loop altogether. **Tiny numbers:** running sums.

# %%
total, sums = jax.lax.scan(lambda carry, x: (carry + x, carry + x), 0, jnp.array([1, 2, 3, 4]))
print("carry at the end:", total, "  stacked:", sums)

# %% [markdown]
# ## Exercise 7.4: decode_scan (core)
#
# Write `decode_scan(step, cache, token, position, new_tokens)`: greedy decoding as one scan. `step(token, cache, position)`
# returns (logits, cache). `token` is the first to be fed; return the `new_tokens` chosen tokens, an int32 array. The check
# looks whether the program grows with `new_tokens`. 6 lines, 12 minutes, difficulty 3 of 3.
#
# (A scan always runs to its end. A loop that may stop at the end-of-text token is `lax.while_loop`, with a condition on the carry.)
#
# <details><summary>Hint 1</summary>The carry is what the next step needs: (token, cache, position). What is stacked is the chosen token.</details>
# <details><summary>Hint 2</summary><code>token = jnp.argmax(logits).astype(jnp.int32)</code>; the body returns <code>(token, cache, position + 1), token</code>; there are no xs: <code>jax.lax.scan(body, (token, cache, position), length=new_tokens)</code>.</details>


# %%
# EXERCISE decode_scan
def decode_scan(step, cache, token, position, new_tokens):
    """Greedy tokens, chosen inside one program."""

    ### BEGIN SOLUTION
    def body(carry, _):
        token, cache, position = carry
        logits, cache = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position + 1), token

    _, tokens = jax.lax.scan(body, (token, cache, position), length=new_tokens)
    return tokens
    ### END SOLUTION


# %%
# CHECK decode_scan
ch07.decode_scan(decode_scan)

# %% [markdown]
# Compiling takes seconds, so a compiled decoder begins with a delay. If each token saves some time, after how many does it break even?
#
# ## Exercise 7.5: break_even_tokens
#
# Write `break_even_tokens(compile_s, slow_token_s, fast_token_s)`: how many tokens until the compiled way, with its
# compilation, is as fast as the other. `float("inf")` where it never is. **Tiny numbers:** 3 s, and 20 ms against 10 ms a
# token: 300 tokens. 3 lines, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>How much does one token save?</details>
# <details><summary>Hint 2</summary><code>compile_s / (slow_token_s - fast_token_s)</code>, if that difference is positive.</details>


# %%
# EXERCISE break_even_tokens
def break_even_tokens(compile_s, slow_token_s, fast_token_s):
    """Tokens until compilation has paid for itself."""
    ### BEGIN SOLUTION
    saved_s = slow_token_s - fast_token_s
    return compile_s / saved_s if saved_s > 0 else float("inf")
    ### END SOLUTION


# %%
# CHECK break_even_tokens
ch07.break_even_tokens(break_even_tokens)

# %% [markdown]
# **Predict, then measure:** torch as chapter 01 left it (a static cache), the course's own decoder in NumPy (`FastLlama`, chapter 01), one jitted
# step called from Python, and the whole loop as one program. All on one thread, interleaved, the same prompt and the same 64 greedy tokens. First
# calls compile, so they are timed apart, on three fresh decoders of each kind in turns. (`python -m labutils bench xla` adds compiled torch,
# which takes a minute.)

# %%
my_gain = predict("tokens/s of the whole loop as one program over eager torch", None, unit="times")

# %%
from labutils.generation.decode import generate_static
from labutils.generation.fast_llama import FastLlama

NEW_TOKENS, prompt = 64, torch.tensor([prompt_ids])
fast, shared = FastLlama(model, max_length=MAX_LENGTH), llama.params_of(model, shape)


def fresh(whole):
    """A decoder that has compiled nothing, as a function that generates."""
    decoder = XlaLlama(model, max_length=MAX_LENGTH, params=shared)
    return lambda: decoder.generate(prompt_ids, NEW_TOKENS, in_one_program=whole)


def seconds_of(generate):
    start = time.perf_counter()
    generate()
    return time.perf_counter() - start


ways = {
    "eager torch": lambda: generate_static(model, prompt, NEW_TOKENS)[0, len(prompt_ids) :].tolist(),
    "plain NumPy": lambda: fast.generate(prompt, NEW_TOKENS)[0, len(prompt_ids) :].tolist(),
    "jitted step": fresh(False),
    "scanned loop": fresh(True),
}

# %%
with thread_count(1):
    tokens = {name: generate() for name, generate in ways.items()}  # JAX's own first start is in none of the times
    first_s = {name: [] for name in ("jitted step", "scanned loop")}
    for _ in range(3):
        for name, samples in first_s.items():
            samples.append(seconds_of(fresh(name == "scanned loop")))
    runs = measure_interleaved(ways, repeats=7, warmup=1)
print("same tokens:", all(found == tokens["eager torch"] for found in tokens.values()))
for run in runs.values():
    ratio = paired_ratio(runs["eager torch"].samples_s, run.samples_s)
    print(run)
    print(f"    {NEW_TOKENS / run.median_s:.0f} tokens/s, {ratio} as fast as eager torch")
my_gain.compare(ratio.value)  # the last one's, the scanned loop's

# %%
from labutils.xla import hlo

token_s = {name: run.median_s / NEW_TOKENS for name, run in runs.items()}
compile_s, paid = {}, {}
for name, samples in first_s.items():
    compile_s[name] = [max(seconds - runs[name].median_s, 0.0) for seconds in sorted(samples)]
    paid[name] = [hlo.break_even_tokens(s, token_s["eager torch"], token_s[name]) for s in compile_s[name]]
    spread = ", ".join(f"{seconds:.2f}" for seconds in compile_s[name])
    print(
        f"{name}: first calls {spread} s longer; breaks even after", ", ".join(f"{n:.0f}" for n in paid[name]), "tokens"
    )

# %%
reach = [n for numbers in paid.values() for n in numbers if np.isfinite(n)]
counts = np.linspace(0, 2 * max([*reach, 200]), 50)
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for index, name in enumerate(runs):
    colour = series_style(index)["color"]
    shortest, middle, longest = compile_s.get(name, [0.0] * 3)
    axes.plot(
        counts, middle + counts * token_s[name], label=name, color=colour, linestyle=("-", ":", "--", "-.")[index]
    )
    if name in paid:
        axes.fill_between(counts, *(s + counts * token_s[name] for s in (shortest, longest)), color=colour, alpha=0.2)
best = min(paid, key=lambda name: paid[name][1])
title = f"{best}: breaks even after {paid[best][0]:.0f} to {paid[best][-1]:.0f} tokens"
axes.set_title(title if np.isfinite(paid[best][-1]) else "Compilation does not pay here")
axes.set(xlabel="tokens generated since the program started", ylabel="time, compilation included (s)")
axes.grid(alpha=0.25)
axes.legend()
plt.show()

# %% [markdown]
# *Computed from the times above: how long it takes to generate so many tokens, compilation included (lines: median of three compilations; bands: all
# three). Where a line crosses that of eager torch, compilation has paid for itself. Measured: one thread, float32, batch 1.*
#
# **Explain.** LabLM is tiny: much of an eager step is Python starting small operations, and that is what compilation
# removes. So does a plain decoder with few calls a layer, and it compiles nothing: compare the two lines before you praise the compiler. The larger
# the matrices, the less there is to remove; what remains then is fusion, and memory not copied. The command above runs a random model of 0.2 billion
# weights as well, whose decoding waits for memory: see whether compilation pays for itself there at all.
#
# The delay need not be paid at every start: a **persistent compilation cache** keeps programs on disk, under a key of the program, the compiler and the
# flags. It takes one line, and another that asks it to keep small programs, too.

# %%
import contextlib
import tempfile

from jax.experimental.compilation_cache import compilation_cache

with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as settings:
    for name, value in (("compilation_cache_dir", folder), ("persistent_cache_min_compile_time_secs", 0.0)):
        before = getattr(jax.config, f"jax_{name}")
        jax.config.update(f"jax_{name}", value)
        settings.callback(jax.config.update, f"jax_{name}", before)
    compilation_cache.reset_cache()  # so that it looks at the settings anew
    with thread_count(1):
        cold, warm = seconds_of(fresh(True)), seconds_of(fresh(True))
    kept = [path.stat().st_size for path in Path(folder).iterdir()]
print(f"first call {cold:.2f} s; from the cache on disk {warm:.2f} s; {len(kept)} files, {sum(kept) / 1e6:.1f} MB")
compilation_cache.reset_cache()

# %% [markdown]
# ## 6 · Reading what XLA made
#
# The program that XLA runs can be read. Below, a product with what follows it: `fusion` means that several operations
# became one instruction. **Question:** where did `tanh` and the addition go, and is the product's result stored in between?

# %%
tiny = jax.jit(lambda x, w, b: jnp.tanh(x @ w + b))
text = tiny.lower(jnp.ones((4, 64)), jnp.ones((64, 32)), jnp.ones(32)).compile().as_text()
for line in text[text.index("ENTRY") :].splitlines():
    print(line.split(", metadata")[0].split(", backend_config")[0][:118])

# %% [markdown]
# Look at the instructions' names. An instruction's result is stored, what happens inside it is not. Where the product is an instruction of its own, it
# went to a library of kernels, and its result is stored before one fusion adds and takes the tanh; in a single fusion nothing is stored in between.
#
# Now LabLM's step, with the layers in a scan and unrolled. `cost_analysis()` is the compiler's own count of operations.
#
# **Predict:** by hand, one token through the layers' matrices costs 2 FLOP a weight. Which of the two programs will
# report about that number?

# %%
body = sum(params["layers"][name].size for name in llama.MATRICES)
costs, texts = {}, {}
for name, unroll in (("scan", False), ("unrolled", True)):
    run = jax.jit(partial(llama.forward, shape=shape, unroll=unroll))
    start = time.perf_counter()
    compiled = run.lower(params, jnp.zeros(1, jnp.int32), llama.empty_cache(shape), 0).compile()
    seconds = time.perf_counter() - start
    costs[name], texts[name] = hlo.cost_of(compiled), compiled.as_text()
    print(
        f"{name:9} {costs[name].instructions:5} instructions, compiled in {seconds:.2f} s, {costs[name].flop / 1e6:6.2f} MFLOP"
    )
print(f"by hand, matrices only: {2 * body / 1e6:.2f} MFLOP; scan's loop runs {hlo.trip_counts(texts['scan'])} times")

# %% [markdown]
# **The trap.** The same work, and one count is about a sixth of the other: `cost_analysis` counts the body of a loop
# **once**. Every figure built on it (utilisation, "FLOP per second") would be wrong by the number of layers. The HLO of
# the scan does say how often its loop runs, but the count ignores it.
#
# ## Exercise 7.6: total_flop
#
# A repair that needs no reading: compile *unrolled* models of one and of two layers, and extrapolate. Write
# `total_flop(one_layer, two_layers, layers)` from those two counts. Something (embedding, output layer) stands
# outside the layers and counts once. **Tiny numbers:** 15 and 25, six layers: 65. 1 line, 5 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What does the second layer add?</details>
# <details><summary>Hint 2</summary>The first count holds one layer and the rest; each further layer adds <code>two_layers - one_layer</code>.</details>


# %%
# EXERCISE total_flop
def total_flop(one_layer, two_layers, layers):
    """FLOP of a model of `layers` layers, from two small ones."""
    ### BEGIN SOLUTION
    return one_layer + (layers - 1) * (two_layers - one_layer)
    ### END SOLUTION


# %%
# CHECK total_flop
ch07.total_flop(total_flop)

# %%
import dataclasses

from labutils.xla import generate


def counted_flop(layers):
    """The compiler's count of one decoding step of LabLM's first layers, unrolled, output layer included."""
    cut = dataclasses.replace(shape, layers=layers)
    few = params | {"layers": {name: w[:layers] for name, w in params["layers"].items()}}

    def step(params, token, cache):
        hidden, _ = llama.forward(params, token, cache, 0, shape=cut, unroll=True)
        return llama.logits_of(params, hidden, cut)

    compiled = jax.jit(step).lower(few, jnp.zeros(1, jnp.int32), llama.empty_cache(cut)).compile()
    return hlo.cost_of(compiled).flop


one, two, six = (counted_flop(layers) for layers in (1, 2, shape.layers))
print(
    f"1 layer {one / 1e6:.2f}, 2 layers {two / 1e6:.2f} MFLOP: extrapolated {hlo.total_flop(one, two, shape.layers) / 1e6:.2f}"
)
print(f"all {shape.layers} unrolled: {six / 1e6:.2f} MFLOP")

# %% [markdown]
# ## 7 · The matrix unit
#
# A TPU multiplies in a **systolic array**: 128 × 128 cells (TPU v5e), each holding one weight. A row of the input enters
# from the left, one cell further each cycle; partial sums fall down and leave below (Jouppi et al. 2017,
# arXiv:1704.04760). Before the first row the tile of weights must be loaded, and after the last the array must drain:
#
# $$\text{cycles} = \left\lceil\tfrac{\text{inner}}{s}\right\rceil \left\lceil\tfrac{\text{columns}}{s}\right\rceil
# (s + \text{rows} + 2s - 2), \qquad
# \text{utilisation} = \frac{\text{rows} \cdot \text{inner} \cdot \text{columns}}{s^2 \cdot \text{cycles}}$$
#
# **Tiny numbers:** a 2 × 2 array, one row: 2 cycles to load, 1 + 2 to stream; 4 products in 4 · 5 cell-cycles: 20%.

# %%
from labutils.xla import systolic

run = systolic.simulate_array(np.array([[3, 4]]), np.array([[1, 2], [10, 20]]), size=2)
print(
    f"simulated: {run.product.tolist()}, {run.cycles} cycles, {run.busy} cell-cycles of work, {run.utilisation(2):.0%}"
)

# %% [markdown]
# ## Exercise 7.7: mxu_utilisation (core)
#
# Write `mxu_utilisation(rows, inner, columns, size)`: the formula above for a size × size array. A multiply-and-add counts
# as one. 3 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary><code>math.ceil</code> rounds up: a matrix of 130 columns needs two tiles of 128.</details>
# <details><summary>Hint 2</summary>cycles = tiles · (3·size + rows − 2).</details>


# %%
# EXERCISE mxu_utilisation
def mxu_utilisation(rows, inner, columns, size):
    """Share of the array's cells and cycles that do work somebody asked for."""
    ### BEGIN SOLUTION
    tiles = math.ceil(inner / size) * math.ceil(columns / size)
    cycles = tiles * (size + rows + 2 * size - 2)
    return rows * inner * columns / (size**2 * cycles)
    ### END SOLUTION


# %%
# CHECK mxu_utilisation
from labutils.course.checks import ch07_device

ch07_device.mxu_utilisation(mxu_utilisation)

# %% [markdown]
# **Predict:** how busy is the array while LabLM decodes one text (one row), and while it reads a prompt of 256 rows? The
# lines are the formula, the crosses a simulation that moves every number cell by cycle.

# %%
my_share = predict("share of a matrix unit that one row keeps busy", None, unit="%")

# %%
inputs, runs_of_q = np.random.default_rng(0), {}
for rows in (1, 16, 64):
    x, w = inputs.integers(-128, 128, (rows, 256)), inputs.integers(-128, 128, (256, 256))
    run = runs_of_q[rows] = systolic.simulate_array(x, w, size=128)
    formula = systolic.mxu_utilisation(rows, 256, 256)
    print(f"rows {rows:2}, q: simulated {run.utilisation(128):.2%}, formula {formula:.2%}", end=", ")
    print("exact:", (run.product == x @ w).all())

# %%
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
products = {
    "q (256 × 256)": (256, 256),
    "just over one tile (130 × 130)": (130, 130),
    "a head's keys (64 × 160)": (64, 160),
}
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for index, (name, sizes) in enumerate(products.items()):
    axes.plot(ROWS, [100 * systolic.mxu_utilisation(r, *sizes) for r in ROWS], label=name, **series_style(index))
found = [100 * run.utilisation(128) for run in runs_of_q.values()]
axes.plot(list(runs_of_q), found, "x", color="black", markersize=11, label="simulated, q")
least, most = (systolic.mxu_utilisation(rows, 256, 256) for rows in (1, 4096))
axes.set(xscale="log", yscale="log", xlabel="rows in one product (tokens in the pass)", ylabel="utilisation (%)")
axes.set_xticks(ROWS, [str(rows) for rows in ROWS], minor=False)
axes.set_title(f"One row keeps {least:.1%} of the array busy, 4096 rows {most:.0%}")
axes.grid(alpha=0.25, which="both")
axes.legend()
plt.show()
my_share.compare(100 * least)

# %% [markdown]
# *Computed and simulated, not measured on a TPU: the share of a 128 × 128 array's work that was asked for.*
#
# **Explain.** Decoding one text starves a matrix unit: the array loads a tile, uses it for one row, and loads the next.
# More rows (a batch, a prompt, speculation) cost almost nothing until the array is full. A narrow product, such as one
# head's keys, never fills it: 64 of 128 cells in one direction are padding; nor does 130, which pays for 256. Real units load the next tile while
# they work, which helps from about 128 rows on.

# %% [markdown]
# A starved unit is half of the story: the weights also have to come from memory (HBM). A product of B rows in bfloat16 does 2B FLOP for each weight of
# 2 bytes, an intensity of B FLOP/byte, and chapter 01's roofline says what that allows:
#
# $$\text{FLOP/s} \le \min(\text{peak},\; B \cdot \text{bandwidth})$$
#
# Peak in bfloat16 and HBM bandwidth of four generations, as Google documents them (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x): v5e 197 TFLOP/s and
# 819 GB/s, v5p 459 and 2765, v6e 918 and 1638, TPU7x (Ironwood) 2307 and 7380. **Predict:** how many rows does each need until memory is no longer the limit?

# %%
my_rows = predict("rows that a TPU v5e needs until memory is no longer the limit", None, unit="rows")

# %%
CHIPS = {"v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1638), "TPU7x": (2307, 7380)}  # TFLOP/s, GB/s
batch = 2.0 ** np.arange(0, 13)
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for index, (chip, (peak, bandwidth)) in enumerate(CHIPS.items()):
    axes.plot(batch, np.minimum(peak, batch * bandwidth / 1e3), label=chip, **series_style(index))
    ridge = 1e3 * peak / bandwidth
    print(
        f"{chip:6} ridge at {ridge:.0f} rows; one row: {bandwidth / 1e3:.1f} TFLOP/s, {1 / ridge:.2%} of the peak",
        end="; ",
    )
    print(f"7 billion weights in bfloat16, one text: at most {bandwidth / 14:.0f} tokens/s")
rows_needed = [1e3 * peak / bandwidth for peak, bandwidth in CHIPS.values()]
axes.set(xscale="log", yscale="log", xlabel="rows in one product (texts decoded together)", ylabel="TFLOP/s at most")
axes.set_xticks(batch[::2], [f"{rows:.0f}" for rows in batch[::2]], minor=False)
axes.set_title(f"Decoding leaves the memory roof at {min(rows_needed):.0f} to {max(rows_needed):.0f} rows, by chip")
axes.grid(alpha=0.25, which="both")
axes.legend()
plt.show()
my_rows.compare(rows_needed[0])

# %% [markdown]
# *From the documented peaks and bandwidths, not measured: what memory and matrix units allow for products of B rows, weights in bfloat16. Slanted: waiting
# for memory. Flat: the matrix units are full.*
#
# **Explain.** A newer chip is not faster for one text by its FLOP/s, but by its bandwidth, and the batch that fills it follows from their ratio.
#
# Memory is tiled as well. A vector register holds 8 × 128 numbers of 4 bytes, so a full tile is 8 × 128 in float32,
# 16 × 128 in bfloat16, 32 × 128 in int8, and shapes are rounded up to whole tiles. **Question:** what does one row of 300
# numbers take up in each?

# %%
for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
    padded = systolic.padded_shape(1, 300, size)
    print(f"{name:9} tile {systolic.tile_of(size)}, (1, 300) becomes {padded}: {300 / math.prod(padded):.1%} is used")

# %% [markdown]
# The unit multiplies bfloat16 (8 bits of precision) and adds in float32; int8 it adds in int32. The precision of the *sum*
# matters more than the precision of the factors. 4096 products of numbers near 1, three ways:

# %%
x = jnp.asarray(inputs.uniform(0.5, 1.5, 4096), jnp.bfloat16)
exact = float(np.sum(np.asarray(x, np.float64) ** 2))
wide = float(jnp.dot(x, x, preferred_element_type=jnp.float32))
narrow = float(jax.lax.scan(lambda total, v: (total + v * v, None), jnp.bfloat16(0), x)[0])
codes = jnp.asarray(inputs.integers(-127, 128, 4096), jnp.int8)
print(f"exact {exact:.1f}; bfloat16 products, float32 sum: {wide:.1f}; bfloat16 sum: {narrow:.1f}")
sums = int(jnp.dot(codes, codes, preferred_element_type=jnp.int32)), int(jnp.dot(codes, codes))
print(f"int8 products: int32 sum {sums[0]}, int8 sum {sums[1]}")

# %% [markdown]
# A sum in bfloat16 stops growing once the next product is less than half its last bit; a sum in int8 wraps round.
#
# Does low precision make *this* machine faster? **Predict**, then measure the same product in three dtypes. A TPU has a
# unit for it; what does your CPU have?

# %%
dtypes = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}
small = {}
for name, sum_type in dtypes.items():
    x = jnp.asarray(inputs.integers(-3, 4, (512, 512)), name)
    product = jax.jit(partial(jnp.dot, preferred_element_type=sum_type))
    small[name] = lambda product=product, x=x: product(x, x).block_until_ready()
with thread_count(1):
    timings = measure_interleaved(small, repeats=7, warmup=2)
print(*timings.values(), sep="\n")
print("this CPU's units for vectors and low precision:", ", ".join(cpu_units()) or "unknown")
for name in ("bfloat16", "int8"):
    ratio = paired_ratio(timings[name].samples_s, timings["float32"].samples_s)
    verdict = "faster" if ratio.high < 1 else "slower" if ratio.low > 1 else "not told apart"
    print(f"{name} takes {ratio} the time of float32: {verdict}")

# %% [markdown]
# **Explain.** A narrow dtype is not faster by itself: something must multiply it. XLA hands such products to kernels for what the CPU has. Look for
# three names in the list above: `avx512_vnni` (vector instructions for int8), `avx512_bf16` (the same for bfloat16) and `amx` (a small matrix unit
# for both). Without one of them, the numbers have to be widened before they are multiplied, and that is work which float32 is spared. Chapter 03
# measures torch's eager layers, other kernels on the same numbers.

# %% [markdown]
# ## 8 · A kernel of your own
#
# XLA has no product that fits every need, so **Pallas** lets you write one: a Python function over *blocks*. The grid
# below has three axes: i walks the result's rows of blocks, j its columns, and k, innermost, the blocks of the sum.
#
# $$\text{out}_{ij} = \sum_k x_{ik}\, w_{kj}$$
#
# Each step gets one block of x, w and the result in fast memory (VMEM); while it works, the next blocks are on their way.
# Nothing here needs a TPU: two interpreters run the kernel, one plainly, one simulating a TPU's memory.
#
# **A first kernel** adds one. It gets **Refs**, views of the blocks in fast memory, and returns nothing: it writes. The *grid* says how many steps there
# are, a *BlockSpec* the shape of a block and which block belongs to step i.


# %%
def add_one(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1


block = pl.BlockSpec((2, 4), lambda i: (i, 0))  # step i: rows 2i and 2i + 1
x = jnp.arange(24, dtype=jnp.int32).reshape(6, 4)
settings = {"grid": (3,), "in_specs": [block], "out_specs": block, "interpret": True}
added = pl.pallas_call(add_one, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), **settings)(x)
print(f"{settings['grid'][0]} steps of (2, 4); right: {(added == x + 1).all()}; last row {added[-1]}")

# %% [markdown]
# ## Exercise 7.8: block_indices
#
# Write `block_indices(i, j, k)`: three pairs, the (row, column) of the block of x (rows, inner), of w (inner, columns),
# and of the result (rows, columns). 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>The formula's indices are the answer.</details>
# <details><summary>Hint 2</summary>x's is <code>(i, k)</code>.</details>


# %%
# EXERCISE block_indices
def block_indices(i, j, k):
    """Which blocks of x, w and the result step (i, j, k) works on."""
    ### BEGIN SOLUTION
    return (i, k), (k, j), (i, j)
    ### END SOLUTION


# %%
# CHECK block_indices
ch07_device.block_indices(block_indices)

# %% [markdown]
# ## Exercise 7.9: matmul_kernel
#
# Write the kernel. `x_ref` (rows, inner) and `w_ref` (inner, columns) hold int8 blocks, `out_ref` and `sums_ref`
# (rows, columns) int32; `ref[...]` reads, `ref[...] = …` writes. `sums_ref` keeps its content from step to step and begins
# with **rubbish**. Clear it at the first step along k, add the block's product, and write to `out_ref` at the last.
# 7 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary><code>pl.program_id(2)</code> is k, <code>pl.num_programs(2)</code> how many there are. Python's <code>if</code> cannot ask a traced number: <code>@pl.when(condition)</code> above a little function runs it where the condition holds.</details>
# <details><summary>Hint 2</summary><code>sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)</code></details>


# %%
# EXERCISE matmul_kernel
def matmul_kernel(x_ref, w_ref, out_ref, sums_ref):
    """One step of an int8 product summed in int32."""

    ### BEGIN SOLUTION
    @pl.when(pl.program_id(2) == 0)
    def _clear():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _write():
        out_ref[...] = sums_ref[...]

    ### END SOLUTION


# %%
# CHECK matmul_kernel
ch07_device.matmul_kernel(matmul_kernel)

# %% [markdown]
# `labutils.xla.pallas_matmul` puts kernel, blocks and grid together. A grid axis may be declared *parallel*: its steps may
# then run on different cores. The simulated TPU has two (so have v5p and TPU7x; v5e and v6e have one), and can watch for **races**: two cores touching
# the same memory with nothing to say who comes first. **Predict:** which of the three axes must not be parallel?

# %%
from jax.experimental.pallas import tpu as pltpu

from labutils.xla import pallas_matmul

x = jnp.asarray(inputs.integers(-128, 128, (64, 384)), jnp.int8)
w = jnp.asarray(inputs.integers(-128, 128, (384, 128)), jnp.int8)
exact = np.asarray(x, np.int64) @ np.asarray(w, np.int64)
product = partial(pallas_matmul.int8_matmul, x, w, blocks=(32, 128, 128))
for name, interpret in (("plain", True), ("simulated memory", pltpu.InterpretParams())):
    print(f"interpreter, {name}: exact {(np.asarray(product(interpret=interpret)) == exact).all()}", end="; ")
    small = pallas_matmul.int8_matmul(x, w, blocks=(64, 64, 64), interpret=interpret)
    print(f"blocks of 64 × 64: {(np.asarray(small) == exact).all()}")
for parallel in ((True, True, False), (True, True, True)):
    narrow = partial(pallas_matmul.int8_matmul, x[:32], w, blocks=(32, 128, 128), parallel=parallel)
    result, raced = pallas_matmul.races(narrow, cores=2)
    print(f"parallel (i, j, k) = {parallel}: race found {raced}, exact {(np.asarray(result) == exact[:32]).all()}")

# %% [markdown]
# The sum's axis: two cores, each with sums of its own, write the same block of the result. On one core it would have
# worked by luck.
#
# `int8_matmul` refuses sizes that are no multiple of the blocks. A ragged block would hold rubbish in its gap, and the two interpreters choose
# different rubbish: for int32 the plain one the smallest number, the simulated memory the largest. Two of the smallest cancel in a sum, so a wrong
# kernel may look right in the plain interpreter. Test in both.
#
# ## Exercise 7.10: vmem_bytes
#
# A TPU v5e gives a kernel 16 MiB of VMEM by default. Write `vmem_bytes(rows, columns, inner)` for blocks of that size: the
# blocks of x and w (int8) and of the result (int32) are there **twice**, one in use and one on its way; the sums (int32)
# once. 2 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>x's block has rows · inner numbers of 1 byte. How many bytes has the result's?</details>
# <details><summary>Hint 2</summary>2·(rows·inner + inner·columns + 4·rows·columns) + 4·rows·columns.</details>


# %%
# EXERCISE vmem_bytes
def vmem_bytes(rows, columns, inner):
    """Fast memory that the kernel needs."""
    ### BEGIN SOLUTION
    blocks = rows * inner + inner * columns + 4 * rows * columns
    return 2 * blocks + 4 * rows * columns
    ### END SOLUTION


# %%
# CHECK vmem_bytes
ch07_device.vmem_bytes(vmem_bytes)

# %% [markdown]
# What people write kernels for is **attention**. Decoding reads the whole cache for one query. A kernel takes the cache block by block and keeps three things
# in fast memory: the largest score m so far, the sum s of the exponentials, and the values weighted by them, a. A block with scores $x_j$ and values $v_j$ changes them to
#
# $$m' = \max(m, \max_j x_j), \quad s' = e^{m - m'} s + \sum_j e^{x_j - m'}, \quad a' = e^{m - m'} a + \sum_j e^{x_j - m'} v_j$$
#
# and a / s is attention at the end (Dao et al. 2022, arXiv:2205.14135; split over blocks of keys for decoding: Flash-Decoding, 2023). No vector of all
# scores is ever stored, and blocks behind the position are skipped.

# %%
BLOCK = 32


def decode_attention_kernel(position_ref, query_ref, keys_ref, values_ref, out_ref, top_ref, sum_ref, weighted_ref):
    block, position = pl.program_id(0), position_ref[0]

    @pl.when(block == 0)
    def _clear():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...], weighted_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(weighted_ref)

    @pl.when(block * BLOCK <= position)
    def _add():
        scores = query_ref[...] @ keys_ref[...].T / query_ref.shape[1] ** 0.5  # (1, BLOCK)
        at = block * BLOCK + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(at <= position, scores, -jnp.inf)
        top = jnp.maximum(top_ref[...], scores.max())
        old, new = jnp.exp(top_ref[...] - top), jnp.exp(scores - top)
        top_ref[...], sum_ref[...] = top, old * sum_ref[...] + new.sum()
        weighted_ref[...] = old * weighted_ref[...] + new @ values_ref[...]

    @pl.when(block == pl.num_programs(0) - 1)
    def _write():
        out_ref[...] = weighted_ref[...] / sum_ref[...]


# %%
def decode_attention(query, keys, values, position, interpret=True):
    """One query (head_dim,) over a static cache (max_length, head_dim), block by block."""
    row, cache = pl.BlockSpec((1, 64), lambda i: (0, 0)), pl.BlockSpec((BLOCK, 64), lambda i: (i, 0))
    scalar = pl.BlockSpec((1,), lambda i: (0,), memory_space=pltpu.SMEM)
    result = pl.pallas_call(
        decode_attention_kernel,
        out_shape=jax.ShapeDtypeStruct((1, 64), jnp.float32),
        grid=(len(keys) // BLOCK,),
        in_specs=[scalar, row, cache, cache],
        out_specs=row,
        scratch_shapes=[
            pltpu.VMEM((1, 1), jnp.float32),
            pltpu.VMEM((1, 1), jnp.float32),
            pltpu.VMEM((1, 64), jnp.float32),
        ],
        interpret=interpret,
    )(jnp.array([position], jnp.int32), query[None], keys, values)
    return result[0]


query, (keys, values) = (
    jnp.asarray(inputs.normal(size=64), "float32"),
    jnp.asarray(inputs.normal(size=(2, 160, 64)), "float32"),
)
for name, interpret in (("plain", True), ("simulated memory", pltpu.InterpretParams())):
    worst = max(
        np.abs(decode_attention(query, keys, values, at, interpret) - cached_attention(query, keys, values, at)).max()
        for at in (0, 31, 32, 100, 159)
    )
    print(f"interpreter, {name}: largest difference from your cached_attention at five positions {worst:.1e}")

# %% [markdown]
# ## 9 · The real compiler, without a TPU
#
# Google's TPU compiler is a library, `libtpu` (Linux on x86-64, 0.2 GB, under its own terms, so never part of this
# course). It compiles for a TPU that is only *described*. If you have installed it (`pip install "jax[tpu]"`), the next
# cell runs it, in a process of its own; otherwise it shows what it said to us, saved in
# `data/results/tpu_compiler.json`.
#
# **Predict:** which of these four block sizes does it refuse, and with which number of MiB?

# %%
from labutils.lab.paths import DATA
from labutils.xla import tpu_compiler

saved = json.loads((DATA / "results" / "tpu_compiler.json").read_text(encoding="utf-8"))
report = tpu_compiler.report_from_compiler() if tpu_compiler.can_compile() else saved
print("compiled just now" if report is not saved else "saved earlier", "for", report["topology"], report["versions"])
for kernel in report["kernels"]:
    needed = pallas_matmul.vmem_bytes(tuple(kernel["blocks"])) / 2**20
    print(f"blocks {kernel['blocks']}, predicted {needed:6.2f} MiB: {'refused' if kernel['refused'] else 'compiled'}")
    print(f"    {kernel['refused'][:150]}" if kernel["refused"] else "    fits")

# %% [markdown]
# The compiler refuses blocks that an interpreter accepts: an interpreter checks your arithmetic, not the hardware's
# rules. And VMEM overflows by exactly the bytes that exercise 7.10 predicts; halving the blocks cures it.
#
# Now its layouts, and its own estimate of cycles for a product (rows × 1024) · (1024 × 1024).
# **Question:** which tile does it choose for one row, and which for 1024? Which unit does a row need?

# %%
SHORT = {"float32": "f32", "bfloat16": "bf16", "int8": "s8"}
print(f"{'x':38} {'cycles estimated':>16} {'a row':>7} {'formula, 4 units':>17}  runs as, fetched apart")
for product in (p for p in report["products"] if p["rows"] in (1, 2, 8, 1024)):
    wanted = f"{SHORT[product['dtype']]}[{product['rows']},1024]"
    layout = next(text for text in product["layouts"] if text.startswith(wanted))
    each = product["cycles"] / product["rows"]
    formula = systolic.array_cycles(product["rows"], 1024, 1024) / 4
    print(f"{layout:38} {product['cycles']:16} {each:7.0f} {formula:17.0f}", end="  ")
    print(f"{product['operations']}, {product['fetched'] or 'nothing'}")
print(
    f"w in float32, {2**22 / 2**20:.0f} MiB, from v5e's memory: {1e6 * 2**22 / (CHIPS['v5e'][1] * 1e9):.1f} µs at best"
)

# %% [markdown]
# `T(8,128)` is the tile; a second pair such as `(4,1)` says that four int8 rows share a 4-byte word. For one row the
# compiler takes a thinner tile than the full one: our table in section 7 was the upper limit. The cycles are the
# compiler's estimate, not a time. The formula counts one matrix unit, of which a v5e core has four (docs.cloud.google.com/tpu/docs/v5e), so it is divided
# by four; and it loads each tile *before* the rows, which a real unit does meanwhile.
#
# Two rows cost less *in all* than one, which no formula for one unit explains. The last column does. For one row the compiled program holds no matrix
# product: it is a `multiply` and a `reduce`, work for the **vector unit**, and hardly cheaper with narrower weights. From two rows on it is a
# `convolution`, which is how this compiler writes a product for the **matrix unit**. So a batch of one is the only one that misses the matrix unit.
#
# What the column does not contain: the programs of two rows and more fetch w, or the larger x, in an operation of its own (`copy-start`), for which
# the compiler gives no estimate. By section 7's bandwidth that alone takes the time in the last line, whichever unit multiplies.

# %% [markdown]
# ## 10 · One artefact, two platforms
#
# `jax.export` writes the *traced* program (StableHLO) with the platforms it may run on; the weights stay outside. It needs
# none of the platforms at hand. Loaded, it is compiled for the machine that loads it; for any other it must refuse.

# %%
from labutils.xla import exporting

step = jax.jit(partial(generate.decode_one_token, shape=shape))
arguments = (params, jnp.int32(prompt_ids[0]), llama.empty_cache(shape), jnp.int32(0))
artefact = exporting.export_bytes(step, *arguments, platforms=("tpu", "cpu"))
logits, _ = exporting.load_exported(artefact)(*arguments)
print(
    f"{len(artefact)} bytes for tpu and cpu; run here, largest difference {np.abs(logits - step(*arguments)[0]).max():.1e}"
)
for_tpu = exporting.export_bytes(step, *arguments, platforms=("tpu",))
try:
    exporting.load_exported(for_tpu, platform="cpu")
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ## 11 · Weights over a mesh
#
# Chapter 09 writes tensor parallelism by hand. With XLA you only say *where each array lies*, and the compiler adds the
# communication. A matrix (out_features, in_features) can be cut along its outputs (each device computes some of the
# result) or along its inputs (each device computes a part of *every* result, so an **all-reduce** must add the parts up and give the sum to all).
#
# JAX's words for it: a `Mesh` names the axes of a grid of devices; a `PartitionSpec`, usually imported as `P`, says for each axis of an array which axis of
# the mesh cuts it (`None`: whole on every device); a `NamedSharding` is the two together. Two layers, three ways: `jit` is told where the arrays lie and
# adds the communication (XLA's partitioner, Shardy); `shard_map` runs *your* function on each device's part, and you write the sum; **explicit** sharding
# makes the layout part of an array's type.

# %%
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pair = devices[:2] if len(devices) > 1 else jax.devices("cpu")[:2]  # a single chip: simulated devices once more
auto = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=pair)
layouts = (P(), P("model", None), P(None, "model"))  # x whole; up along its outputs; down along its inputs
arrays = [jnp.asarray(inputs.normal(size=size), "float32") for size in ((4, 256), (768, 256), (256, 768))]
placed = [jax.device_put(a, NamedSharding(auto, layout)) for a, layout in zip(arrays, layouts, strict=True)]


def two_layers(x, up, down):
    return jax.nn.relu(x @ up.T) @ down.T


by_parts = jax.shard_map(
    lambda *parts: jax.lax.psum(two_layers(*parts), "model"), mesh=auto, in_specs=layouts, out_specs=P()
)
for name, function in (("jit", two_layers), ("shard_map", by_parts)):
    compiled = jax.jit(function).lower(*placed).compile()
    off = np.abs(np.asarray(compiled(*placed)) - np.asarray(two_layers(*arrays))).max()
    print(f"{name:10}{dict(hlo.collectives(compiled.as_text()))}, largest difference from one device {off:.0e}")

# %%
explicit = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,), devices=pair)
with jax.set_mesh(explicit):
    x, up, down = (jax.device_put(a, layout) for a, layout in zip(arrays, layouts, strict=True))
    hidden = jax.nn.relu(x @ up.T)
    print("types:", jax.typeof(up), "and", jax.typeof(hidden))
    try:
        hidden @ down.T
    except Exception as error:
        print("refused:", str(error).split(".")[0])
    y = jnp.einsum("bh,oh->bo", hidden, down, out_sharding=P())
    print("with out_sharding:", jax.typeof(y), "right:", np.allclose(y, two_layers(*arrays), atol=1e-3))

# %% [markdown]
# With explicit sharding (the default of `jax.make_mesh`) nothing is guessed: a sum over a cut axis has to say where its result shall lie. The rest of the
# section leaves the choice to the compiler, as `labutils/xla/sharding.py` does in its four short functions.
#
# Megatron (Shoeybi et al. 2019, arXiv:1909.08053) needs two all-reduces a layer: one after attention, one after the
# MLP. Nothing is gathered in between.
#
# ## Exercise 7.11: cuts
#
# Make the dictionary `cuts`: for each of q, k, v, o, gate, up and down, `"out"` or `"in"`, so that the hidden state is whole
# at both ends of each half layer and each half ends in one all-reduce. 1 line, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>q, k, v read the whole hidden state. If each device makes whole heads, what does o read?</details>
# <details><summary>Hint 2</summary>The first matrices of each half (q, k, v; gate, up) are cut along their outputs, the last (o; down) along its inputs.</details>

# %%
# EXERCISE cuts
### BEGIN SOLUTION
cuts = {"q": "out", "k": "out", "v": "out", "o": "in", "gate": "out", "up": "out", "down": "in"}
### END SOLUTION

# %%
# CHECK cuts
ch07_device.cuts(cuts)

# %% [markdown]
# LabLM has two KV heads, so two devices share it, each with whole heads. Four ways to cut, and what XLA made of each: the
# collectives stand in the body of the loop over layers, so the count is *per layer*. The cache is spread by KV heads in all
# four. **Predict** the second row.

# %%
from labutils.xla import sharding

mesh = sharding.device_mesh(pair)
megatron = sharding.MEGATRON
choices = {"Megatron": megatron, "all along outputs": dict.fromkeys(megatron, "out")}
choices |= {"all along inputs": dict.fromkeys(megatron, "in"), "nothing cut": {}}
cache = sharding.placed(llama.empty_cache(shape), mesh, sharding.cache_spec())
expected, _ = step(*arguments)
for name, choice in choices.items():
    placed = sharding.placed(params, mesh, sharding.partition_specs(params, choice))
    compiled = step.lower(placed, *arguments[1:2], cache, *arguments[3:]).compile()
    logits, _ = compiled(placed, *arguments[1:2], cache, *arguments[3:])
    resident = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    worst = np.abs(np.asarray(logits) - np.asarray(expected)).max()
    print(
        f"{name:18} {resident / 1e6:5.1f} MB a device, largest difference {worst:.0e}, {dict(hlo.collectives(compiled.as_text()))}"
    )

# %% [markdown]
# The results agree in every row: a layout changes where the work is done, never what comes out, but for the order of sums. What differs is the
# communication. With everything cut along outputs, no matrix finds the input it needs on its own device: each half layer's middle result has to be put together
# again, and so does its end. With everything cut along inputs, every product is a partial sum, and each needs an all-reduce of its own. Even with no weight
# cut, the attention over a spread cache has to be put together. On one CPU the devices share one memory, so no speed is shown; between chips every
# collective waits for a wire.
#
# The real compiler agrees, for one, two and four chips of a v5e (a model of LabLM's sizes with four KV heads, in bfloat16, so half the bytes of the float32 above):

# %%
for decoder in report["decoders"]:
    print(
        f"{decoder['chips']} chip(s): {decoder['arguments_bytes'] / 1e6:5.1f} MB of weights and cache a chip, "
        f"{decoder['aliased_bytes'] / 1e6:.1f} MB of it donated, {decoder['temporary_bytes'] / 1e6:.1f} MB temporary, "
        f"in the loop over {decoder['layers']} layers: {decoder['collectives'] or 'no collectives'}"
    )

# %% [markdown]
# ## 12 · On a TPU
#
# On Colab, *Runtime, Change runtime type* offers a TPU; this cell then runs the kernel and the product of XLA on it. **It has
# never been run by us.** Everywhere else it says so.

# %%
if jax.default_backend() == "tpu":
    x = jnp.asarray(inputs.integers(-128, 128, (1024, 1024)), jnp.int8)
    kernel = jax.jit(partial(pallas_matmul.int8_matmul, blocks=(256, 256, 512)))
    plain = jax.jit(partial(jnp.dot, preferred_element_type=jnp.int32))
    print("equal:", bool((kernel(x, x) == plain(x, x)).all()))
    pair = {"Pallas": lambda: kernel(x, x).block_until_ready(), "XLA": lambda: plain(x, x).block_until_ready()}
    print(*measure_interleaved(pair, repeats=15, warmup=3, calls_per_sample=20).values(), sep="\n")
else:
    print(f"compiled for a TPU in section 9, executed on {jax.default_backend()}: no TPU here")

# %% [markdown]
# ## 13 · Points for the ledger
#
# Speed from section 5. The quality of the JAX model is measured through JAX: `AsTorch` wraps it so that it looks like a Hugging Face model,
# and the course's own bits per byte asks it, on the same documents as torch. Plain NumPy is chapter 01's and stays out of this ledger.

# %%
from labutils.lab.models.compare import bits_by_document, paired_quality
from labutils.xla.generate import AsTorch

reader = XlaLlama(model, max_length=512, buckets=(128, 256, 512))
baseline = bits_by_document(model, tokenizer, documents)
quality = {"eager torch": paired_quality(baseline, baseline)}
quality["jitted step"] = paired_quality(bits_by_document(AsTorch(reader), tokenizer, documents), baseline)
quality["scanned loop"] = quality["jitted step"]  # the same weights, the same function, the same tokens
print("torch:", quality["eager torch"])
print("JAX:  ", quality["jitted step"])

# %%
from labutils.measurement import ledger

for name, run in ((name, runs[name]) for name in quality):
    record = ledger.Record(
        technique=name if name == "eager torch" else f"XLA, {name}",
        model="lablm",
        device=jax.default_backend() if name != "eager torch" else "cpu",
        dtype="float32",
        threads=1,
        prompt_tokens=len(prompt_ids),
        output_tokens=NEW_TOKENS,
        samples=[NEW_TOKENS / seconds for seconds in run.samples_s],
        bits_per_byte=quality[name].bits_per_byte,
        baseline_bits_per_byte=quality[name].baseline_bits_per_byte,
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in documents),
        chapter="07",
    )
    ledger.append(record)

# %%
from labutils.lab.plots.speed_quality import draw_speed_quality, speed_quality_table

records = [r for r in ledger.read() if r.bits_per_byte is not None]
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
draw_speed_quality(records, ax=axes)
plt.show()
print(speed_quality_table(records))

# %% [markdown]
# *The figure shows all records of your ledger so far: tokens per second, prompt included, against bits per byte. The points
# of this chapter lie at one height, for the compiled programs choose the same tokens: see the two intervals printed above.*
#
# **Question for the plot:** which of your records is the fastest at this height, and was it measured on as many threads?
# Reach the menus with Tab. `print(speed_quality_table(records))` prints the same.

# %%
from labutils.lab.widgets.speed_quality import speed_quality_widget

speed_quality_widget(records)

# %% [markdown]
# ## What you have
#
# - LabLM as a pure function, equal to torch at every step, and a comparison that has been seen to fail;
# - a sense of what triggers a recompilation, what buckets cost, when compilation has paid for itself, and a cache that spares the next start;
# - a program read: fusions, loops, collectives, and a cost analysis that you know not to trust;
# - a Pallas kernel, exact in int32, whose memory you can predict to the byte, and one that attends block by block;
# - weights over a mesh in JAX's own words, with two all-reduces a layer.
#
# **Open question:** a chat service has prompts of 10 to 8000 tokens and answers of 1 to 2000, on TPUs. Which shapes would
# you compile before the first request, what would each one too few and each one too many cost, and which numbers of this
# chapter would you measure again before deciding?
#
# Next: **08 · FPGA: quantization as silicon area**.

# %%
from labutils.course.progress import progress

progress()
calibration()
