# %% [markdown]
# # 01 · How a language model generates
#
# **Goal:** see why text comes one token at a time, take the model apart, write the cache that makes it bearable, compute
# what the cache costs, and time all of it without fooling yourself.
#
# | | |
# | --- | --- |
# | Prerequisites | chapter 00; matrices; a little PyTorch |
# | Time | 3.5 hours for you; all cells run in one to two minutes on one core (measured: 76 and 99 s, the core shared) |
# | Memory, download | 1.7 GB at the peak (measured); nothing is downloaded |
# | Hardware | any computer; a GPU is used where there is one |
# | Exercises | 9, each checked in the cell below it; those marked *core* fit into one session of two hours |

# %%
import math
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from labutils.course.predictions import calibration, predict
from labutils.lab.data.corpus import Document, stdlib_documents
from labutils.lab.models.load import load_model
from labutils.lab.plots.style import plain_log_scale, series_style

# %%
CHARACTERS = 2000  # of each held-out module, as in chapter 00
device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load_model("lablm", device=device)
held_out = [Document(d.name, d.text[:CHARACTERS]) for d in stdlib_documents("test")]
long_text = tokenizer.bos_token + stdlib_documents("test")[0].text[:8000]
text_ids = tokenizer(long_text, truncation=True, max_length=1024, return_tensors="pt")["input_ids"].to(device)
threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
print(f"{device}, {threads}; {text_ids.shape[1]} tokens of {held_out[0].name}, never trained on")

# %% [markdown]
# ## 1 · Why one token at a time
#
# Every language model of this course splits the probability of a text by the chain rule:
#
# $$p(x_1, \dots, x_n) = \prod_{i=1}^{n} p(x_i \mid x_1, \dots, x_{i-1})$$
#
# To *write* token i, tokens 1 to i−1 must be there, so every such model writes one token after the other. What differs is what it keeps
# of the text so far:
#
# - a **state of fixed size**, which each token changes. So did the LSTM (Hochreiter and Schmidhuber 1997); so do today's linear attention and
#   state-space layers (Mamba-2: Dao and Gu 2024, arXiv:2405.21060), often in hybrids with a few attention layers;
# - **everything**: attention (Vaswani et al. 2017, arXiv:1706.03762) keeps a key and a value of every token and looks at all of them.

# %% [markdown]
# Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), without its feature map and normaliser, adds one outer product for each token:
#
# $$S_i = S_{i-1} + k_i^\top v_i, \qquad o_i = q_i\, S_i, \qquad S_0 = 0$$
#
# **Tiny numbers:** queries, keys and values of two numbers. Whatever the length of the text, the state has four.

# %%
queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
keys = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
values = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
state = torch.zeros(2, 2)
for position in range(3):  # one after the other: each step needs the state of the one before
    state = state + torch.outer(keys[position], values[position])
    print(f"state after token {position + 1}: {state.tolist()}, output {(queries[position] @ state).tolist()}")
at_once = (queries @ keys.T).tril() @ values
print("all rows at once:", at_once.tolist())

# %% [markdown]
# The last line gives the same outputs for all tokens in one go. So a text that is already there (in training, or in your prompt) can be read
# in parallel, and only writing has to wait. An LSTM cannot do that: its state goes through a nonlinear function at every token.

# %% [markdown]
# ## Exercise 1.1: linear_attention (core)
#
# Write `linear_attention(query, key, value)` for one head: all three have shape (positions, head_dim). Return the tuple (outputs, state):
# outputs of shape (positions, head_dim), and the state after the last token, of shape (head_dim, head_dim). Go token by token, and keep
# nothing of earlier tokens but the state.
# 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Does a token see itself? Look at the formula: which state does the output read?</details>
# <details><summary>Hint 2</summary>Collect the rows in a list; <code>torch.stack</code> makes a tensor of it.</details>


# %%
# EXERCISE linear_attention
def linear_attention(query, key, value):
    """Outputs of linear attention, token by token, and its last state."""
    ### BEGIN SOLUTION
    state, rows = torch.zeros(key.shape[1], value.shape[1]), []
    for q, k, v in zip(query, key, value, strict=True):
        state = state + torch.outer(k, v)
        rows.append(q @ state)
    return torch.stack(rows), state
    ### END SOLUTION


# %%
# CHECK linear_attention
from labutils.course.checks import ch01

ch01.linear_attention(linear_attention)

# %% [markdown]
# What does that mean for time? Below stand three layers of one width: PyTorch's LSTM, attention, and linear attention. `read` takes a whole
# text. `write` takes one more token: attention looks at all keys and values kept so far, linear attention only at its state.
#
# **Predict:** how much longer does attention take for one more token after 16,384 tokens than after 64? And the two with a state? Write down
# a factor for attention.


# %%
class AttentionLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def project(self, x):  # three of shape (1, heads, positions, head_dim)
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def read(self, x):
        query, keys, values = self.project(x)
        return self.out(scaled_dot_product_attention(query, keys, values, is_causal=True).transpose(1, 2).flatten(2))

    def write(self, x, kept_keys, kept_values):
        query, kept_keys[:, :, -1:], kept_values[:, :, -1:] = self.project(x)
        return self.out(scaled_dot_product_attention(query, kept_keys, kept_values).transpose(1, 2).flatten(2))

    def write_linear(self, x, state):  # the same projections, and a state of (1, heads, head_dim, head_dim)
        query, keys, values = self.project(x)
        state.add_(keys.transpose(2, 3) @ values).mul_(0.5)  # halved, as gated layers forget: it must not overflow here
        return self.out((query @ state).transpose(1, 2).flatten(2))


# %%
my_growth = predict("one more token with attention: after 16,384 tokens over after 64", None, unit="times")

# %%
from labutils.measurement.timing import measure_interleaved, paired_ratio

WIDTH, LENGTHS, LONGER = 256, (64, 256, 1024), (64, 256, 1024, 4096, 16384)
lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True).to(device).eval()
attention = AttentionLayer(WIDTH, heads=4).to(device).eval()
readers, writers = {}, {}
token, state = torch.randn(1, 1, WIDTH, device=device), torch.randn(2, 1, 1, WIDTH, device=device)
for n in LENGTHS:
    x = torch.randn(1, n, WIDTH, device=device)
    readers[f"LSTM, {n} tokens"] = lambda x=x: lstm(x)
    readers[f"attention, {n} tokens"] = lambda x=x: attention.read(x)

# %%
for n in LONGER:  # random keys, values and states: what they hold does not change the speed
    kept, matrix = torch.randn(2, 1, 4, n, WIDTH // 4, device=device), torch.randn(1, 4, 64, 64, device=device)
    writers[f"LSTM, {n} tokens"] = lambda: lstm(token, (state[0], state[1]))
    writers[f"linear attention, {n} tokens"] = lambda matrix=matrix: attention.write_linear(token, matrix)
    writers[f"attention, {n} tokens"] = lambda kept=kept: attention.write(token, *kept)
with torch.inference_mode():
    reading = measure_interleaved(readers, repeats=9, warmup=2, device=device, calls_per_sample=5)
    writing = measure_interleaved(writers, repeats=15, warmup=2, device=device, calls_per_sample=20)
print(*reading.values(), *writing.values(), sep="\n")


# %%
def draw_times(axes, timings, names, lengths, *, scale, **labels):
    """Medians over length, with the 95% intervals as bars."""
    for index, name in enumerate(names):
        rows = [timings[f"{name}, {n} tokens"] for n in lengths]
        medians = [t.median_s * scale for t in rows]
        bars = [[abs(t.interval_s[side] - t.median_s) * scale for t in rows] for side in (0, 1)]
        axes.errorbar(lengths, medians, yerr=bars, capsize=3, **series_style(index))
        axes.annotate(name, (lengths[-1], medians[-1]), xytext=(8, -3), textcoords="offset points")
    axes.set(xscale="log", xlabel="length of the text (tokens)", **labels)
    plain_log_scale(axes, "y")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlim(right=lengths[-1] ** 1.45 / lengths[0] ** 0.45)  # room for the names
    axes.grid(alpha=0.25)


def times_as_long(timings, name, n, other_name, other):
    """How many times as long one takes as another, with the interval of the paired rounds."""
    return paired_ratio(timings[f"{name}, {n} tokens"].samples_s, timings[f"{other_name}, {other} tokens"].samples_s)


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
slower = times_as_long(reading, "LSTM", 1024, "attention", 1024)
title = f"Reading 1024 tokens: the LSTM takes {slower}\nas long as attention"
draw_times(left, reading, ("LSTM", "attention"), LENGTHS, scale=1e3, ylabel="read the text (ms)", title=title)
keepers = ("LSTM", "attention", "linear attention")
growth = {name: times_as_long(writing, name, 16384, name, 64) for name in keepers}
title = f"One more token after 16384, against 64:\nattention {growth['attention']}"
draw_times(right, writing, keepers, LONGER, scale=1e6, ylabel="one more token (µs)", title=title)
plt.show()
for name, ratio in growth.items():
    print(f"{name}: one more token after 16384 takes {ratio} as long as after 64")
my_growth.compare(growth["attention"].value)

# %% [markdown]
# *Medians with 95% intervals (width 256, batch 1, float32; all lengths take turns in each round).* Left, an LSTM layer and an attention layer
# read a text; right, they and linear attention take one more token. A factor whose interval contains 1 shows no difference.
#
# **Explain** both panels. For each token of n, the LSTM does 16·d² operations and attention 8·d² + 2·n·d, so at these lengths they differ by
# at most a factor of two. What else decides who reads faster? And which layers must slow down as the text grows?
#
# <details><summary>An explanation</summary>
#
# Left: the LSTM multiplies its matrices by one vector, waits, and repeats, so each step reads the weights again. Attention multiplies by all
# positions together and reads each weight once. Its scores grow with the square of the length, so for a text that is long enough it loses all
# the same. Right: a state has a fixed size, and the work on it does not depend on the text; a factor that
# lies surely beside 1 tells of the machine, such as what its caches held, and not of the layer. Attention's memory grows with the text, and so
# does its work. Which curve lies lower at the left end is a matter of libraries.
#
# </details>

# %% [markdown]
# ## 2 · Attention by hand
#
# One head of attention takes a query, a key and a value for each position (Vaswani et al. 2017, equation 1):
#
# $$\begin{aligned}
# S &= \frac{Q K^\top}{\sqrt{d}} + M, \qquad M_{ij} = \begin{cases} 0 & j \le i \\ -\infty & j > i \end{cases} \\
# O &= \operatorname{softmax}_{\text{rows}}(S)\, V
# \end{aligned}$$
#
# Row i of S says how well position i's query fits each key; the causal mask M forbids looking ahead; softmax turns a
# row into shares that sum to 1; the output mixes the values with these shares.
#
# **Tiny numbers:** the three tokens of section 1, two numbers each. Before you run the cell: what is the first row of the shares?

# %%
query, key, value = queries, keys, values  # those of section 1
torch.set_printoptions(precision=3, sci_mode=False)
scores = query @ key.T / 2**0.5
masked = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
shares = masked.softmax(dim=1)
for name, tensor in (("scores", scores), ("masked", masked), ("shares", shares), ("shares @ value", shares @ value)):
    print(name, tensor, sep="\n")

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axes, (name, tensor) in zip(panels, {"scores": scores, "masked": masked, "shares": shares}.items(), strict=True):
    image = axes.imshow(tensor.masked_fill(tensor.isinf(), float("nan")), cmap="cividis", vmin=0)
    for row in range(3):
        for column in range(3):
            number = tensor[row, column].item()
            light = number == -torch.inf or sum(image.cmap(image.norm(number))[:3]) > 1.5
            axes.text(column, row, f"{number:.2f}", ha="center", va="center", color="black" if light else "white")
    axes.set(xlabel="key (position)", ylabel="query (position)", title=name, xticks=range(3), yticks=range(3))
figure.suptitle("The mask empties the future; softmax shares out what is left")
plt.show()

# %% [markdown]
# *The same three matrices: scores of each query with each key (no unit), the future masked, and the attention weights, whose rows
# sum to 1. The token at position 0 can only look at itself.*
#
# Now look at the row of position 1. It uses the keys at positions 0 and 1 and its own query: **no later token can ever change it, and
# no earlier query is needed**. Sections 4 and 5 rely on this.
#
# The scores of a long text are a huge matrix. FlashAttention (Dao et al. 2022, arXiv:2205.14135) computes the same outputs block by block and
# never writes that matrix to memory; `scaled_dot_product_attention` uses such a kernel where there is one.

# %% [markdown]
# ## Exercise 1.2: causal_attention (core)
#
# Write `causal_attention(query, key, value)` for one head: all three have shape (positions, head_dim); return the mixed
# values, same shape. It is compared with `torch.nn.functional.scaled_dot_product_attention`, which you may not use.
# 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The steps of the tiny example, for any number of positions: scores, scale, mask, softmax, values.</details>
# <details><summary>Hint 2</summary>With two positions there are four scores. Which one must not count, and what must it be for softmax to give it a share of zero?</details>
# <details><summary>Hint 3</summary><code>torch.ones(n, n).triu(1).bool()</code> is true above the diagonal; <code>masked_fill</code> with <code>float("-inf")</code> before the softmax over dim 1.</details>


# %%
# EXERCISE causal_attention
def causal_attention(query, key, value):
    """Causal attention of one head: (positions, head_dim) to (positions, head_dim)."""
    ### BEGIN SOLUTION
    scores = query @ key.T / query.shape[1] ** 0.5
    future = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(future, float("-inf")).softmax(dim=1) @ value
    ### END SOLUTION


# %%
# CHECK causal_attention
ch01.causal_attention(causal_attention)

# %% [markdown]
# ## 3 · Anatomy of LabLM
#
# Attention is one part of a layer. The whole model is a **residual stream**: each position carries a vector of `hidden_size` numbers, which
# begins as a row of the embedding table. Every layer adds to it twice, once by attention and once by an MLP; the **head** turns the last
# vector into one logit for each token. Before each addition, **RMSNorm** (Zhang and Sennrich 2019, arXiv:1910.07467) brings the vector to a
# common size and multiplies each number by a learned **gain** g; the MLP is a **SwiGLU** (Shazeer 2020, arXiv:2002.05202):
#
# $$\begin{aligned}
# \operatorname{norm}(x) &= \frac{x}{\sqrt{\operatorname{mean}(x^2) + \varepsilon}} \odot g \\
# \operatorname{MLP}(x) &= W_\text{down}\,\big(\operatorname{SiLU}(W_\text{gate}\, x) \odot W_\text{up}\, x\big)
# \end{aligned}$$
#
# **Tiny numbers:** the norm of [3, 4] with gain 1. The mean of the squares is 12.5, its root 3.54.

# %%
norm = model.model.layers[0].input_layernorm
x = torch.tensor([3.0, 4.0])
print("the norm of [3, 4]:", [round(v, 3) for v in (x / x.square().mean().sqrt()).tolist()])
x = torch.randn(model.config.hidden_size, device=device)
own = x / (x.square().mean() + norm.variance_epsilon).sqrt() * norm.weight
print("LabLM's first norm agrees with the formula:", torch.allclose(own, norm(x), atol=1e-5))

# %%
from labutils.lab.plots.anatomy import draw_block

figure, axes = plt.subplots(figsize=(11, 4.8), layout="constrained")
draw_block(model.config, ax=axes)
plt.show()

# %% [markdown]
# *Read it from left to right: a box is a matrix (outputs × inputs) or a gain, and each branch ends in a sum.* Three more words:
#
# - **RoPE** (Su et al. 2021, arXiv:2104.09864) turns pairs of numbers of each query and key by an angle that grows with the position, so that
#   scores depend on distances;
# - **grouped-query attention**: several query heads share one key head and one value head (section 6 counts what that saves);
# - a **tied** head is the embedding table itself, used a second time.
#
# Which matrices are large, how many operations does a token cost in each, and how many bytes must be read for it?

# %%
rows = dict(model.model.layers[0].named_parameters())
rows |= {"final norm": model.model.norm.weight, "embedding = head": model.model.embed_tokens.weight}
print(f"{'':36}{'shape':>10}{'parameters':>12}{'FLOP/token':>12}{'bytes/token':>12}")
totals = [0, 0, 0]
for name, weight in rows.items():
    copies = model.config.num_hidden_layers if "." in name else 1
    flop = 2 * weight.numel() if weight.ndim == 2 else 0  # a gain multiplies number by number: left out
    counts = weight.numel(), flop, weight.numel() * weight.element_size()
    totals = [total + copies * count for total, count in zip(totals, counts, strict=True)]
    label, shape = f"{copies} × {name}" if copies > 1 else name, "×".join(map(str, weight.shape))
    print(f"{label:36}{shape:>10}" + "".join(f"{count:12,}" for count in counts))
print(f"{'all':46}" + "".join(f"{total:12,}" for total in totals))
print(f"parameters that the library counts: {model.num_parameters():,}")

# %% [markdown]
# ## Exercise 1.3: parameter_count (core)
#
# Write `parameter_count(config)`: how many parameters a model of this kind has, from its configuration alone: `hidden_size`,
# `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`, `vocab_size`, `tie_word_embeddings`. There
# are no biases. 5 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Which matrices are in the figure, and what are their two sides in words of the configuration?</details>
# <details><summary>Hint 2</summary>The sides of q and o are hidden_size and heads · head_dim, which need not be equal. Count the gains, too, and look at <code>tie_word_embeddings</code>.</details>


# %%
# EXERCISE parameter_count
def parameter_count(config):
    """Parameters of a Llama-like model."""
    ### BEGIN SOLUTION
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + hidden + tables * config.vocab_size * hidden
    ### END SOLUTION


# %%
# CHECK parameter_count
from labutils.course.checks import ch01_costs

ch01_costs.parameter_count(parameter_count)

# %% [markdown]
# In a **mixture of experts** each layer has many MLPs, and a router sends a token to a few of them. So there are two counts: *all*
# parameters, which need memory, and the *active* ones, which one token multiplies and reads. gpt-oss-120b sends each token to 4 of 128
# experts in a layer; the table of section 6 lists both counts.

# %% [markdown]
# ## 4 · Prefill and decode
#
# Generation has two phases with different names and different costs (Pope et al. 2022, arXiv:2211.05102):
#
# - **prefill:** read the n tokens of the prompt in one pass, all positions at once; ends with the first new token.
# - **decode:** one pass for each further token.
#
# The simplest loop knows no difference. It hands the whole text to the model, takes the most likely next token
# (*greedy*), appends it, and starts again. For m new tokens it reads
#
# $$n + (n+1) + \dots + (n+m-1) = m\,n + \tfrac{m(m-1)}{2} \text{ positions,}$$
#
# though all but the newest gave the same numbers before. **Tiny numbers:** 4 prompt tokens and 3 new
# ones: 4 + 5 + 6 = 15 positions, where 4 + 1 + 1 = 6 would do.

# %% [markdown]
# ## Exercise 1.4: greedy_naive (core)
#
# Write `greedy_naive(model, token_ids, new_tokens)`: `token_ids` has shape (1, positions); return prompt and
# continuation, shape (1, positions + new_tokens). `model(input_ids=…).logits` has shape (1, positions, vocab).
# The tokens must equal those of `transformers`' `generate`, and every pass must read the whole text: the check counts.
# 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The logits at a position are about the token <em>after</em> it. Which position do you need?</details>
# <details><summary>Hint 2</summary>A pass over n positions gives n rows of logits. Only one of them is about a token that is not there yet. Which shape must it have to be joined to the text?</details>
# <details><summary>Hint 3</summary>In a loop: <code>logits[:, -1:].argmax(dim=-1)</code> has shape (1, 1); <code>torch.cat</code> it to the text along dim 1.</details>


# %%
# EXERCISE greedy_naive
def greedy_naive(model, token_ids, new_tokens):
    """Greedy generation without a cache."""
    ### BEGIN SOLUTION
    for _ in range(new_tokens):
        with torch.inference_mode():
            logits = model(input_ids=token_ids).logits
        token_ids = torch.cat([token_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return token_ids
    ### END SOLUTION


# %%
# CHECK greedy_naive
prompt = tokenizer.bos_token + "import os\n\n\ndef read_lines(path):\n    "
prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
ch01.greedy_naive(greedy_naive, model, prompt_ids)

# %% [markdown]
# How many positions does it read? A hook on the embedding table sees everything that goes into the model. We count for
# `labutils`' naive loop and for its cached one, and compare both with `transformers`.

# %%
from labutils.generation.decode import generate_cached, generate_naive


def positions_read(generate, new_tokens):
    """Tokens that `generate` makes, and how many positions each pass reads."""
    read = []
    table = model.get_input_embeddings()
    hook = table.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    tokens = generate(model, prompt_ids, new_tokens)
    hook.remove()
    return tokens, read


expected = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=8, do_sample=False)
for generate in (generate_naive, generate_cached):
    tokens, read = positions_read(generate, 8)
    print(f"{generate.__name__}: {sum(read)} positions, pass by pass {read}")
    print("    tokens equal those of transformers:", torch.equal(tokens, expected))

# %% [markdown]
# The two phases also have two times, and one number for both would describe neither: the **time to first token** (TTFT) is prefill, the
# **time per output token** (TPOT) is decode. Here it is the median gap, as in chapter 00; servers report the mean (chapter 11).
#
# **Predict:** the first token needs a pass over 256 positions, each other token a pass over one. How many times as long will the first take?

# %%
my_ratio = predict("time to first token of 256 positions over time per output token", None, unit="times")

# %%
from labutils.generation.stream import CachedDecoder, StreamTimes, stream

runs = [StreamTimes.of(list(stream(CachedDecoder(model), tokenizer, text_ids[:, :256], 12))) for _ in range(6)][1:]
firsts = [run.time_to_first_token_s for run in runs]
gaps = [run.time_per_output_token_s for run in runs]
ratio = paired_ratio(firsts, gaps)
print(f"median of {len(runs)} runs, one warm-up dropped")
print(f"time to first token   {statistics.median(firsts) * 1e3:.1f} ms for 256 positions")
print(f"time per output token {statistics.median(gaps) * 1e3:.1f} ms for 1 position: the first takes {ratio} as long")
my_ratio.compare(ratio.value)

# %% [markdown]
# **Explain:** why is a pass over one position not 256 times cheaper than a pass over 256?
#
# <details><summary>An explanation</summary>
#
# It still reads every weight and launches just as many kernels. Section 7 puts numbers on it.
#
# </details>

# %% [markdown]
# ## 5 · The KV cache, written by you
#
# Section 2 said it: earlier rows never change, and a new token needs *its own* query, but the keys and values of *all*
# tokens. So keep keys and values, and compute the new token only:
#
# $$K \leftarrow \begin{bmatrix} K \\ k_{\text{new}} \end{bmatrix}, \qquad
# V \leftarrow \begin{bmatrix} V \\ v_{\text{new}} \end{bmatrix}, \qquad
# o_{\text{new}} = \operatorname{softmax}\!\left(\tfrac{q_{\text{new}} K^\top}{\sqrt d}\right) V$$
#
# With a single query there is nothing to mask: everything in the cache lies in its past. **Tiny numbers**, from
# section 2: the third row alone, without the other two queries.

# %%
kept_keys, kept_values = key[:2], value[:2]  # from positions 0 and 1
kept_keys = torch.cat([kept_keys, key[2:]])
kept_values = torch.cat([kept_values, value[2:]])
new_row = (query[2] @ kept_keys.T / 2**0.5).softmax(dim=0) @ kept_values
print("with the cache:", new_row)
print("whole text:    ", (shares @ value)[2])

# %% [markdown]
# ## Exercise 1.5: layer_cache (core)
#
# Write `update(keys, values)` of `LayerCache`, the cache of one layer. Both have shape (batch, kv_heads, new positions,
# head_dim). Store them behind what is stored already, and return *all* keys and all values. The check then puts your
# class into LabLM, one for each layer: its logits must equal the naive ones within 1e-4.
# 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Before the first call <code>self.keys</code> is <code>None</code>. Which axis grows?</details>
# <details><summary>Hint 2</summary>If 3 positions are stored and 1 is new, all keys together have 4. Which of the axes (batch, kv_heads, positions, head_dim) is that?</details>
# <details><summary>Hint 3</summary><code>self.keys = torch.cat([self.keys, keys], dim=2)</code>, likewise for the values; then return both attributes.</details>


# %%
# EXERCISE layer_cache
class LayerCache:
    """Keys and values of one layer."""

    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        """Stores new keys and values and returns all of them."""
        ### BEGIN SOLUTION
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat([self.keys, keys], dim=2)
            self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values
        ### END SOLUTION


# %%
# CHECK layer_cache
ch01.layer_cache(LayerCache, model, prompt_ids)

# %% [markdown]
# `labutils.generation.cache.KVCache` is the same for all layers, and `labutils.generation.decode` has the two verbs:
#
# - `prefill(model, token_ids, cache)` reads tokens into the cache and returns the logits (1, vocab) after the last;
# - `decode_one_token(model, next_ids, cache)` reads one token, `next_ids` of shape (1,), and returns the next logits.
#
# **Tiny numbers** again, now real: the cache's length after each verb, and how far the logits lie from the naive ones.

# %%
from labutils.generation.cache import KVCache
from labutils.generation.decode import decode_one_token, forward_logits, prefill

naive_logits = forward_logits(model, text_ids[:, :64])
cache = KVCache()
differences = [(prefill(model, text_ids[:, :60], cache) - naive_logits[:, 59]).abs().max().item()]
print("after prefill:", cache.get_seq_length(), "positions")
for position in range(60, 64):
    logits = decode_one_token(model, text_ids[:, position], cache)
    differences.append((logits - naive_logits[:, position]).abs().max().item())
    print("after decode: ", cache.get_seq_length(), "positions")
print(f"largest difference of any logit: {max(differences):.1e}, within 1e-4: {max(differences) < 1e-4}")

# %% [markdown]
# ## Exercise 1.6: greedy_cached (core)
#
# Write `greedy_cached(model, token_ids, new_tokens)`: the same tokens as `greedy_naive`, made with `KVCache`, `prefill`
# and `decode_one_token`. No position may be read twice, and none whose logits nobody uses: the check counts.
# 7 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Prefill already gives the first new token. How many decode steps remain?</details>
# <details><summary>Hint 2</summary>Write down the passes for a prompt of 4 tokens and 3 new ones: 4, 1, 1. What does each pass read, and what do its logits choose?</details>
# <details><summary>Hint 3</summary>After prefill: choose and append; then new_tokens − 1 times: decode the token just chosen, choose, append. <code>next_ids = logits.argmax(dim=-1)</code> has shape (1,); append <code>next_ids[:, None]</code>.</details>


# %%
# EXERCISE greedy_cached
def greedy_cached(model, token_ids, new_tokens):
    """Greedy generation with a KV cache."""
    ### BEGIN SOLUTION
    cache = KVCache()
    next_ids = prefill(model, token_ids, cache).argmax(dim=-1)
    token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
    for _ in range(new_tokens - 1):
        next_ids = decode_one_token(model, next_ids, cache).argmax(dim=-1)
        token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
    return token_ids
    ### END SOLUTION


# %%
# CHECK greedy_cached
ch01.greedy_cached(greedy_cached, model, prompt_ids)

# %% [markdown]
# **Predict, then measure:** how does the time of *one* token grow with the text, without and with a cache? How many times as fast is the
# cache after 512 tokens? Apart from the cache, both do the same work: in both, only the last position goes through the output layer
# (`logits_to_keep=1`).

# %%
my_gain = predict("one token after 512: without a cache over with one", None, unit="times")


# %%
def naive_step(text):
    """Logits of the next token, without a cache."""
    with torch.inference_mode():
        return model(input_ids=text, use_cache=False, logits_to_keep=1).logits[:, -1]


def cached_step(text, cache):
    """The same with a cache that holds all but the last token; afterwards it does so again."""
    logits = decode_one_token(model, text[:, -1], cache)
    cache.truncate(text.shape[1] - 1)
    return logits


# %%
STEP_LENGTHS, steps = (16, 32, 64, 128, 256, 512), {}
for n in STEP_LENGTHS:
    cache = KVCache()
    prefill(model, text_ids[:, : n - 1], cache)
    steps[f"no cache, {n} tokens"] = lambda n=n: naive_step(text_ids[:, :n])
    steps[f"KV cache, {n} tokens"] = lambda n=n, cache=cache: cached_step(text_ids[:, :n], cache)
per_token = measure_interleaved(steps, repeats=7, warmup=1, device=device)

# %%
ratios = {n: times_as_long(per_token, "no cache", n, "KV cache", n) for n in STEP_LENGTHS}
title = f"One token after 512, without a cache:\n{ratios[512]} as long as with one"
names = ("no cache", "KV cache")
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
draw_times(axes, per_token, names, STEP_LENGTHS, scale=1e3, ylabel="time of one token (ms)", title=title)
plt.show()
print(*per_token.values(), sep="\n")
for n, ratio in ratios.items():
    told_apart = "" if ratio.low > 1 or ratio.high < 1 else "; not told apart"
    print(f"after {n:3} tokens the pass without a cache takes {ratio} as long{told_apart}")
my_gain.compare(ratios[512].value)

# %% [markdown]
# *Median time of one more token after texts of growing length (LabLM, float32, batch 1, 7 rounds in which all take turns, one warm-up; bars
# are 95% intervals).*
#
# **Explain:** what does each curve depend on, and why is there so little to gain at the left end?
#
# <details><summary>An explanation</summary>
#
# Without a cache the pass covers the whole text; with one it covers a single position, and only attention still looks back. For a very short
# text there is little to save, and bookkeeping and copying may cost as much. A cache is a trade: less arithmetic for more memory.
#
# </details>

# %% [markdown]
# Which token? So far the likeliest. Every loop here takes `choose`, from logits to a token, and `stop`, the tokens that end a text. The usual
# recipe is *temperature*, which divides the logits, then *top-k* or *top-p*, which leave out the unlikely tail (top-p: Holtzman et al. 2020,
# arXiv:1904.09751); *min-p* (Nguyen et al. 2024, arXiv:2407.01082) leaves out what is too unlikely beside the likeliest token.

# %%
from labutils.generation.sampling import Sampler

distribution = prefill(model, text_ids[:, :64], KVCache())
for temperature in (0.5, 1.0, 1.5):
    sampler = Sampler(torch.Generator(device).manual_seed(0), temperature=temperature, top_p=0.9)
    probs = sampler.probs(distribution)[0]
    left = int((probs > 0).sum())
    print(f"temperature {temperature}, top-p 0.9: {left} tokens are left, the likeliest has {probs.max():.2f}")
line_ends = {token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])}
ended = generate_cached(model, prompt_ids, 60, stop=line_ends)
print(f"stopped at a line's end: {ended.shape[1] - prompt_ids.shape[1]} of at most 60 new tokens")

# %% [markdown]
# ## 6 · What the cache costs
#
# Full attention keeps a key and a value for each layer, KV head and position:
#
# $$\text{bytes} = 2 \cdot \text{layers} \cdot \text{KV heads} \cdot d_{\text{head}} \cdot \text{positions} \cdot \text{bytes per number}$$
#
# Models of today keep less, in four ways:
#
# - **grouped-query attention** (GQA, Ainslie et al. 2023, arXiv:2305.13245): several query heads share one KV head;
# - **multi-head latent attention** (MLA, DeepSeek-V2, arXiv:2405.04434): one short vector of each position, from which keys *and* values of all
#   heads are made;
# - a **sliding window** in some layers: only the newest positions stay;
# - **hybrids**: in most layers a state of fixed size, as in section 1, in place of a cache.
#
# **Tiny numbers:** Llama-2-7B has 32 layers and 32 heads of 128, all with their own keys and values.

# %%
llama_2_7b = 2 * 32 * 32 * 128 * 1 * 2
print(f"Llama-2-7B, fp16: {llama_2_7b} bytes for one token = {llama_2_7b / 2**20} MiB")
print(f"a text of 4096 tokens: {4096 * llama_2_7b / 2**30} GiB, for one user")

# %% [markdown]
# ## Exercise 1.7: kv_cache_bytes
#
# Write `kv_cache_bytes(layers, positions, element_bytes)`: the bytes kept of one text of so many positions, at `element_bytes` a number. Each
# layer is a dictionary: `{"kv_heads": 8, "head_dim": 64}`; the same with `"window": 128`, which keeps at most the newest 128 positions;
# `{"latent_dim": 576}`, one vector for each position; or `{"state": 524288}`, so many numbers whatever the length.
# 9 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many positions does this layer keep, and how many numbers for each? Which of the four does not grow with the text?</details>
# <details><summary>Hint 2</summary>Only the first two kinds store two vectors for each position, a key and a value.</details>
# <details><summary>Hint 3</summary><code>min(positions, layer.get("window", positions))</code> is how many positions are kept.</details>


# %%
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, positions, element_bytes):
    """Bytes kept of one text."""
    ### BEGIN SOLUTION
    numbers = 0
    for layer in layers:
        kept = min(positions, layer.get("window", positions))
        if "state" in layer:
            numbers += layer["state"]
        elif "latent_dim" in layer:
            numbers += kept * layer["latent_dim"]
        else:
            numbers += 2 * kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes
    ### END SOLUTION


# %%
# CHECK kv_cache_bytes
ch01_costs.kv_cache_bytes(kv_cache_bytes)

# %% [markdown]
# Arithmetic is a prediction: does a real cache agree? And what about models that you know? The shapes below are those of their `config.json`
# on the Hugging Face hub, and the parameters those of their model cards. `LayerCache` is `labutils`' way to say what a layer keeps: shapes of
# keys and values, and how many positions at most. A state counts as a single position.

# %%
from labutils.lab.layers.architecture import LayerCache
from labutils.measurement.resources import kv_bytes_per_position

cache = KVCache()
prefill(model, text_ids[:, :200], cache)
print("LabLM, 200 tokens, float32: predicted", 200 * kv_bytes_per_position(model.config), "bytes,", end=" ")
print("in the cache", cache.resident_bytes)


def full(kv_heads, head_dim, window=None):
    return LayerCache(keys=(kv_heads, head_dim), values=(kv_heads, head_dim), window=window)


latent = LayerCache(keys=(1, 512), values=(1, 64))  # the latent vector, and one key with the position in it
linear = LayerCache(
    keys=(32, 128 * 128), values=(0, 0), window=1
)  # 32 states of 128 × 128; a short convolution is left out
c = model.config

# %%
MODELS = {  # what each layer keeps, longest text, all parameters, active ones
    "Llama-2-7B": ([full(32, 128)] * 32, 4096, 6.74e9, 6.74e9),
    "Llama-3.1-8B (GQA)": ([full(8, 128)] * 32, 131072, 8.03e9, 8.03e9),
    "Qwen2.5-0.5B (GQA)": ([full(2, 64)] * 24, 32768, 0.49e9, 0.49e9),
    "gpt-oss-120b (half windows)": ([full(8, 64, 128), full(8, 64)] * 18, 131072, 116.8e9, 5.1e9),
    "DeepSeek-V3 (MLA)": ([latent] * 61, 131072, 671e9, 37e9),
    "Qwen3-Next-80B (hybrid)": ([linear, linear, linear, full(2, 256)] * 12, 262144, 80e9, 3e9),
    "LabLM": ([full(c.num_key_value_heads, c.head_dim)] * c.num_hidden_layers, 1024, 5.77e6, 5.77e6),
}


def cache_gb(name, positions):
    """GB of the cache in 16 bits."""
    return 2 * sum(layer.numbers(positions) for layer in MODELS[name][0]) / 1e9


# %%
def memory_table(positions):
    """The cache of a prompt of so many tokens, as text; models whose context is shorter show a dash."""
    lines = [f"{f'{positions} tokens, 16 bits':30}{'cache':>12}{'a token':>12}{'all weights':>13}{'read a token':>14}"]
    for name, (_, longest, parameters, active) in MODELS.items():
        gb = cache_gb(name, positions)
        held = (f"{gb:.3f} GB", f"{gb * 1e6 / positions:.1f} kB") if positions <= longest else ("-", "-")
        lines.append(f"{name:30}{held[0]:>12}{held[1]:>12}{parameters * 2e-9:10.2f} GB{active * 2e-9:11.2f} GB")
    return "\n".join(lines)


print(memory_table(1024))
print(memory_table(32768))

# %% [markdown]
# **Question for the slider:** from which prompt length on is Llama-3.1-8B's cache larger than its *weights*? Which model keeps least for a long
# text, and which for a short one? The figure below the slider shows it without a click; `print(memory_table(131072))` prints it.

# %%
import ipywidgets as widgets

slider = widgets.SelectionSlider(options=[2**i for i in range(7, 18)], value=4096, description="prompt")
table_box = widgets.HTML()


def show_table(_change=None):
    table_box.value = f"<pre>{memory_table(slider.value)}</pre>"


slider.observe(show_table, names="value")
show_table()
widgets.VBox([slider, table_box])

# %%
figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
for index, (name, (_, longest, _, _)) in enumerate(MODELS.items()):
    lengths = [2**i for i in range(7, 19) if 2**i <= longest]
    held = [cache_gb(name, n) for n in lengths]
    axes.plot(lengths, held, **series_style(index))
    lower = -12 if "gpt" in name else 3 if "3.1" in name else -3
    axes.annotate(name, (lengths[-1], held[-1]), xytext=(8, lower), textcoords="offset points", fontsize=8)
axes.axhline(8.03 * 2, color="grey", linestyle=":")
axes.annotate("weights of Llama-3.1-8B", (128, 8.03 * 2), xytext=(0, 4), textcoords="offset points", color="0.3")
for which in "xy":
    plain_log_scale(axes, which)
axes.set(xlabel="prompt (tokens)", ylabel="KV cache, 16 bits (GB)")
axes.set_title("Windows, latent vectors and states keep less of a long text")
axes.set_xticks([2**i for i in range(7, 19, 2)], [f"{2**i:,}" for i in range(7, 19, 2)])
axes.set_xlim(100, 4e6)
plt.show()

# %% [markdown]
# *Computed, not measured: what is kept of one text, up to each model's longest.* Compare Llama-2-7B with Llama-3.1-8B: about the same number
# of weights, a quarter of the KV heads. The hybrid begins high, since its states are there from the first token on, and then grows with its few
# attention layers only.
# Chapter 03 stores the cache in fewer bits. Servers cut it into pages, so that no memory waits empty for texts that end early
# (*PagedAttention*, Kwon et al. 2023, arXiv:2309.06180), and share the pages of a common beginning (*prefix caching*): chapter 11.

# %% [markdown]
# ## 7 · The roofline
#
# A processor does at most so many operations a second, and its memory delivers at most so many bytes. Work that does I
# operations for each byte it reads (its *arithmetic intensity*) reaches at most
#
# $$\text{FLOP/s} \le \min(\text{peak FLOP/s},\; I \cdot \text{bandwidth})$$
#
# (Williams, Waterman, Patterson 2009). Both roofs are measured here, not taken from a data sheet.

# %%
from labutils.measurement.roofline import measure_roofline

machine = measure_roofline(1.5, device=device)
print(machine)
print(f"below {machine.ridge_flop_per_byte:.1f} FLOP per byte, this machine waits for its memory")

# %% [markdown]
# One pass over T tokens does about 2 operations for each parameter and token, but reads each parameter only **once**, and
# besides it the cache. **Tiny numbers:** one parameter of 4 bytes. One token: 2 FLOP for 4 bytes. Ten tokens in the same
# pass: 20 FLOP for the same 4 bytes.
#
# So a server decodes many texts in one step, a token of each, and hopes to pass the ridge. But every text brings a cache of its own.
#
# ## Exercise 1.8: texts_to_ridge
#
# Write `texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine)`: the fewest texts in one decode step for which the arithmetic
# takes at least as long as the reading; `None` if no number of texts is enough. `cache_bytes` are the keys and values of *one* text, and
# `machine` is a dictionary with `flops_per_s` and `bytes_per_s`. Leave attention's own products out. 5 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>What does one more text add to the seconds of arithmetic, and what to the seconds of reading? What is read even without any text?</details>
# <details><summary>Hint 2</summary>Reading the weights takes 10 s, each text adds 3 s of arithmetic and 1 s of reading. Five texts: 15 s against 15 s. And if each text added 3 s of reading?</details>
# <details><summary>Hint 3</summary>The arithmetic catches up by the difference of the two with each text: weights_s / (flop_s − cache_s), rounded up, if that difference is above zero.</details>


# %%
# EXERCISE texts_to_ridge
def texts_to_ridge(parameters, bytes_per_parameter, cache_bytes, machine):
    """The fewest texts in a decode step that make arithmetic its limit, if any number does."""
    ### BEGIN SOLUTION
    flop_s, cache_s = 2 * parameters / machine["flops_per_s"], cache_bytes / machine["bytes_per_s"]
    if flop_s <= cache_s:
        return None
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    return math.ceil(weights_s / (flop_s - cache_s))
    ### END SOLUTION


# %%
# CHECK texts_to_ridge
ch01_costs.texts_to_ridge(texts_to_ridge)

# %% [markdown]
# So long texts can keep a step at the memory's roof whatever the batch: their caches are read by nobody else. Fewer KV heads, latent vectors and
# windows (section 6) help twice, in capacity and here.

# %% [markdown]
# **Predict:** on which side of the ridge does decode stand, on which a prefill of 256 tokens? And which of them will come near its roof?
#
# Two models: LabLM, and one with 0.2 billion random weights, too many for a cache (values do not change speed; what it writes is noise). We
# count the products with the weights (the output layer only for the last position) and leave attention's own scores out, so the FLOP are
# slightly too few.

# %%
from labutils.course.bench.subject import speed_subject
from labutils.generation.decode import static_cache
from labutils.lab.plots.roofline import RooflinePoint, draw_roofline
from labutils.measurement.resources import weight_bytes_read

large = speed_subject().model.to(device)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def matrix_parameters(network):
    """Parameters of the output layer (tied to the embedding) and of all other layers."""
    head = network.config.vocab_size * network.config.hidden_size
    return head, network.num_parameters() - head


def decode_step(network, batch, positions=64):
    """One cached decode step of so many texts at once; afterwards the cache is as before. It holds random numbers."""
    c, ids = network.config, torch.randint(4000, (batch, positions - 1), device=device)
    cache = static_cache(network, ids, 1)  # buffers of full length: no step copies what came before
    for layer in range(c.num_hidden_layers):
        cache.update(*torch.randn(2, batch, c.num_key_value_heads, positions - 1, c.head_dim, device=device), layer)

    def step():
        decode_one_token(network, ids[:, -1], cache)
        cache.truncate(positions - 1)

    return step


print(f"{large.num_parameters() / 1e9:.2f} billion random weights, {weight_bytes_read(large) / 1e6:.0f} MB in float32")

# %%
passes = {
    "LabLM prefill of 256": lambda: prefill(model, text_ids[:, :256], KVCache()),
    "LabLM decode": decode_step(model, 1),
    "0.2B prefill of 256": lambda: prefill(large, text_ids[:, :256], KVCache()),
}
passes |= {f"0.2B decode of {batch}": decode_step(large, batch) for batch in BATCHES}
timed = measure_interleaved(passes, repeats=5, warmup=1, device=device)
print(*timed.values(), sep="\n")


# %%
def roofline_point(label, network, tokens, outputs, cached):
    """A pass over so many tokens, some of which go through the output layer, with so many cached positions in all."""
    head, body = matrix_parameters(network)
    moved = weight_bytes_read(network) + cached * kv_bytes_per_position(network.config)
    return RooflinePoint(label, 2 * (tokens * body + outputs * head), moved, timed[label].median_s)


points = [
    roofline_point("LabLM prefill of 256", model, 256, 1, 256),
    roofline_point("LabLM decode", model, 1, 1, 64),
    roofline_point("0.2B prefill of 256", large, 256, 1, 256),
    *(roofline_point(f"0.2B decode of {batch}", large, batch, batch, 64 * batch) for batch in (1, 8, 64)),
]
figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
draw_roofline(machine, points, ax=axes)
plt.show()
for point in points:
    share = point.share(machine)
    rates = f"{point.intensity_flop_per_byte:7.2f} FLOP/byte, {point.flops_per_s / 1e9:6.1f} GFLOP/s"
    print(f"{point.label:22}{rates}, {share} of the roof")
print(f"tokens in one pass to reach the ridge: about {machine.ridge_flop_per_byte * 4 / 2:.0f} (float32 weights)")

# %% [markdown]
# *Both roofs are measured; each point is a pass, with the share of the roof that it reached.* A pass "waits for memory" only if it comes near that roof: the
# title calls whatever reaches less than half of its roof **overhead**: launches, Python, or a kernel that does not fit the shape.
#
# **Explain:** compare the two models' decode. Are they limited by the same thing, and what would fewer bytes buy each of them?
#
# <details><summary>An explanation</summary>
#
# Both do two operations for every weight they read, so both stand far to the left. Near the roof, memory is the limit: fewer bytes (chapters
# 02 to 04) or more tokens in each pass help. Far below it, the time goes into launching many small kernels from Python, and fewer bytes alone
# buy little; chapter 06 profiles that. LabLM is also small enough for many processors' caches: if its label says *probe error*, the weights
# came from there, and the memory roof does not apply.
#
# </details>

# %% [markdown]
# The same steps tell what a **batch** buys. One step of B texts reads the weights once and writes B tokens. So throughput (tokens/s of all texts
# together) rises, and each text waits longer for its next token (the inter-token latency). **Predict:** how many times the tokens/s of one text do
# 64 texts reach?

# %%
my_batch = predict("tokens/s of 64 texts at once over tokens/s of one (0.2B)", None, unit="times")

# %%
steps = [timed[f"0.2B decode of {batch}"] for batch in BATCHES]
one = steps[0].samples_s
gain = {n: paired_ratio([n * s for s in one], t.samples_s) for n, t in zip(BATCHES, steps, strict=True)}
longer = paired_ratio(steps[-1].samples_s, one)
for batch, ratio in gain.items():
    print(f"{batch:2} at once: {ratio} the tokens/s of one")
my_batch.compare(gain[64].value)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axes, of in ((left, lambda batch, s: batch / s), (right, lambda batch, s: s * 1e3)):
    middle = [of(n, t.median_s) for n, t in zip(BATCHES, steps, strict=True)]
    ends = [sorted(of(n, s) for s in t.interval_s) for n, t in zip(BATCHES, steps, strict=True)]
    bars = [[abs(m - e[side]) for m, e in zip(middle, ends, strict=True)] for side in (0, 1)]
    axes.errorbar(BATCHES, middle, yerr=bars, capsize=3, **series_style(0))
    axes.set_xlabel("texts in one step")
    for which in "xy":
        plain_log_scale(axes, which)
    axes.set_xticks(BATCHES, [str(n) for n in BATCHES])
left.plot(BATCHES, [n / steps[0].median_s for n in BATCHES], color="0.6", linestyle=":")
left.annotate("in proportion", (16, 16 / steps[0].median_s), xytext=(-75, 0), textcoords="offset points")
left.set(ylabel="tokens/s of all texts together", title=f"64 texts write {gain[64]} the tokens/s of one")
right.set(ylabel="time of one step (ms)", title=f"and each of them waits {longer} as long")
plt.show()

# %% [markdown]
# *Medians with 95% intervals (0.2B random weights, float32, 64 positions in each text's cache); along the dotted line further texts would cost nothing.* Where the
# curve leaves that line at the first few texts already, the library has gone from a matrix times a vector to a product of matrices, which may reach less of the
# bandwidth. Further on, three things set the limit. The ridge, printed above, says from how many tokens a pass on arithmetic takes over. Each text brings its own cache, which no other text can share: capacity, then bandwidth. And
# each text waits longer. Chapter 11 serves many users within such limits.

# %% [markdown]
# ## 8 · Timing without fooling yourself
#
# Somebody sends you this benchmark. It compares LabLM's cached decode step with ... itself. `WithSetup` stands for everything that
# happens on a first call only: compilation, allocation, cold caches.
#
# **Predict:** what should a benchmark say about a function against itself, and what will this one say?


# %%
class WithSetup:
    def __init__(self, step, setup_s):
        self.step, self.setup_s = step, setup_s

    def __call__(self):
        time.sleep(self.setup_s)  # on the first call only
        self.setup_s = 0
        return self.step()


# %%
def careless_speedup(baseline, candidate):
    seconds = []
    for function in (baseline, candidate):
        start = time.perf_counter()
        for _ in range(3):
            function()
        seconds.append((time.perf_counter() - start) / 3)
    return seconds[0] / seconds[1]


cache = KVCache()
prefill(model, text_ids[:, :255], cache)
step = WithSetup(lambda: cached_step(text_ids[:, :256], cache), setup_s=0.5)
print(f"a function is {careless_speedup(step, step):.1f} times as fast as itself")

# %% [markdown]
# Name the faults before you open the list.
#
# <details><summary>The faults</summary>
#
# 1. Whoever goes first pays for the setup, inside the timed region: **warm up** first.
# 2. It times all calls of one, then all of the other. If the machine changes in between, the second gets the blame: **interleave**.
# 3. It takes a **mean** of three. One disturbed call drags it along, and nothing says how sure it is: keep the samples, take the **median** of
#    more.
# 4. It does not **wait** for the device: see below.
#
# </details>
#
# Here is what one setup does to a mean.

# %%
fresh, calls_ms = WithSetup(lambda: cached_step(text_ids[:, :256], cache), setup_s=0.5), []
for _ in range(12):
    start = time.perf_counter()
    fresh()
    calls_ms.append((time.perf_counter() - start) * 1e3)
mean, median = statistics.mean(calls_ms), statistics.median(calls_ms)
figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
axes.plot(range(1, 13), calls_ms, linestyle="none", **series_style(0))
for name, value, style in (("mean", mean, "--"), ("median", median, "-")):
    axes.axhline(value, color="0.4", linestyle=style)
    axes.annotate(name, (12, value), xytext=(0, 4), textcoords="offset points", ha="right")
plain_log_scale(axes, "y")
axes.set(
    xlabel="call", ylabel="time (ms)", title=f"One first call lifts the mean to {mean / median:.1f} times the median"
)
plt.show()

# %% [markdown]
# *Twelve calls of one function, the first of which includes the setup.*
#
# Fault 4: a GPU call returns as soon as the work is *queued*. A queue with one worker behaves the same on any computer:

# %%
from concurrent.futures import ThreadPoolExecutor

with ThreadPoolExecutor(max_workers=1) as queue:
    queue.submit(time.sleep, 0)  # warm-up: starts the worker
    start = time.perf_counter()
    job = queue.submit(time.sleep, 0.1)  # "launch a kernel" that works for 0.1 s
    launched_s = time.perf_counter() - start
    job.result()  # torch.cuda.synchronize() on a GPU
    done_s = time.perf_counter() - start
print(f"without waiting: {launched_s * 1e3:.3f} ms; with waiting: {done_s * 1e3:.1f} ms")

# %% [markdown]
# A subtler fault is to compare **different work**. `forward_logits` computes the logits of *all* positions; a loop that wants only the next
# token need not. Against such a baseline a cache would be praised for work that it has nothing to do with. First the count, then the clock;
# if the interval contains 1, this machine cannot tell the two apart.

# %%
head, body = matrix_parameters(model)
unequal = measure_interleaved(
    {"all logits": lambda: forward_logits(model, text_ids[:, :256]), "last": lambda: naive_step(text_ids[:, :256])},
    device=device,
)
print(unequal["all logits"], unequal["last"], sep="\n")
print(
    f"the padded baseline does {256 * (body + head) / (256 * body + head):.2f} times the products with weights", end=" "
)
print("and takes", paired_ratio(unequal["all logits"].samples_s, unequal["last"].samples_s), "the time")

# %% [markdown]
# ## Exercise 1.9: speedup
#
# Repair it: `speedup(baseline, candidate, warmup, rounds, wait, clock)` returns how many times as fast the candidate is.
# First call each function `warmup` times untimed. Then, for `rounds` rounds, time one call of each. `wait()` blocks until
# the device has finished; `clock()` gives seconds. Return the ratio of the medians. The check runs it on a simulated
# machine that slows down midway, gets disturbed, and queues its work. 10 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Two lists of samples, one loop over the rounds, both functions inside it. When is a queued call over?</details>
# <details><summary>Hint 2</summary>Draw one sample as a line: the first clock reading, the call, the moment when the device has finished, the second reading. Where must wait() stand, and why also at the start?</details>
# <details><summary>Hint 3</summary>One sample: <code>wait(); start = clock(); function(); wait(); samples.append(clock() - start)</code>.</details>


# %%
# EXERCISE speedup
def speedup(baseline, candidate, warmup, rounds, wait, clock):
    """How many times as fast the candidate is: ratio of medians of interleaved samples."""
    ### BEGIN SOLUTION
    slow, fast = [], []
    for _ in range(warmup):
        baseline()
        candidate()
    for _ in range(rounds):
        for function, samples in ((baseline, slow), (candidate, fast)):
            wait()
            start = clock()
            function()
            wait()
            samples.append(clock() - start)
    return statistics.median(slow) / statistics.median(fast)
    ### END SOLUTION


# %%
# CHECK speedup
ch01.speedup(speedup)

# %% [markdown]
# `labutils.measurement.timing` does this, starts each round with another function, and adds an interval that resamples
# whole rounds. Try it on the function against itself (an *A/A test*). If the interval misses 1, distrust the machine
# before you trust any other number of it.

# %%
step = WithSetup(lambda: cached_step(text_ids[:, :256], cache), setup_s=0.2)
same = measure_interleaved({"first": step, "second": step}, repeats=15, device=device)
print(same["first"], same["second"], sep="\n")
itself = paired_ratio(same["first"].samples_s, same["second"].samples_s)
verdict = (
    "the interval contains 1, as it must"
    if itself.low <= 1 <= itself.high
    else "it misses 1: this machine is busy, or it drifts"
)
print(f"against itself: {itself}, {verdict}")

# %% [markdown]
# ## 9 · Two points for the ledger
#
# The same prompt and the same number of tokens, without a cache and with ours, in one interleaved run. The quality is one
# number for both: section 5 found their logits equal within 1e-4, and the cell below compares their tokens.

# %%
from labutils.lab.models import evaluate_text

NEW_TOKENS = 32
ledger_ids = text_ids[:, :128]


def without_cache():
    text = ledger_ids
    for _ in range(NEW_TOKENS):
        text = torch.cat([text, naive_step(text).argmax(dim=-1)[:, None]], dim=1)
    return text


loops = {"no cache": without_cache, "own KV cache": lambda: generate_cached(model, ledger_ids, NEW_TOKENS)}
print("same tokens:", torch.equal(*(loop() for loop in loops.values())))
runs = measure_interleaved(loops, repeats=5, warmup=1, device=device)
faster = paired_ratio(runs["no cache"].samples_s, runs["own KV cache"].samples_s)
quality = evaluate_text.bits_per_byte(model, tokenizer, held_out, context=512)
print(
    f"{NEW_TOKENS} tokens after {ledger_ids.shape[1]}, prefill included: the cache is {faster} as fast, at {quality:.3f} bits per byte"
)
print(f"for both, on the first {CHARACTERS} characters of {len(held_out)} held-out modules")

# %%
from labutils.measurement import ledger

settings = {"model": "lablm", "device": device, "dtype": "float32", "threads": torch.get_num_threads()}
lengths = {"prompt_tokens": ledger_ids.shape[1], "output_tokens": NEW_TOKENS}
for technique, timing in runs.items():
    record = ledger.Record(
        technique=technique,
        **settings,
        **lengths,
        samples=[NEW_TOKENS / seconds for seconds in timing.samples_s],
        bits_per_byte=quality,
        baseline_bits_per_byte=quality,
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in held_out),
        chapter="01",
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
# *All records of your ledger so far: tokens per second of a whole call, prefill included, against bits per byte.* The two points of this chapter
# are equally high, because a cache changes the speed and nothing else. Points from other chapters may have other prompts: compare like with like.

# %% [markdown]
# **Question for the plot:** choose a model and a device. Which record is the fastest that costs no quality, and was it
# measured under the same conditions as the others? Reach the menus with Tab, choose with the arrow keys. The figure above
# shows everything without a click; `print(speed_quality_table(records))` prints it.

# %%
from labutils.lab.widgets.speed_quality import speed_quality_widget

speed_quality_widget(records)

# %% [markdown]
# ## Words
#
# | word | meaning |
# | --- | --- |
# | prefill, decode | the pass over the prompt; one pass for each further token |
# | KV cache | the keys and values of all positions so far |
# | GQA, MLA | query heads share key and value heads; one latent vector stands for all |
# | arithmetic intensity | operations for each byte that a pass reads |
# | roofline, ridge | the most that memory and arithmetic allow; where the two meet |
# | overhead | time in which neither memory nor arithmetic is near its limit |
# | throughput, latency | tokens/s of all texts together; how long one text waits |
# | A/A test | a function timed against itself |

# %% [markdown]
# ## What you have
#
# - reading can be parallel, writing cannot: prefill and decode, two phases with two times;
# - attention and a KV cache written by hand, equal to the naive loop on the texts of the checks;
# - every matrix of a Llama-like model, and its parameters, operations and bytes;
# - the bytes of a cache with grouped heads, windows, latent vectors or states;
# - decode waits for memory and prefill for arithmetic only *where they come near the measured roof*; elsewhere overhead limits them;
# - what a batch buys, and what it costs each text;
# - a way of timing that a function cannot win against itself.
#
# **Open question:** decode uses a small part of this machine's arithmetic. If you had to decode for 20 users at once,
# what would you share between them, what could you not share, and which of the two sets the limit?
#
# Next: **02 · Quantization formulas**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()
