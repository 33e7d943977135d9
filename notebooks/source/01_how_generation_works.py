# %% [markdown]
# # 01 · How a language model generates
#
# **Goal:** see why text comes one token at a time, write the cache that makes it bearable, compute what the cache
# costs, and time all of it without fooling yourself.
#
# | | |
# | --- | --- |
# | Prerequisites | chapter 00; matrices; a little PyTorch |
# | Time | 2 hours for you; all cells run in one to two minutes on one core (measured: 76 and 99 s, the core shared) |
# | Memory, download | 1.7 GB at the peak (measured); nothing is downloaded |
# | Hardware | any computer; a GPU is used where there is one |
# | Exercises | 8, each checked in the cell below it |

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from labutils.data.corpus import Document, stdlib_documents
from labutils.models.load import load_model
from labutils.plots.style import series_style

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load_model("lablm", device=device)
held_out = [Document(d.name, d.text[:2000]) for d in stdlib_documents("test")]
long_text = tokenizer.bos_token + stdlib_documents("test")[0].text[:8000]
text_ids = tokenizer(long_text, truncation=True, max_length=1024, return_tensors="pt")["input_ids"].to(device)
print(
    f"{device}, {torch.get_num_threads()} threads; {text_ids.shape[1]} tokens of {held_out[0].name}, never trained on"
)

# %% [markdown]
# ## 1 · Why one token at a time
#
# Every language model of this course splits the probability of a text by the chain rule:
#
# $$p(x_1, \dots, x_n) = \prod_{i=1}^{n} p(x_i \mid x_1, \dots, x_{i-1})$$
#
# To *write* token i, tokens 1 to i−1 must be there: LSTM and Transformer both write one token at a time. To *read* a
# text that is already there (training, or your prompt) they differ. An LSTM (Hochreiter and Schmidhuber 1997) carries a
# state: $(h_i, c_i) = f(x_i, h_{i-1}, c_{i-1})$. Attention (Vaswani et al. 2017, arXiv:1706.03762, table 1) computes
# every position from the inputs alone.
#
# **Tiny numbers:** an LSTM with two hidden numbers reads three tokens. Which state needs which?

# %%
torch.manual_seed(0)
tiny_lstm, tiny_text = nn.LSTM(2, 2, batch_first=True), torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
with torch.inference_mode():
    state = None
    for position in range(3):  # no other order is possible: each step needs the state of the one before
        output, state = tiny_lstm(tiny_text[:, position : position + 1], state)
        print(f"state after token {position + 1}: {[round(v, 4) for v in output.flatten().tolist()]}")
    whole, _ = tiny_lstm(tiny_text)
print(f"one call on all three ends in:  {[round(v, 4) for v in whole[0, -1].tolist()]}")

# %% [markdown]
# One call looks parallel, but inside it the three steps still wait for one another.
#
# How much work is it? Count a multiplication and an addition as two operations (FLOP), leave out everything that is not
# a matrix product, and let all layers have one width d.
#
# - **LSTM:** four gates; each multiplies the token (d numbers) *and* the hidden state (d numbers) by a d × d matrix.
# - **Attention:** four d × d projections (query, key, value, output) for each token; then every position's query meets
#   every key (a dot product of d numbers), and the resulting weights mix all values (again d numbers each).

# %% [markdown]
# ## Exercise 1.1: layer_flop
#
# Write `layer_flop(length, width)`: return the tuple (FLOP of an LSTM layer, FLOP of an attention layer) for reading
# `length` tokens of `width` numbers. Count the full square of scores, without savings by the causal mask.
# 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>A vector of d numbers times a d × d matrix costs 2·d² FLOP. How many such products does one token need in each layer?</details>
# <details><summary>Hint 2</summary>LSTM: 8 products a token. Attention: 4 products a token, plus 2·2·length²·width for scores and values.</details>


# %%
# EXERCISE layer_flop
def layer_flop(length, width):
    """FLOP of an LSTM layer and of an attention layer that read a text."""
    ### BEGIN SOLUTION
    lstm = length * 8 * 2 * width**2
    attention = length * 4 * 2 * width**2 + 2 * 2 * length**2 * width
    return lstm, attention
    ### END SOLUTION


# %%
# CHECK layer_flop
from labutils.checks import ch01

ch01.layer_flop(layer_flop)

# %% [markdown]
# Set the two equal: the attention layer does fewer operations as long as length < 2·width. LabLM's width is 256.
#
# **Predict first:** below which length will attention read *faster* than the LSTM on this machine: shorter than 512
# tokens, exactly there, or longer? And what about writing one more token after a long text?
#
# The attention layer in a few lines. `read` takes a whole text. `write` takes one more token and looks at the keys and
# values kept from before (section 4 builds that cache).


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


# %%
from labutils.measurement.timing import measure_interleaved

WIDTH, LENGTHS, LONGER = 256, (32, 64, 128, 256, 512, 1024), (64, 256, 1024, 4096, 16384)
lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True).to(device).eval()
attention = AttentionLayer(WIDTH, heads=4).to(device).eval()
# %%
readers, writers = {}, {}
token, state = torch.randn(1, 1, WIDTH, device=device), torch.randn(2, 1, 1, WIDTH, device=device)
for n in LENGTHS:
    x = torch.randn(1, n, WIDTH, device=device)
    readers[f"LSTM, {n} tokens"] = lambda x=x: lstm(x)
    readers[f"attention, {n} tokens"] = lambda x=x: attention.read(x)
for n in LONGER:  # random keys, values and state: what they hold does not change the speed
    kept = torch.randn(2, 1, 4, n, WIDTH // 4, device=device)
    writers[f"LSTM, {n} tokens"] = lambda: lstm(token, (state[0], state[1]))
    writers[f"attention, {n} tokens"] = lambda kept=kept: attention.write(token, *kept)
with torch.inference_mode():
    reading = measure_interleaved(readers, repeats=9, warmup=1, device=device)
    writing = measure_interleaved(writers, repeats=9, warmup=1, device=device, calls_per_sample=5)
for row in (reading["LSTM, 1024 tokens"], reading["attention, 1024 tokens"], *writing.values()):
    print(row)


# %%
def draw_times(axes, timings, names, lengths, *, scale, **labels):
    """Medians over length, with the 95% intervals as bars."""
    for index, name in enumerate(names):
        rows = [timings[f"{name}, {n} tokens"] for n in lengths]
        medians = [t.median_s * scale for t in rows]
        bars = [[abs(t.interval_s[side] - t.median_s) * scale for t in rows] for side in (0, 1)]
        axes.errorbar(lengths, medians, yerr=bars, label=name, capsize=3, **series_style(index))
    axes.set(xscale="log", yscale="log", xlabel="length of the text (tokens)", **labels)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.legend()


def median_s(timings, name, n):
    return timings[f"{name}, {n} tokens"].median_s


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
shorter = [n for n in LENGTHS if median_s(reading, "attention", n) < median_s(reading, "LSTM", n)]
title = f"Attention reads faster at {len(shorter)} of {len(LENGTHS)} lengths"
draw_times(left, reading, ("LSTM", "attention"), LENGTHS, scale=1e3, ylabel="read the text (ms)", title=title)
growth = [median_s(writing, name, 16384) / median_s(writing, name, 64) for name in ("LSTM", "attention")]
title = f"One more token after 16384, against 64:\nLSTM ×{growth[0]:.2f}, attention ×{growth[1]:.2f}"
draw_times(right, writing, ("LSTM", "attention"), LONGER, scale=1e6, ylabel="one more token (µs)", title=title)
plt.show()
print("attention reads faster than the LSTM at:", shorter, f"of {LENGTHS}; equal FLOP at {2 * WIDTH}")

# %% [markdown]
# *Left: median time to read a text of a given length, one LSTM layer beside one attention layer (width 256, batch 1,
# float32, 9 rounds in which all lengths take turns, one warm-up). Right: one more token after such a text.*

# %% [markdown]
# **Explain.** Where the curves do not follow the FLOP, the reason is *what can be done at once*. The LSTM multiplies its
# matrices by one vector, waits, and repeats: each step reads the weights again. Attention multiplies by all positions
# together and reads each weight once. (With a GPU's thousands of units to fill, expect a wider gap: run it on one.)
#
# Right: which curve lies higher is a matter of libraries, how it grows is not. The LSTM's memory has a fixed size;
# attention's grows with the text, and so does its work. That growing memory is the subject of this chapter.

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
# **Tiny numbers:** three tokens, two numbers each. Before you run the cell: what is the first row of the shares?

# %%
query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
key = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
value = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
torch.set_printoptions(precision=3, sci_mode=False)
scores = query @ key.T / 2**0.5
masked = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
shares = masked.softmax(dim=1)
for name, tensor in (("scores", scores), ("masked", masked), ("shares", shares), ("shares @ value", shares @ value)):
    print(name, tensor, sep="\n")

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axes, (name, tensor) in zip(panels, {"scores": scores, "masked": masked, "shares": shares}.items(), strict=True):
    axes.imshow(tensor.masked_fill(tensor.isinf(), float("nan")), cmap="cividis", vmin=0, vmax=1.5)
    for row in range(3):
        for column in range(3):
            number = tensor[row, column].item()
            colour = "white" if 0 <= number < 0.8 else "black"
            axes.text(column, row, f"{number:.2f}", ha="center", va="center", color=colour)
    axes.set(xlabel="key (position)", ylabel="query (position)", title=name, xticks=range(3), yticks=range(3))
figure.suptitle("The mask empties the future; softmax shares out what is left")
plt.show()

# %% [markdown]
# *The same three matrices: scores of each query with each key (no unit), the future masked, and the attention weights, whose rows
# sum to 1. The token at position 0 can only look at itself.*
#
# Now look at the row of position 1. It uses the keys at positions 0 and 1 and its own query: **no later token can ever change it, and
# no earlier query is needed**. Sections 3 and 4 rely on this.

# %% [markdown]
# ## Exercise 1.2: causal_attention
#
# Write `causal_attention(query, key, value)` for one head: all three have shape (positions, head_dim); return the mixed
# values, same shape. It is compared with `torch.nn.functional.scaled_dot_product_attention`, which you may not use.
# 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The steps of the tiny example, for any number of positions: scores, scale, mask, softmax, values.</details>
# <details><summary>Hint 2</summary><code>torch.ones(n, n).triu(1).bool()</code> is true above the diagonal; <code>masked_fill</code> with <code>float("-inf")</code> before the softmax over dim 1.</details>


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
# ## 3 · Prefill and decode
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
# ## Exercise 1.3: greedy_naive
#
# Write `greedy_naive(model, token_ids, new_tokens)`: `token_ids` has shape (1, positions); return prompt and
# continuation, shape (1, positions + new_tokens). `model(input_ids=…).logits` has shape (1, positions, vocab).
# The tokens must equal those of `transformers`' `generate`. 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The logits at a position are about the token <em>after</em> it. Which position do you need?</details>
# <details><summary>Hint 2</summary>In a loop: <code>logits[:, -1:].argmax(dim=-1)</code> has shape (1, 1); <code>torch.cat</code> it to the text along dim 1.</details>


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
# The two phases also have two times, and one number for both would describe neither: the **time to first token** is
# prefill, the **time per output token** is decode.
#
# **Predict:** the first token needs a pass over 256 positions, each other token a pass over one. Will the first take 256
# times as long?

# %%
from labutils.generation.stream import CachedDecoder, StreamTimes, stream

runs = [StreamTimes.of(list(stream(CachedDecoder(model), tokenizer, text_ids[:, :256], 12))) for _ in range(6)][1:]
first_s = statistics.median(run.time_to_first_token_s for run in runs)
each_s = statistics.median(run.time_per_output_token_s for run in runs)
print(
    f"time to first token  {first_s * 1e3:.1f} ms for 256 positions (median of {len(runs)} runs, one warm-up dropped)"
)
print(
    f"time per output token {each_s * 1e3:.1f} ms for 1 position: the first takes {first_s / each_s:.1f} times as long"
)

# %% [markdown]
# **Explain.** A pass over one position is not 256 times cheaper: it reads all the weights just the same, and starts the
# same number of kernels. Section 6 puts numbers on it.

# %% [markdown]
# ## 4 · The KV cache, written by you
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
kept_keys, kept_values = key[:2], value[:2]  # from tokens 1 and 2
kept_keys = torch.cat([kept_keys, key[2:]])
kept_values = torch.cat([kept_values, value[2:]])
new_row = (query[2] @ kept_keys.T / 2**0.5).softmax(dim=0) @ kept_values
print("with the cache:", new_row)
print("whole text:    ", (shares @ value)[2])

# %% [markdown]
# ## Exercise 1.4: layer_cache
#
# Write `update(keys, values)` of `LayerCache`, the cache of one layer. Both have shape (batch, kv_heads, new positions,
# head_dim). Store them behind what is stored already, and return *all* keys and all values. The check then puts your
# class into LabLM, one for each layer: its logits must equal the naive ones within 1e-4.
# 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Before the first call <code>self.keys</code> is <code>None</code>. Which axis grows?</details>
# <details><summary>Hint 2</summary><code>self.keys = torch.cat([self.keys, keys], dim=2)</code>, likewise for the values; then return both attributes.</details>


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
# ## Exercise 1.5: greedy_cached
#
# Write `greedy_cached(model, token_ids, new_tokens)`: the same tokens as `greedy_naive`, made with `KVCache`, `prefill`
# and `decode_one_token`. No position may be read twice, and none whose logits nobody uses: the check counts.
# 7 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Prefill already gives the first new token. How many decode steps remain?</details>
# <details><summary>Hint 2</summary>After prefill: choose and append; then new_tokens − 1 times: decode the token just chosen, choose, append. <code>next_ids = logits.argmax(dim=-1)</code> has shape (1,); append <code>next_ids[:, None]</code>.</details>


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
# **Predict, then measure:** how does the time of *one* token grow with the text, without and with a cache? Both
# contestants do the same work apart from the cache: only the last position goes through the output layer
# (`logits_to_keep=1`), in both.


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
ratios = {n: median_s(per_token, "no cache", n) / median_s(per_token, "KV cache", n) for n in STEP_LENGTHS}
title = f"One token after 512: the cache makes it {ratios[512]:.1f} times as fast"
names = ("no cache", "KV cache")
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
draw_times(axes, per_token, names, STEP_LENGTHS, scale=1e3, ylabel="time of one token (ms)", title=title)
plt.show()
print(*per_token.values(), sep="\n")
print("times as fast:", {n: round(ratio, 2) for n, ratio in ratios.items()})

# %% [markdown]
# *The figure shows the median time of one more token after texts of growing length (LabLM, float32, batch 1, 7
# rounds in which all take turns, one warm-up; bars are 95% intervals).*
#
# **Explain.** Without a cache the pass covers the whole text; with one it covers a single position, and only attention
# still looks back. Look at the left end too: for a very short text there is little to save, and bookkeeping and copying
# may cost as much. A cache is a trade: less arithmetic for more memory.

# %% [markdown]
# ## 5 · What the cache costs
#
# A key and a value for each layer, KV head and position:
#
# $$\text{bytes} = 2 \cdot \text{layers} \cdot \text{KV heads} \cdot d_{\text{head}} \cdot \text{positions} \cdot \text{bytes per number}$$
#
# **Grouped-query attention** (Ainslie et al. 2023, arXiv:2305.13245; one KV head for all: Shazeer 2019,
# arXiv:1911.02150) lets several query heads share one KV head, so the cache shrinks though the number of heads stays.
#
# **Tiny numbers:** Llama-2-7B has 32 layers and 32 heads of 128, all with their own keys and values.

# %%
llama_2_7b = 2 * 32 * 32 * 128 * 1 * 2
print(f"Llama-2-7B, fp16: {llama_2_7b} bytes for one token = {llama_2_7b / 2**20} MiB")
print(f"a text of 4096 tokens: {4096 * llama_2_7b / 2**30} GiB, for one user")

# %% [markdown]
# ## Exercise 1.6: kv_cache_bytes
#
# Write `kv_cache_bytes(layers, heads, kv_heads, head_dim, positions, element_bytes)`: the bytes of the cache for one
# text. Each number takes `element_bytes`. 1 line, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>One of the arguments is not needed. Which heads are stored?</details>
# <details><summary>Hint 2</summary>The formula above, with its 2 for key and value, and <code>kv_heads</code>.</details>


# %%
# EXERCISE kv_cache_bytes
def kv_cache_bytes(layers, heads, kv_heads, head_dim, positions, element_bytes):
    """Bytes of keys and values for one text."""
    ### BEGIN SOLUTION
    return 2 * layers * kv_heads * head_dim * positions * element_bytes
    ### END SOLUTION


# %%
# CHECK kv_cache_bytes
ch01.kv_cache_bytes(kv_cache_bytes)

# %% [markdown]
# Arithmetic is a prediction: does a real cache agree? And what about models that you know? Their shapes stand in the
# `config.json` of each on the Hugging Face hub (`meta-llama/Llama-2-7b-hf`, `meta-llama/Llama-2-70b-hf`,
# `meta-llama/Llama-3.1-8B`, `Qwen/Qwen2.5-0.5B`); parameters are those of their model cards.

# %%
from labutils.measurement.resources import kv_bytes_per_position

cache = KVCache()
prefill(model, text_ids[:, :200], cache)
print("LabLM, 200 tokens, float32: predicted", 200 * kv_bytes_per_position(model.config), "bytes,", end=" ")
print("in the cache", cache.resident_bytes)
LABLM = "LabLM (this course)"
MODELS = {  # layers, heads, kv_heads, head_dim, longest text, parameters
    "Llama-2-7B": (32, 32, 32, 128, 4096, 6.74e9),
    "Llama-2-70B": (80, 64, 8, 128, 4096, 69.0e9),
    "Llama-3.1-8B": (32, 32, 8, 128, 131072, 8.03e9),
    "Qwen2.5-0.5B": (24, 14, 2, 64, 32768, 0.49e9),
}
c = model.config
shape = (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
MODELS[LABLM] = (*shape, c.max_position_embeddings, model.num_parameters())


# %%
def cost_at(name, positions):
    """GB of the fp16 cache, and attention's share of the next token's FLOP: 4·n·d a layer beside 2·parameters."""
    layers, heads, kv_heads, head_dim, longest, parameters = MODELS[name]
    cache_gb = 2 * layers * kv_heads * head_dim * positions * 2 / 1e9
    attention_flop = 4 * positions * heads * head_dim * layers
    return cache_gb, attention_flop / (attention_flop + 2 * parameters)


# %%
def memory_table(positions):
    """The costs of a prompt of so many tokens, as text; models whose context is shorter show a dash."""
    rows = [f"{positions} tokens, fp16  {'bytes/token':>12} {'cache':>10} {'weights':>10} {'attention':>10}"]
    for name, shape in MODELS.items():
        cache_gb, share = cost_at(name, positions)
        held = (f"{cache_gb:7.3f} GB", f"{share:9.1%}") if positions <= shape[4] else ("-", "-")
        rows.append(
            f"{name:20} {cost_at(name, 1)[0] * 1e9:12.0f} {held[0]:>10} {shape[5] * 2e-9:7.2f} GB {held[1]:>10}"
        )
    return "\n".join(rows)


print(memory_table(1024))

# %% [markdown]
# **Question for the slider:** from which prompt length on is Llama-3.1-8B's cache larger than its *weights*? And when is
# attention half of the arithmetic? The figure below the slider is the same without a click; `memory_table(32768)` is the
# same as text.

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
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for index, (name, shape) in enumerate(MODELS.items()):
    lengths = [2**i for i in range(7, 18) if 2**i <= shape[4]]
    costs = [cost_at(name, n) for n in lengths]
    left.loglog(lengths, [gb for gb, _ in costs], label=name, **series_style(index))
    right.semilogx(lengths, [100 * share for _, share in costs], label=name, **series_style(index))
left.set_ylim(top=60)
left.axhline(8.03 * 2, color="grey", linestyle=":")
left.annotate("weights of Llama-3.1-8B", (130, 8.03 * 2), xytext=(0, 4), textcoords="offset points", color="0.3")
left.set(xlabel="prompt (tokens)", ylabel="KV cache, fp16 (GB)", title="Every cache grows in proportion to the text")
right.set(xlabel="prompt (tokens)", ylabel="scores and values (% of FLOP)")
right.set_title("Attention's share grows with the text")
left.legend(fontsize="small")
plt.show()

# %% [markdown]
# *Computed, not measured. Left: the cache in fp16 for one text, up to each model's longest; right: the share of
# attention (scores and values) in the operations of the next token.* Compare Llama-2-7B with Llama-3.1-8B: about the same
# number of weights, a quarter of the KV heads. Chapter 03 stores the cache in fewer bits.

# %% [markdown]
# ## 6 · The roofline
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
# ## Exercise 1.7: flop_per_byte
#
# Write `flop_per_byte(parameters, tokens, bytes_per_parameter, cache_bytes)`: the arithmetic intensity of one pass over
# `tokens` tokens that also reads `cache_bytes` of keys and values. 2 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Which of the two, operations or bytes, grows with the number of tokens in the pass?</details>
# <details><summary>Hint 2</summary>2·parameters·tokens over (parameters·bytes_per_parameter + cache_bytes).</details>


# %%
# EXERCISE flop_per_byte
def flop_per_byte(parameters, tokens, bytes_per_parameter, cache_bytes):
    """Arithmetic intensity of one pass over some tokens."""
    ### BEGIN SOLUTION
    read_bytes = parameters * bytes_per_parameter + cache_bytes
    return 2 * parameters * tokens / read_bytes
    ### END SOLUTION


# %%
# CHECK flop_per_byte
ch01.flop_per_byte(flop_per_byte)

# %% [markdown]
# **Predict:** on which side of the ridge does LabLM's decode stand, on which its prefill of 256 tokens? Now measure both.
# We count the products with the weights (the output layer only for the last position) and leave attention's own scores
# out, so the FLOP are slightly too few.

# %%
from labutils.measurement.resources import decode_bytes_per_token, weight_bytes_read
from labutils.plots.roofline import RooflinePoint, draw_roofline

head = model.config.vocab_size * model.config.hidden_size  # the output layer, shared with the embedding
body = model.num_parameters() - head
cache = KVCache()
prefill(model, text_ids[:, :255], cache)
passes = {"prefill": lambda: prefill(model, text_ids[:, :256], KVCache())}
passes["decode"] = lambda: cached_step(text_ids[:, :256], cache)
timed = measure_interleaved(passes, repeats=7, warmup=2, device=device)
print(timed["prefill"], timed["decode"], sep="\n")
cache_bytes = 256 * kv_bytes_per_position(model.config)
prefill_flop, prefill_bytes = 2 * (256 * body + head), weight_bytes_read(model) + cache_bytes
decode_flop, decode_bytes = 2 * (body + head), decode_bytes_per_token(model, 256).total_bytes

# %%
points = [
    RooflinePoint("prefill of 256", prefill_flop, prefill_bytes, timed["prefill"].median_s),
    RooflinePoint("decode of 1", decode_flop, decode_bytes, timed["decode"].median_s),
]
figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
draw_roofline(machine, points, ax=axes)
plt.show()
for point in points:
    print(f"{point.label}: {point.intensity_flop_per_byte:.2f} FLOP/byte, {point.flops_per_s / 1e9:.1f} GFLOP/s")
print(f"tokens in one pass to reach the ridge: about {machine.ridge_flop_per_byte * 4 / 2:.0f} (float32 weights)")

# %% [markdown]
# *The figure shows both measured roofs, and where the two phases stand below them; the legend gives the share of the roof
# that each reached.*
#
# **Explain.** Decode is far to the left: two operations for every weight it fetches. First read its share of the roof in the legend. Near
# the roof, memory is the limit, and fewer bytes (chapters 02 to 04) or more tokens in each pass (batching and speculation) help. At
# less than half of it, the limit is neither memory nor arithmetic: it is **overhead**, such as launching many small kernels from Python.
# Then fewer bytes alone buy little. LabLM is a small model in eager PyTorch; chapter 06 profiles where its time goes.

# %% [markdown]
# A caution: LabLM is small enough to stay in many processors' cache. If the legend says *probe error*, the weights came
# from there, and the memory roof does not apply. Claims about bandwidth need a larger model.

# %% [markdown]
# ## 7 · Timing without fooling yourself
#
# Somebody sends you this benchmark. It compares LabLM's cached decode step with ... itself. `WithSetup` stands for everything that
# happens on a first call only: compilation, allocation, cold caches.
#
# **Predict:** what should a benchmark say about a function against itself?


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


step = WithSetup(lambda: cached_step(text_ids[:, :256], cache), setup_s=0.5)
print(f"a function is {careless_speedup(step, step):.1f} times as fast as itself")

# %% [markdown]
# Name the faults before you open the list.
#
# <details><summary>The faults</summary>
#
# 1. Set-up is paid by whoever goes first, inside the timed region: **warm up** first.
# 2. All of one, then all of the other: if the machine changes in between, the second gets the blame: **interleave**.
# 3. A **mean** of three: one disturbed call drags it along, and nothing says how sure it is: keep the samples, take the
#    **median** of more.
# 4. Nobody **waits** for the device: see below.
#
# </details>
#
# Here is what one set-up does to a mean.

# %%
fresh, calls_ms = WithSetup(lambda: cached_step(text_ids[:, :256], cache), setup_s=0.5), []
for _ in range(12):
    start = time.perf_counter()
    fresh()
    calls_ms.append((time.perf_counter() - start) * 1e3)
mean, median = statistics.mean(calls_ms), statistics.median(calls_ms)
figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
axes.semilogy(range(1, 13), calls_ms, linestyle="none", label="one call", **series_style(0))
axes.axhline(mean, color="#D55E00", linestyle="--", label="mean")
axes.axhline(median, color="#009E73", label="median")
axes.set(
    xlabel="call", ylabel="time (ms)", title=f"One first call lifts the mean to {mean / median:.1f} times the median"
)
axes.legend()
plt.show()

# %% [markdown]
# *The figure shows twelve calls of one function: the first includes the set-up; the dashed line is their mean, the solid
# one their median.*
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
# A subtler fault is **different work** in the two contestants. `forward_logits` computes the logits of *all* positions;
# a loop that wants only the next token need not. Against such a baseline a cache would be praised for work that it has
# nothing to do with. First the count, then the clock; if the interval contains 1, this machine cannot tell them apart.

# %%
from labutils.measurement.timing import paired_ratio

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
# ## Exercise 1.8: speedup
#
# Repair it: `speedup(baseline, candidate, warmup, rounds, wait, clock)` returns how many times as fast the candidate is.
# First call each function `warmup` times untimed. Then, for `rounds` rounds, time one call of each. `wait()` blocks until
# the device has finished; `clock()` gives seconds. Return the ratio of the medians. The check runs it on a simulated
# machine that slows down midway, gets disturbed, and queues its work. 10 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Two lists of samples, one loop over the rounds, both functions inside it. When is a queued call over?</details>
# <details><summary>Hint 2</summary>One sample: <code>wait(); start = clock(); function(); wait(); samples.append(clock() - start)</code>.</details>


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
# `labutils.measurement.timing` does this, starts each round with another contestant, and adds an interval that resamples
# whole rounds. Try it on the function against itself (an *A/A test*). If the interval misses 1, distrust the machine
# before you trust any other number of it.

# %%
step = WithSetup(lambda: cached_step(text_ids[:, :256], cache), setup_s=0.2)
same = measure_interleaved({"first": step, "second": step}, repeats=15, device=device)
print(same["first"], same["second"], sep="\n")
print("against itself:", paired_ratio(same["first"].samples_s, same["second"].samples_s))

# %% [markdown]
# ## 8 · Two points for the ledger
#
# The same prompt and the same number of tokens, without a cache and with ours, in one interleaved run. The quality is one
# number for both: within rounding both compute the same logits (section 4 proved it within 1e-4) and the cell below
# compares their tokens.

# %%
from labutils.models import evaluate_text

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
print(f"the cache is {faster} as fast, at {quality:.3f} bits per byte for both")

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
from labutils.plots.speed_quality import draw_speed_quality, speed_quality_table

records = [r for r in ledger.read() if r.bits_per_byte is not None]
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
draw_speed_quality(records, ax=axes)
plt.show()
print(speed_quality_table(records))

# %% [markdown]
# *The figure shows all records of your ledger so far: tokens per second (with the interval of the repeats) against bits
# per byte. The two points of this chapter lie at the same height: a cache changes the speed and nothing else.* Their
# tokens per second include the prefill of the prompt. Points from other chapters may have other prompts: compare like with like.

# %% [markdown]
# **Question for the plot:** choose a model and a device. Which record is the fastest that costs no quality, and was it
# measured under the same conditions as the others? Reach the menus with Tab, choose with the arrow keys. The figure above
# shows everything without a click; `print(speed_quality_table(records))` prints it.

# %%
from labutils.widgets.speed_quality import speed_quality_widget

speed_quality_widget(records)

# %% [markdown]
# ## What you have
#
# - reading can be parallel, writing cannot: prefill and decode, two phases with two times;
# - attention and a KV cache written by hand, proved equal to the naive loop;
# - the bytes of a cache for any model, and why grouped-query attention exists;
# - decode waits for memory and prefill for arithmetic only *where they come near the measured roof*; elsewhere they wait for overhead;
# - a way of timing that a function cannot win against itself.
#
# **Open question:** decode uses a small part of this machine's arithmetic. If you had to decode for 20 users at once,
# what would you share between them, what could you not share, and which of the two sets the limit?
#
# Next: **02 · Quantization formulas**.

# %%
from labutils.course.progress import progress

progress()
