# %% [markdown]
# # 03 · Quantizing a language model
#
# **Goal:** bring a whole model to 8, 4, 3 and 2 bits with the methods that people really use, see what each one costs in
# quality, and find out which of them buy speed.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 02 |
# | Time | 5 hours for you; two sessions serve best, sections 1 to 9 on methods and the rest on speed; all cells run in about 6 minutes on one core (measured: 325 s, the build included) |
# | Memory, download | 1.6 GB at the peak (measured); nothing is downloaded |
# | Hardware | any computer; a C compiler helps |
# | Exercises | 14 (3.1 to 3.7 on methods, 3.8 to 3.10 on speed, 3.11 to 3.13 on formats, 3.14 a contest), each checked in the cell below it; those marked *core* fit into two sessions of two hours |

# %%
import copy
import itertools
import math

import matplotlib.pyplot as plt
import torch

from labutils.course.predictions import predict
from labutils.lab.models.compare import bits_by_document, held_out_dialogues, held_out_documents, paired_quality
from labutils.lab.models.evaluate_service import score_task
from labutils.lab.models.load import load_model
from labutils.lab.plots.style import series_style
from labutils.lab.widgets.slider import picture_slider

model, tokenizer = load_model("lablm")
LIMIT_BYTES = 1000  # of each held-out module
documents, dialogues = held_out_documents(limit_bytes=LIMIT_BYTES), held_out_dialogues()
baseline, dialogue_baseline = (bits_by_document(model, tokenizer, each) for each in (documents, dialogues))
cores = torch.get_num_threads()
THREADS = f"{cores} thread{'s' if cores > 1 else ''}"
print(f"the first {LIMIT_BYTES:,} bytes of {len(documents)} held-out modules, {len(dialogues)} bundles of dialogues")
print(f"{THREADS}, float32 on cpu")

# %% [markdown]
# ## 1 · How to see a loss
#
# Four ways, from near to far:
#
# - **one layer's output**: $\lVert X(W-\hat W)^\top \rVert^2 / \lVert XW^\top \rVert^2$;
# - **bits per byte** on held-out code, and on held-out service dialogues, *paired*: the difference on the same texts, with its
#   own 95% interval;
# - **drift** from float32: the Kullback–Leibler divergence (KL) of its predictions, and the share of **flips**, places where the most
#   likely token is another one. A model may flip tokens for better and for worse, and keep its bits per byte;
# - **tasks**: customers' intents named, and Chinese requests put into English, in phrasings that recombine what training showed.
#
# `look` keeps all but the first for the table at the end. It reads 1,000 bytes of each module: compare the two numbers that it prints
# below with chapter 00's before you compare anything. Why is a beginning harder? A score over 40 items is coarse: one item is 2.5
# points, and the standard error of a share near one half is 8 points.

# %%
TASKS = ("intent", "to_english")
table, bits_of = {}, {}
first = [tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in (*documents, *dialogues)]
probe = torch.tensor([ids[: min(map(len, first))] for ids in first])  # as many tokens of each text


@torch.no_grad()
def log_probs(variant, rows):
    return variant(rows).logits.float().log_softmax(dim=-1)


parts = probe.split(8)
expected = [log_probs(model, rows) for rows in parts]


def drift(variant):
    """Mean KL divergence from float32's predictions in nats, and the share of flips."""
    divergence = flips = 0
    for rows, theirs in zip(parts, expected, strict=True):
        found = log_probs(variant, rows)
        divergence += (theirs.exp() * (theirs - found)).sum().item()
        flips += (theirs.argmax(dim=-1) != found.argmax(dim=-1)).sum().item()
    return divergence / probe.numel(), flips / probe.numel()


# %%
def look(name, variant, size_bytes):
    """Measures a variant on held-out text and on the tasks, and keeps it for the table."""
    bits_of[name] = bits_by_document(variant, tokenizer, documents)
    quality = paired_quality(bits_of[name], baseline)
    talk = paired_quality(bits_by_document(variant, tokenizer, dialogues), dialogue_baseline)
    scores = {task: score_task(variant, tokenizer, task, count=40).accuracy for task in TASKS}
    table[name] = (size_bytes, quality, scores, talk, *drift(variant))
    low, high = quality.interval
    found = f"{name:<22} {size_bytes / 1e6:5.2f} MB  {quality.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    found += f"  dialogues {talk.difference / talk.baseline_bits_per_byte:+.1%}, flips {table[name][-1]:.1%}, "
    print(found + ", ".join(f"{task} {score:.3f}" for task, score in scores.items()))


look("float32", model, 4 * model.num_parameters())
look("bfloat16, as shipped", copy.deepcopy(model).bfloat16(), 2 * model.num_parameters())
longer = held_out_documents(limit_bytes=2 * LIMIT_BYTES)
twice = sum(bits for bits, _ in bits_by_document(model, tokenizer, longer)) / sum(len(d.text.encode()) for d in longer)
print(
    f"float32 needs {table['float32'][1].bits_per_byte:.4f} bits per byte of the first {LIMIT_BYTES:,} bytes of each module, "
    f"and {twice:.4f} of the first {2 * LIMIT_BYTES:,}"
)

# %% [markdown]
# Some methods look at text first. **Calibration text** comes from the training split, never from what we measure on:
# here eight rows of library code and eight of service dialogues. One pass collects for each layer what it was fed:
# $X^\top X$, mean and largest $|x_j|$. Text X itself need not be kept.

# %%
from labutils.lab.layers.calibration import input_statistics, layer_error
from labutils.lab.layers.linears import change_weights_, linear_layers, set_weight_, weight_of
from labutils.lab.models.calibration_text import calibration_batches

calibration = calibration_batches(tokenizer, code=8, dialogues=8)
statistics = input_statistics(model, calibration, with_gram=True)
held_out_rows = calibration_batches(tokenizer, code=4, dialogues=4, seed=1)  # other rows, to judge layers by
held_out = input_statistics(model, held_out_rows, with_gram=True)
name, seen = next(iter(statistics.items()))
print(
    f"{len(statistics)} layers; {name}: {seen.rows} inputs of {len(seen.absmax)} numbers, Gram {tuple(seen.gram.shape)}"
)

# %% [markdown]
# The error needs no X, only the Gram matrix $G = X^\top X$ (rows of X are positions). With a row d of $D = W - \hat W$:
#
# $$\lVert X d^\top \rVert^2 = d\, X^\top X\, d^\top = d\,G\,d^\top$$
#
# **Tiny numbers:** d = (1, −1). Two inputs that are always equal have G = [[1, 1], [1, 1]]: the errors cancel, d G dᵀ = 0.
# Independent inputs have G = I, and d G dᵀ = 2.
#
# Chapter 02 ended with a question: may a weight be rounded the *wrong* way on purpose, to make up for its neighbours' errors?
#
# ## Exercise 3.1: best_flip (core)
#
# Write `best_flip(row, rounded, gram, step)`: `row` holds the weights of one output, shape (in,), and `rounded` what they became. Exactly one rounded
# weight may move by one `step`, up or down. Return (column, direction), direction 1 or −1, of the move that lowers d G dᵀ most, or
# `None` if no move lowers it. One product with the Gram matrix is enough for all the moves. 5 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>A move changes one entry of d. Write d − δ·e for it, e being 1 at that column and 0 elsewhere, and expand the product. Which two terms does δ bring in?</details>
# <details><summary>Hint 2</summary>d = (0.4, 0.3), G = [[1, 0.95], [0.95, 1]], step 1. As it is, d G dᵀ is 0.478. Moving the second weight up makes d = (0.4, −0.7) and the product 0.118; moving the first up makes d = (−0.6, 0.3): 0.108.</details>
# <details><summary>Hint 3</summary>The gain of δ at column j is 2 δ (d G)ⱼ − δ² Gⱼⱼ. Which sign of δ can gain at all?</details>


# %%
# EXERCISE best_flip
def best_flip(row, rounded, gram, step):
    """The move of one rounded weight by one step that lowers the output error most."""
    ### BEGIN SOLUTION
    pull = (row - rounded) @ gram
    gains = 2 * step * pull.abs() - step**2 * gram.diagonal()
    column = gains.argmax().item()
    if gains[column] > 0:
        return column, 1 if pull[column] > 0 else -1
    ### END SOLUTION


# %%
# CHECK best_flip
from labutils.course.checks import ch03

ch03.best_flip(best_flip)

# %% [markdown]
# What do such moves gain on LabLM? Below, 16 rows of a layer are rounded to 3 bits, and then moved weight by weight, each move found the slow
# way, by trying all. **Predict:** which share of the nearest codes' output error is left on rows of text that the search never saw?

# %%
my_flips = predict("% of rounding's output error that moves of single weights leave on unseen text", None, unit="%")


# %%
def moved_on(row, now, gram, step):
    """The codes after one best move after another, until none helps; and how many moves that took."""
    one_each = step * torch.cat([torch.eye(len(row)), -torch.eye(len(row))])
    for moves in itertools.count():
        tried = torch.cat([now[None], (now + one_each).clamp(-3 * step, 3 * step)])
        best = (((row - tried) @ gram) * (row - tried)).sum(dim=1).argmin()
        if best == 0:
            return now, moves
        now = tried[best]


# %%
name = "model.layers.2.self_attn.o_proj"
piece = weight_of(dict(linear_layers(model))[name])[:16].double()
step = piece.abs().amax(dim=1, keepdim=True) / 3  # codes −3 … 3
nearest = (piece / step).round() * step
made = [moved_on(*each, statistics[name].gram.double(), s) for *each, s in zip(piece, nearest, step, strict=True)]
moved = torch.stack([row for row, _ in made])
for label, seen in (("calibration text", statistics), ("unseen text", held_out)):
    before, after = (layer_error(piece, w, seen[name].gram.double()) for w in (nearest, moved))
    print(f"output error on {label}: nearest {before:.4f}, moved {after:.4f}, that is {after / before:.0%}")
share = (moved != nearest).double().mean()
print(f"{sum(moves for _, moves in made)} moves; {share:.0%} of the weights no longer have their nearest code")
my_flips.compare(100 * after / before)

# %% [markdown]
# <details><summary>Explain</summary>
#
# Each move makes one weight worse, and the sum better: the inputs of a layer are correlated, and errors at correlated inputs can cancel.
# Such a search stops where no *single* move helps. GPTQ, in section 3, goes through the columns once and makes up for each error in all
# the columns to come.
# </details>

# %% [markdown]
# ## 2 · Round to nearest
#
# **RTN** is the method that all others have to beat: chapter 02's `fake_quantize` on every linear layer, and for FP8, which many servers
# run today, its float twin. "Row" means one scale a row, otherwise a group of 64 shares one. The embedding, which is
# also the head, stays in 16 bits. Sizes count codes, scales and zero points, in the bits they need.
#
# **Predict:** where does the model break: at 4, 3 or 2 bits? And what breaks first: code, intents or translations? How many of 40 translations
# survive 3 bits with one scale a row?

# %%
my_translations = predict("translations of 40 that survive rounding to 3 bits by row", None)

# %%
from labutils.quantization.affine import Scheme, choose_qparams, dequantize, fake_quantize, quantize
from labutils.quantization.floats import E4M3, fake_quantize_float
from labutils.quantization.model_weights import model_bytes


def scheme_of(bits, group_size=64):
    shared = {"granularity": "group", "group_size": group_size} if group_size else {"granularity": "channel"}
    return Scheme(bits=bits, symmetric=False, scale_dtype=torch.float16, **shared)


def size_of(scheme, zero_bits=None):
    return model_bytes(model, {name: scheme for name, _ in linear_layers(model)}, zero_bits=zero_bits)


def changed(change):
    return change_weights_(copy.deepcopy(model), change)


look(
    "FP8 (E4M3), row",
    changed(lambda _, weight: fake_quantize_float(weight, E4M3, Scheme())),
    size_of(Scheme(scale_dtype=torch.float16)),
)
ROUNDINGS = {"RTN 8, row": (8, None), "RTN 4": (4, 64), "RTN 3": (3, 64), "RTN 3, row": (3, None), "RTN 2": (2, 64)}
for name, (bits, group_size) in ROUNDINGS.items():
    scheme = scheme_of(bits, group_size)
    look(name, changed(lambda _, weight, scheme=scheme: fake_quantize(weight, scheme)), size_of(scheme))

# %%
names = ["float32", "FP8 (E4M3), row", *ROUNDINGS]
losses = {"code": [table[n][1] for n in names], "dialogues": [table[n][3] for n in names]}
relative = {text: [100 * q.difference / q.baseline_bits_per_byte for q in those] for text, those in losses.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for index, (text, percent) in enumerate(relative.items()):
    left.plot(range(len(names)), percent, label=text, linestyle="none", **series_style(index))
left.set_yscale("symlog", linthresh=1)
worse = ", ".join(f"{percent[names.index('RTN 3, row')]:+.0f}% on {text}" for text, percent in relative.items())
left.set(ylabel="more bits per byte (%)", title=f"3 bits by row: {worse} …")
for index, task in enumerate(TASKS, start=2):
    right.plot(range(len(names)), [100 * table[n][2][task] for n in names], label=task, **series_style(index))
left_over = table["RTN 3, row"][2]["to_english"]
my_translations.compare(40 * left_over)
right.set(ylabel="exact replies (% of 40)", title=f"… and {left_over:.1%} of the translations right", ylim=(-5, 105))
for axes in (left, right):
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.grid(alpha=0.25)
    axes.legend()
plt.show()

# %% [markdown]
# *Left: how many more bits held-out text costs after each rounding (linear up to 1%, then logarithmic). Right: the share
# of service requests answered exactly right.*
#
# <details><summary>Explain</summary>
#
# Do tasks break before bits per byte do? Two things happen at once. The tasks are *dialogues*, and there the loss at 3 bits is larger
# than on *code*: bits per byte see the damage if they are measured on the right text. And a translation is right only if
# *every* token is, so small losses multiply.
# </details>
#
# Look at what the 3-bit model says.

# %%
three_bits_model = changed(lambda _, weight: fake_quantize(weight, scheme_of(3, None)))
said = score_task(three_bits_model, tokenizer, "to_english", count=40)
for index in [i for i, right in enumerate(said.is_right) if not right][:3]:
    print(f"--- asked for: {said.references[index]}\n--- 3 bits say: {said.predictions[index]}")

# %% [markdown]
# **Hear them talk, side by side.** Both models continue the same code, token by token. A token is red and bold where the *other* model would have
# put a different one in its place: that is a flip. How far do they agree before they part? Move the slider by its handle or with the arrow
# keys; the figure below it shows both texts at their ends, and the text below that shows what each flip would have been.

# %%
from labutils.lab.plots.quantization import draw_tokens

code = "<|endoftext|>import os\n\n\ndef read_lines(path):\n    "
code_ids = tokenizer(code, return_tensors="pt", add_special_tokens=False)["input_ids"]


def continued(writer, reader, count=40):
    """What one model writes, token by token, each with what another would have put in its place."""
    ids = writer.generate(code_ids, max_new_tokens=count, do_sample=False, pad_token_id=1)
    with torch.no_grad():
        choices = reader(ids).logits[0, code_ids.shape[1] - 1 : -1].argmax(dim=-1)
    written = ids[0, code_ids.shape[1] :]
    return [tuple(tokenizer.decode([token]) for token in pair) for pair in zip(written, choices, strict=True)]


talk = {
    "float32 (red: 3 bits would differ)": continued(model, three_bits_model),
    "3 bits by row (red: float32 would differ)": continued(three_bits_model, model),
}


def draw_talk(axes, count):
    shown = {name: [(one, one != other) for one, other in tokens[:count]] for name, tokens in talk.items()}
    draw_tokens(axes, shown, lines=9)


picture_slider("tokens", 41, draw_talk, figsize=(8, 3.2))

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
draw_talk(axes, 40)
plt.show()
for name, tokens in talk.items():
    flips = [f"{one!r} for {other!r}" for one, other in tokens if one != other]
    print(f"{name.split(' (')[0]}: {len(flips)} flips in {len(tokens)} tokens: {', '.join(flips)}")

# %% [markdown]
# *The same 40 tokens of each model as in the slider; red and bold where the other model would have chosen another token.* Once the texts have
# parted, each model goes on from its own words, and a comparison of the two *texts* would count every token as an error. Flips do not: both
# models read the same text at each place.

# %% [markdown]
# ## 3 · GPTQ: let the others make up for it
#
# Round-to-nearest treats every weight in isolation. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds column after column, and
# moves the columns still to come so that the *output* stays where it was. Where to? Take two columns. The first is rounded, so its error
# d₁ is fixed. The second may still move: which d₂ makes the output error least?
#
# $$d\,G\,d^\top = G_{11} d_1^2 + 2\,G_{12} d_1 d_2 + G_{22} d_2^2 \quad\text{is least for}\quad d_2 = -\frac{G_{12}}{G_{22}}\, d_1$$
#
# **Tiny numbers:** w = (0.4, 0.4), step 1, G = [[1, 0.95], [0.95, 1]]. The first rounds to 0, so d₁ = 0.4 and d₂ = −0.38: the second
# moves to 0.78 and rounds to 1.

# %% [markdown]
# With many columns one needs this for every column and all those behind it. A Cholesky factor holds all of it at once: with
# $H = 2X^\top X + \lambda I$ and U upper triangular, $U^\top U = H^{-1}$ (λ is 1% of H's mean diagonal, or H might have no inverse),
#
# $$e_j = \frac{w_j - \hat w_j}{U_{jj}}, \qquad w_k \leftarrow w_k - e_j\,U_{jk} \quad (k > j)$$
#
# For two columns −U₁₂/U₁₁ is the G₁₂/G₂₂ above, up to λ. What do the two methods give for x = (1, 1)?

# %%
from labutils.lab.layers.calibration import inverse_factor
from labutils.quantization.gptq import gptq

tiny, gram = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.95], [0.95, 1.0]])
grid = choose_qparams(torch.tensor([[7.0, 0.0]]), Scheme(bits=4))  # a step of 1
nearest, compensated = dequantize(quantize(tiny, grid), grid), gptq(tiny, gram, grid)
factor = inverse_factor(gram)
print("U =", factor.tolist(), f"and -U12/U11 = {-factor[0, 1] / factor[0, 0]:.3f}")
for label, w in (("exact", tiny), ("to nearest", nearest), ("GPTQ", compensated)):
    print(f"{label:<11} w = {w.tolist()[0]}, output {w.sum():.1f}, output error {layer_error(tiny, w, gram):.3f}")

# %% [markdown]
# ## Exercise 3.2: gptq_round (core)
#
# Write `gptq_round(weight, factor, scale, qmax)`: the rounded weight (out, in) as floats. `factor` is U (in, in),
# `scale` holds one step a row (out,), codes are round(w / scale), clamped to −qmax … qmax. Do not change `weight`.
# 6 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Clone the weight. For each column j: round it, divide the error by U[j, j], and subtract its outer product with row j of U from the columns after j.</details>
# <details><summary>Hint 2</summary>With two columns: the first is rounded, e = 0.4 / U₁₁. What does the second lose, and what would a third lose? Which row of U says so?</details>
# <details><summary>Hint 3</summary><code>work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]</code></details>


# %%
# EXERCISE gptq_round
def gptq_round(weight, factor, scale, qmax):
    """A weight rounded column by column with error compensation."""
    ### BEGIN SOLUTION
    work, rounded = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = torch.round(work[:, j] / scale).clamp(-qmax, qmax) * scale
        error = (work[:, j] - rounded[:, j]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return rounded
    ### END SOLUTION


# %%
# CHECK gptq_round
ch03.gptq_round(gptq_round)

# %% [markdown]
# **Step through it.** Below, 12 rows and 24 columns of a layer. The columns left of the line are rounded; those right of it have moved
# as the formula for two columns says, with matrices in place of numbers. Do the last columns move more than the first? (`draw_step`
# draws any step; the figure below the slider shows three.)

# %%
name, COLUMNS = "model.layers.2.self_attn.o_proj", 24
piece = weight_of(dict(linear_layers(model))[name])[:12, :COLUMNS]
small = statistics[name].gram[:COLUMNS, :COLUMNS]
small = small + 0.01 * small.diagonal().mean() * torch.eye(COLUMNS)
in_steps = choose_qparams(piece, Scheme(bits=3))
all_rounded = gptq(piece, small, in_steps, damping=0.0)


def after_columns(done):
    """The piece with `done` columns rounded by GPTQ, and the others where they make up best for them."""
    fixed = piece[:, :done] - all_rounded[:, :done]
    moved = piece[:, done:] + fixed @ small[:done, done:] @ torch.linalg.inv(small[done:, done:])
    return torch.cat([all_rounded[:, :done], moved], dim=1)


def draw_step(axes, done):
    changed_by = (after_columns(done) - piece) / in_steps.scale
    axes.imshow(changed_by, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    axes.axvline(done - 0.5, color="black", linewidth=1)
    error = layer_error(piece, after_columns(done), small)
    axes.set(xlabel="column", ylabel="row")
    axes.set_title(f"after {done} of {COLUMNS}: output error {error:.3f}", fontsize="medium")


picture_slider("columns", COLUMNS + 1, draw_step, figsize=(6, 3))

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
for axes, done in zip(panels, (1, COLUMNS // 2, COLUMNS), strict=True):
    draw_step(axes, done)
figure.colorbar(panels[-1].images[0], ax=panels, label="moved by (steps)")
plt.show()
to_nearest = layer_error(piece, fake_quantize(piece, Scheme(bits=3)), small)
moves = ((all_rounded - piece) / in_steps.scale).abs().mean(dim=0)
print(f"output error of rounding to nearest: {to_nearest:.3f}")
print(
    f"GPTQ moved a weight of the first 8 columns by {moves[:8].mean():.2f} steps, of the last 8 by {moves[-8:].mean():.2f}"
)

# %% [markdown]
# *How far each weight of a small piece has moved, in steps, after 1, 12 and all 24 columns.*
#
# `labutils` does the same in blocks of 128 columns (the errors of a block reach the rest in one matrix product) and, with
# `act_order`, begins with the columns that have the largest input energy. Scales are RTN's, so only the rounding differs. If H = I
# there is nothing to gain, and both agree bit for bit.
#
# **Predict:** in how many of the 42 layers does GPTQ beat rounding on rows that it never saw?

# %%
my_wins = predict("layers of 42 in which GPTQ beats rounding on unseen rows", None)

# %%
scheme = scheme_of(3)


def with_gptq(seen):
    return changed(lambda name, w: gptq(w, seen[name].gram, choose_qparams(w, scheme), act_order=True))


gptq_model = with_gptq(statistics)
errors = []
for (name, layer), (_, after) in zip(linear_layers(model), linear_layers(gptq_model), strict=True):
    weight, gram = weight_of(layer), held_out[name].gram
    errors.append([layer_error(weight, w, gram) for w in (fake_quantize(weight, scheme), weight_of(after))])
errors = torch.tensor(errors)
wins = int((errors[:, 1] < errors[:, 0]).sum())
my_wins.compare(wins)
figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
for index, label in enumerate(("round to nearest", "GPTQ")):
    axes.semilogy(range(len(errors)), 100 * errors[:, index], linestyle="none", label=label, **series_style(index))
title = f"GPTQ beats rounding in {wins} of {len(errors)} layers on rows it never saw (3 bits)"
axes.set(xlabel="layer (q, k, v, o, gate, up, down of each block)", ylabel="output error (%)", title=title)
axes.legend()
axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# *Each layer's relative output error at 3 bits, groups of 64, on rows that were not calibrated on.*
#
# Here all Gram matrices come from one pass of the *float* model. GPTQ as published goes block by block, and each block is calibrated on
# what the quantized blocks before it put out. The row "block by block" below does so.
#
# Which text should the calibration show? **Predict:** GPTQ that has only ever seen *code*: better or worse than RTN at
# translating? How many of 40 translations are right?

# %%
my_code_only = predict("translations of 40 right after GPTQ that saw only code", None)

# %%
code_only = input_statistics(model, calibration_batches(tokenizer, code=16, dialogues=0), with_gram=True)
look("GPTQ 3, code only", with_gptq(code_only), size_of(scheme))
look("GPTQ 3", gptq_model, size_of(scheme))
del code_only, gptq_model
sequential = copy.deepcopy(model)
for block in range(model.config.num_hidden_layers):
    inside = lambda name, block=block: f"layers.{block}." in name  # noqa: E731
    seen = input_statistics(sequential, calibration, with_gram=True, only=inside)
    for name, layer in linear_layers(sequential):
        if inside(name):
            set_weight_(
                layer, gptq(weight_of(layer), seen[name].gram, choose_qparams(weight_of(layer), scheme), act_order=True)
            )
look("GPTQ 3, block by block", sequential, size_of(scheme))
del sequential
low, high = paired_quality(bits_of["GPTQ 3, block by block"], bits_of["GPTQ 3"]).interval
print(f"block by block minus at once: [{low:+.4f}, {high:+.4f}] bits per byte on code, paired")

# %%
rows = ["RTN 3", "GPTQ 3, code only", "GPTQ 3"]
figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
for index, task in enumerate(TASKS):
    places = [i + 0.36 * index for i in range(3)]
    color = series_style(index)["color"]
    axes.bar(places, [100 * table[row][2][task] for row in rows], width=0.34, label=task, color=color)
labels = [f"{row}\ncode {table[row][1].difference:+.3f}, dialogues {table[row][3].difference:+.3f}" for row in rows]
axes.set_xticks([i + 0.18 for i in range(3)], labels)
right_of = {row: table[row][2]["to_english"] for row in rows}
my_code_only.compare(40 * right_of["GPTQ 3, code only"])
axes.set(
    ylabel="exact replies (% of 40)",
    title=f"Translations right: RTN {right_of['RTN 3']:.1%}, GPTQ that saw only code {right_of['GPTQ 3, code only']:.1%}",
)
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# *Both task scores of three 3-bit models of the same size, and below each its loss in bits per byte, on held-out code and on
# dialogues.*
#
# <details><summary>Explain</summary>
#
# GPTQ keeps what the calibration text uses, and pays with directions that it never saw. Judged by bits per
# byte on code, code-only calibration looks like a success. Bits per byte on dialogues give it away, so measure on
# the domain that you serve.
# </details>

# %% [markdown]
# ## 4 · AWQ, clipping, HQQ
#
# An error in a weight matters as much as its input is large. AWQ (Lin et al. 2023, arXiv:2306.00978) makes the columns that
# meet large inputs larger *before* rounding, and divides the inputs by the same s in whatever comes before (a norm's
# gain, or a linear layer): $(x/s)(W s)^\top = xW^\top$.
#
# $$\tilde s_j = \operatorname{mean}|x_j|^{\alpha}, \qquad s_j = \frac{\tilde s_j}{\sqrt{\max \tilde s \cdot \min \tilde s}}, \qquad \alpha \in \{0, 0.05, \dots, 0.95\}$$
#
# Each α is tried, and the one with the least output error stays; α = 0 is plain rounding. **Tiny numbers:** 2 bits,
# one row, and an input that is ten times as large as the others.

# %%
from labutils.quantization.awq import ALPHAS, awq_scale, awq_scale_, clipped_qparams, scale_losses

tiny, mean_abs = torch.tensor([[0.3, 1.0, -0.8]]), torch.tensor([10.0, 1.0, 1.0])
for alpha in (0.0, 0.5):
    s = awq_scale(mean_abs, alpha)
    rounded = fake_quantize(tiny * s, Scheme(bits=2)) / s
    error = (((tiny - rounded) * mean_abs) ** 2).sum()
    print(f"α = {alpha}: s = {s.numpy().round(2)}, rounded = {rounded.numpy().round(2)[0]}, output error {error:.2f}")

# %% [markdown]
# ## Exercise 3.3: best_alpha (core)
#
# Write `best_alpha(weight, mean_abs, gram, scheme)`: the α of `ALPHAS` with the least output error. Use `awq_scale`,
# `fake_quantize(weight, scheme)` and `layer_error(weight, rounded, gram)`. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Multiply the weight's columns by s, round, divide by s again: that weight meets the original inputs.</details>
# <details><summary>Hint 2</summary>With s = (2, 1) the first column is doubled before rounding. What must happen to it afterwards, so that the inputs may stay as they are?</details>
# <details><summary>Hint 3</summary>Collect <code>losses[alpha]</code> in a dict and return <code>min(losses, key=losses.get)</code>.</details>


# %%
# EXERCISE best_alpha
def best_alpha(weight, mean_abs, gram, scheme):
    """The exponent of AWQ's scale with the least output error."""
    ### BEGIN SOLUTION
    losses = {}
    for alpha in ALPHAS:
        s = awq_scale(mean_abs, alpha)
        rounded = fake_quantize(weight * s, scheme) / s
        losses[alpha] = layer_error(weight, rounded, gram)
    return min(losses, key=losses.get)
    ### END SOLUTION


# %%
# CHECK best_alpha
ch03.best_alpha(best_alpha)

# %% [markdown]
# AWQ's second search **clips**: a group's range may shrink to 55%, if that lowers the group's output error (queries and
# keys are left alone). The rows below have AWQ's scale alone, and scale and clipping together.
#
# **HQQ** (Badri and Shaji 2023) wants no text at all. It keeps the scales and solves for zero points z, real numbers now, that leave the weight's
# own error *sparse*: a power p = 0.7 below 1 counts many small errors more than a few large ones. A second unknown E takes over the large
# ones (a *half-quadratic* split), so that z fits the rest:
#
# $$\begin{aligned} &\min_z \sum \lvert W - S\,(Q - z) \rvert^{p}, \qquad Q = \operatorname{clamp}(\operatorname{round}(W / S + z)) \\
# E &\leftarrow \operatorname{shrink}\big(W - S\,(Q - z)\big), \qquad \operatorname{shrink}(x) = \operatorname{sign}(x)\, \max\big(|x| - |x|^{p-1} / \beta,\, 0\big) \\
# z &\leftarrow \operatorname{mean}\big(Q - (W - E) / S\big), \qquad \beta \leftarrow 1.01\,\beta \end{aligned}$$
#
# The mean goes over a group. After at most 20 such steps the best z stays. **Tiny numbers:** with p = 0.5 and β = 1, shrink(4) = 4 − 1/2 = 3.5 and
# shrink(0.01) = 0: the small error is z's to mend, the large one is not. A real z takes 16 bits where an integer took 3.

# %%
from labutils.quantization.hqq import hqq


def clipped(name, weight, seen):
    return clipped_qparams(name, weight, seen[name].gram, scheme)


scaled = copy.deepcopy(model)
with torch.no_grad():
    logits, ids = model(calibration[0]).logits, calibration[0]
    scaled_statistics = awq_scale_(scaled, statistics, scheme)
    print(f"scaled, not yet rounded: logits moved by at most {(scaled(ids).logits - logits).abs().max():.1e}")


def awq_round(name, weight):
    qparams = clipped(name, weight, scaled_statistics)
    return dequantize(quantize(weight, qparams), qparams)


look("HQQ 3", changed(lambda _, w: dequantize(*hqq(w, scheme))), size_of(scheme, zero_bits=16))
look(
    "AWQ 3, scale only", change_weights_(copy.deepcopy(scaled), lambda _, w: fake_quantize(w, scheme)), size_of(scheme)
)
look("AWQ 3", change_weights_(scaled, awq_round), size_of(scheme))

# %% [markdown]
# Did the scale alone help here? AWQ's idea needs inputs that stick out. In models of billions of parameters a
# few do behind the norms, by a factor of up to 20 (Dettmers et al. 2022, arXiv:2208.07339). Where does LabLM have any?

# %%
for kind in ("q_proj", "o_proj", "gate_proj", "down_proj"):
    peaks = [seen.absmax for name, seen in statistics.items() if name.endswith(kind)]
    ratios = sorted((peak.max() / peak.median()).item() for peak in peaks)
    reach = (torch.cat(peaks) >= 6).float().mean().item()
    print(
        f"inputs of {kind:<9} |x| up to {max(peak.max().item() for peak in peaks):5.1f}; the largest channel is {ratios[0]:4.1f} "
        f"to {ratios[-1]:4.1f} times the median one; {reach:4.0%} of the channels reach 6"
    )

# %% [markdown]
# Compare the inputs behind the norms (q, gate) with those behind the SwiGLU (down): LabLM has outliers of its own in the latter. Behind
# the norms, where large models have theirs, we **inject** some: eight channels become 30 times as large (norm gain × 30, the
# next weights' columns ÷ 30). The model computes what it computed. This only simulates what large models have by nature.

# %%
from labutils.quantization.folding import inject_outliers_


def seeded():
    return torch.Generator().manual_seed(0)


injected = copy.deepcopy(model)
inject_outliers_(injected, channels=8, factor=30.0, generator=seeded())
injected_statistics = input_statistics(injected, calibration, with_gram=True)
with torch.no_grad():
    print(f"injected: logits moved by at most {(injected(ids).logits - logits).abs().max():.1e}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
gate, down = "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.down_proj"
curves = {
    "gate_proj": statistics[gate],
    "gate_proj, injected": injected_statistics[gate],
    "down_proj": statistics[down],
}
for index, (label, seen) in enumerate(curves.items()):
    sizes = seen.absmax.sort(descending=True).values
    axes.loglog(range(1, len(sizes) + 1), sizes, label=label, markevery=[0, 7], **series_style(index))
ratio = (injected_statistics[gate].absmax.max() / statistics[gate].absmax.max()).item()
axes.set(xlabel="input channel of block 2, largest first", ylabel="max |x| over the calibration text")
axes.set_title(f"The largest injected channel is {ratio:.0f} times the largest that gate_proj had")
axes.legend()
plt.show()

# %% [markdown]
# *The largest value of each input channel of two layers, sorted, and of one of them after the injection (marks: the first and the
# eighth channel).*
#
# Now AWQ's ablation ladder (its table 1): keep 1% of the columns in floating point and round the rest to 4 bits. Which
# 1%? The control that makes it an experiment is a **random** 1%. The ladder stands on LabLM as it is, and on the injected model. There,
# know what the injection fixes beforehand: it makes eight channels of 256 large, of which 1% can keep three, and it divides just those
# columns' weights by 30, so a choice by the weights' norm is bound to miss them.

# %%
four_bits = scheme_of(4)


def protecting(score, share=0.01):
    def change(name, w):
        rounded, kept = fake_quantize(w, four_bits), score(name, w).topk(round(share * w.shape[1])).indices
        rounded[:, kept] = w[:, kept]
        return rounded

    return change


def code_bits(variant):
    return bits_by_document(variant, tokenizer, documents)


def ladder_of(source, seen):
    """The bits of each document, for five ways to round a model to 4 bits."""
    order = seeded()
    scores = {
        "a random 1%": lambda name, w: torch.rand(w.shape[1], generator=order),
        "1% by weight norm": lambda name, w: w.norm(dim=0),
        "1% by mean |x|": lambda name, w: seen[name].mean_abs,
    }
    rounded = change_weights_(copy.deepcopy(source), lambda _, w: fake_quantize(w, four_bits))
    found = {"protect nothing": code_bits(rounded)}
    found |= {way: code_bits(change_weights_(copy.deepcopy(source), protecting(s))) for way, s in scores.items()}
    scaled = copy.deepcopy(source)
    awq_scale_(scaled, seen, four_bits)
    scaled = change_weights_(scaled, lambda _, w: fake_quantize(w, four_bits))
    return found | {"AWQ's scale, nothing kept": code_bits(scaled)}


# %%
def told_apart(measured, of, against):
    """Whether one way surely loses less than another: in words."""
    low, high = paired_quality(measured[of], measured[against]).interval
    return "less" if high < 0 else "more" if low > 0 else "not told apart"


ladders = {"LabLM": ladder_of(model, statistics), "injected": ladder_of(injected, injected_statistics)}
for kind, measured in ladders.items():
    for way, bits in measured.items():
        verdict = told_apart(measured, way, "protect nothing") if way != "protect nothing" else ""
        quality = paired_quality(bits, baseline)
        low, high = quality.interval
        print(f"{kind:<8} {way:<26} {quality.difference:+.4f} [{low:+.4f}, {high:+.4f}]  {verdict}")
    scaled = told_apart(measured, "AWQ's scale, nothing kept", "1% by mean |x|")
    print(f"{kind:<8} loss of AWQ's scale against keeping 1% by mean |x|: {scaled}")


# %%
def draw_costs(measured, title, axes, base=baseline):
    """Each variant's loss in bits per byte with its paired 95% interval."""
    for index, (label, bits) in enumerate(measured.items()):
        quality = paired_quality(bits, base)
        low, high = quality.interval
        bars = [[max(quality.difference - low, 0)], [max(high - quality.difference, 0)]]
        axes.errorbar([quality.difference], [label], xerr=bars, capsize=4, markersize=8, **series_style(index))
    axes.set(xlabel="more bits per byte than float32 (95% interval)", title=title)
    axes.margins(y=0.15)
    axes.invert_yaxis()
    axes.grid(alpha=0.25)


figure, panels = plt.subplots(1, 2, figsize=(13, 3.2), layout="constrained")
for axes, (kind, measured) in zip(panels, ladders.items(), strict=True):
    less = [way for way in measured if told_apart(measured, way, "protect nothing") == "less"]
    draw_costs(measured, f"{kind}: surely better than nothing: {len(less)} of 4", axes)
plt.show()

# %% [markdown]
# *The loss at 4 bits, groups of 64, with different columns kept in floating point (left LabLM as it is, right with injected
# outliers); the last row keeps none, but scales.*
#
# Read the words printed above. On the injected model the activations find planted columns, and the weights' norm cannot, because the
# injection made those weights small; that row says nothing about weight norms in general. On LabLM itself see whether *any* choice of 1%
# is told apart from none. And compare AWQ's scale with keeping columns: it does without a second number format.

# %% [markdown]
# ## 5 · Activations in integers too
#
# With weights alone in integers, each product still happens in floats. W8A8 rounds the inputs as well and multiplies
# int8 × int8 → int32: one scale for each output row, and for the inputs either a scale for **each token** (dynamic) or
# one scale **fixed on calibration text** (static; cheaper, and helpless against surprises).
#
# One huge channel ruins a token's scale for all its channels. **Predict:** which of the two suffers more from outliers, and how many times
# as much does static lose as dynamic?
#
# Servers with recent GPUs often use FP8 on both sides instead. E4M3 keeps its relative error over four powers of ten (chapter 02), so
# one huge channel should cost the others little.

# %%
my_static = predict(
    "W8A8 with outliers: the loss with static scales over the loss with dynamic ones", None, unit="times"
)

# %%
from labutils.quantization.integer_linear import use_integers_


def use_fp8_(variant):
    """Weights by row and inputs by token in E4M3; the product stays in float32."""
    change_weights_(variant, lambda _, w: fake_quantize_float(w, E4M3, Scheme()))
    by_token = Scheme(granularity="token")
    for _, layer in linear_layers(variant):
        layer.register_forward_pre_hook(lambda _, args: (fake_quantize_float(args[0], E4M3, by_token),))
    return variant


activations = {}
for kind, source, seen in (("LabLM", model, statistics), ("injected", injected, injected_statistics)):
    activations[f"{kind}, int8 dynamic"] = code_bits(use_integers_(copy.deepcopy(source)))
    activations[f"{kind}, int8 static"] = code_bits(use_integers_(copy.deepcopy(source), static=seen))
    activations[f"{kind}, FP8 dynamic"] = code_bits(use_fp8_(copy.deepcopy(source)))
for label, bits in activations.items():
    print(f"{label:<24} {paired_quality(bits, baseline)}")
fp8_against = {kind: told_apart(activations, f"{kind}, FP8 dynamic", f"{kind}, int8 dynamic") for kind in ladders}
print("loss of FP8 against int8, both dynamic:", fp8_against)
lost = {way: paired_quality(activations[f"injected, int8 {way}"], baseline).difference for way in ("static", "dynamic")}
my_static.compare(lost["static"] / lost["dynamic"])

# %% [markdown]
# Three answers to outliers. **SmoothQuant** (Xiao et al. 2022, arXiv:2211.10438, equation 4) moves half of the difficulty
# into the weights. It divides input j by
#
# $$s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1-\alpha}}, \qquad \alpha = 0.5$$
#
# and multiplies the weight's column by it, folded like AWQ's scale. **Tiny numbers:** max|X| = 64 and max|W| = 1 give
# s = 8: afterwards both reach 8.
#
# **LLM.int8** (Dettmers et al. 2022) splits the product: the few columns of x in which some token reaches |x| ≥ 6 stay in
# floating point, the others go through int8.
#
# $$x W^\top \approx \sum_{j \in O} x_j w_j + s_x s_w \Big(\sum_{j \notin O} q^x_j\, q^w_j\Big), \quad O = \{j : \exists\, \text{token } |x_j| \ge 6\}$$
#
# A colleague sends you this split product for review. "It runs, and the shapes are right." On four tokens with two outliers it errs more than
# int8 without any split:


# %%
def colleagues_product(x, weight, threshold):
    outliers = (x >= threshold).any(dim=0)
    regular = fake_quantize(x, Scheme(granularity="token"))
    rounded = fake_quantize(weight, Scheme())
    return regular @ rounded.T + x[:, outliers] @ weight[:, outliers].T


x, w = torch.randn(4, 8, generator=seeded()), torch.randn(3, 8, generator=seeded())
x[0, 2], x[1, 5] = 40.0, -30.0
for label, threshold in (("int8, no split", 1e9), ("the colleague's split", 6.0)):
    error = (colleagues_product(x, w, threshold) - x @ w.T).norm() / (x @ w.T).norm()
    print(f"{label:<22} relative error {error:.3f}")

# %% [markdown]
# ## Exercise 3.4: split_product (core)
#
# **Find the bugs**, and write `split_product(x, weight, threshold)` without them, for x (tokens, in) and weight (out, in). `fake_quantize` rounds:
# x with `Scheme(granularity="token")`, the weight with `Scheme()` (8 bits, one scale a row).
# 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>There are two. Which of the two outliers does the mask find? And how often is its column's product in the result?</details>
# <details><summary>Hint 2</summary>x = (1, 40, 2) with threshold 6: one column is split off. Which two small products add up to the whole? And does the 40 still set the scale of 1 and 2?</details>
# <details><summary>Hint 3</summary><code>outliers = (x.abs() >= threshold).any(dim=0)</code>, then <code>x.masked_fill(outliers, 0)</code>.</details>


# %%
# EXERCISE split_product
def split_product(x, weight, threshold):
    """x · Wᵀ with outlier columns in floats and the rest in int8."""
    ### BEGIN SOLUTION
    outliers = (x.abs() >= threshold).any(dim=0)
    regular = fake_quantize(x.masked_fill(outliers, 0), Scheme(granularity="token"))
    rounded = fake_quantize(weight.masked_fill(outliers, 0), Scheme())
    return regular @ rounded.T + x[:, outliers] @ weight[:, outliers].T
    ### END SOLUTION


# %%
# CHECK split_product
ch03.split_product(split_product)

# %% [markdown]
# **Rotation** (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456) mixes all channels by an orthogonal Q, so that none
# stands out: $x W^\top = (xQ)(WQ)^\top$. A favourite Q is Hadamard's matrix, whose entries are all ±1/√n:
#
# $$H_1 = 1, \qquad H_{2n} = \frac{1}{\sqrt 2} \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}$$
#
# It also needs no matrix product. **Tiny numbers:** (a, b) → (a + b, a − b)/√2. For four numbers do that with neighbours, (a, b) and
# (c, d), then with the results two places apart: (a + b) ± (c + d) and (a − b) ± (c − d), all over 2. Such a network is a **butterfly**:
# n log₂ n additions instead of n² products, which is why it may run *online*, between two layers.
#
# ## Exercise 3.5: butterfly
#
# Write `butterfly(x)`: x·H along the last axis, whose length is a power of two, by additions and subtractions alone and one division at
# the end. x may have any shape. 7 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Pass after pass with distance 1, 2, 4, …, n/2. In a pass, each number meets the one so many places behind it.</details>
# <details><summary>Hint 2</summary><code>y.unflatten(-1, (-1, 2, distance))</code> puts the partners side by side along the axis before the last.</details>
# <details><summary>Hint 3</summary>With a and b those two halves, <code>torch.stack([a + b, a - b], dim=-2).flatten(-3)</code> puts them back.</details>


# %%
# EXERCISE butterfly
def butterfly(x):
    """The Hadamard transform of the last axis."""
    ### BEGIN SOLUTION
    y, distance = x, 1
    while distance < x.shape[-1]:
        pairs = y.unflatten(-1, (-1, 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    return y / x.shape[-1] ** 0.5
    ### END SOLUTION


# %%
# CHECK butterfly
ch03.butterfly(butterfly)

# %% [markdown]
# **Turn it yourself.** A plane rotation by 45° in place of each sum and difference is Hadamard's matrix again, up to signs. With a smaller
# angle the outlier melts only a little. At which angle is the largest number smallest? (`turned` gives the numbers of any angle.)


# %%
def turned(x, degrees):
    """x through a butterfly of plane rotations; its length stays."""
    y, distance, angle = x, 1, math.radians(degrees)
    while distance < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(dim=-2)
        parts = [a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)]
        y, distance = torch.stack(parts, dim=-2).flatten(-3), 2 * distance
    return y


outlier = torch.randn(64, generator=torch.Generator().manual_seed(0)).index_fill(0, torch.tensor([21]), 20.0)


def draw_turned(axes, degrees):
    now = turned(outlier, degrees)
    axes.stem(now.numpy(), basefmt="C7-", markerfmt=".")
    axes.set(xlabel="channel", ylabel="x", ylim=(-22, 22))
    axes.set_title(f"{degrees}°: max |x| {now.abs().max():.1f}, length {now.norm():.2f}")


picture_slider("degrees", 46, draw_turned, figsize=(6, 2.8))

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained", sharey=True)
for axes, degrees in zip(panels, (0, 15, 45), strict=True):
    draw_turned(axes, degrees)
plt.show()

# %% [markdown]
# *One outlier among 64 numbers, and what rotations by 15° and 45° make of it. The length stays the same.*
#
# In the model, the residual stream is rotated inside the weights, once and for all: a norm without a gain commutes with a rotation, so
# the gains are folded into the next layers first. (The head needs a matrix of its own then, where it was tied to the embedding.) The inputs of
# `down_proj` stand behind a product, and are rotated online. SpinQuant (Liu et al. 2024, arXiv:2405.16406) *learns* the offline
# rotations on calibration text and keeps Hadamard's matrix for the online ones.

# %%
from labutils.quantization.rotation import fold_gains_, hadamard, rotate_, rotated_inputs

rotation, x = hadamard(256, generator=seeded()), torch.randn(4, 256, generator=seeded())
normed = lambda x: x / x.square().mean(dim=-1, keepdim=True).sqrt()  # noqa: E731
gain = model.model.layers[0].input_layernorm.weight.detach()
for label, g in (("without a gain", 1.0), ("with its gain", gain)):
    apart = ((normed(x) * g) @ rotation - normed(x @ rotation) * g).abs().max()
    print(f"norm, then rotation, against rotation, then norm, {label}: at most {apart:.1e} apart")
rotated = copy.deepcopy(injected)
rotate_(rotated, generator=seeded())
with torch.no_grad():
    print(f"LabLM rotated: logits moved by at most {(rotated(ids).logits - logits).abs().max():.1e}")

# %%
from labutils.quantization.smoothquant import smooth_

smooth = copy.deepcopy(injected)
smoothed_statistics = smooth_(smooth, injected_statistics)
after_norms = {name: seen for name, seen in injected_statistics.items() if not name.endswith(("o_proj", "down_proj"))}
gains_only = copy.deepcopy(injected)
fold_gains_(gains_only)
down_only = copy.deepcopy(gains_only)
for block in down_only.model.layers:
    down = block.mlp.down_proj
    block.mlp.down_proj = rotated_inputs(down, hadamard(down.in_features, generator=seeded()))

# %%
W8A8 = {
    "nothing": activations["injected, int8 dynamic"],
    "nothing, static scales": activations["injected, int8 static"],
    "SmoothQuant": code_bits(use_integers_(copy.deepcopy(smooth))),
    "SmoothQuant, static scales": code_bits(use_integers_(copy.deepcopy(smooth), static=smoothed_statistics)),
    "LLM.int8": code_bits(use_integers_(copy.deepcopy(injected), outliers=after_norms)),
    "gains folded": code_bits(use_integers_(copy.deepcopy(gains_only))),
    "rotation": code_bits(use_integers_(copy.deepcopy(rotated))),
}
W4A4 = {
    "nothing": code_bits(use_integers_(copy.deepcopy(injected), bits=4)),
    "SmoothQuant": code_bits(use_integers_(smooth, bits=4)),
    "gains folded": code_bits(use_integers_(gains_only, bits=4)),
    "folded, down_proj rotated": code_bits(use_integers_(down_only, bits=4)),
    "rotation": code_bits(use_integers_(rotated, bits=4)),
}


# %%
def least(measured):
    """The ways whose loss is not told apart from the least one."""
    best = min(measured, key=lambda way: sum(bits for bits, _ in measured[way]))
    return [way for way in measured if way == best or told_apart(measured, way, best) != "more"]


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
draw_costs(W8A8, f"W8A8: {len(least(W8A8))} of {len(W8A8)} ways not told apart from the best", left)
draw_costs(W4A4, f"W4A4: {len(least(W4A4))} of {len(W4A4)} ways not told apart from the best", right)
left.set_xscale("symlog", linthresh=1e-3)
right.set_xscale("log")
for axes in (left, right):
    axes.autoscale(axis="x")
plt.show()
for bits, measured in (("W8A8", W8A8), ("W4A4", W4A4)):
    for label, found in measured.items():
        print(f"{bits} {label:<27} {paired_quality(found, baseline)}")
    print(f"{bits} not told apart from the least loss: {', '.join(least(measured))}")

# %% [markdown]
# *What integer weights and activations cost LabLM with injected outliers: 8 bits (left, linear up to 0.001) and 4 bits
# (right, logarithmic), by the way in which outliers are treated.*
#
# <details><summary>Explain, and be fair</summary>
#
# Our injection sits in the norms' gains, so folding the gains *undoes* it: "gains folded" is
# the control that shows how much is left for the rotation itself. At 4 bits something is left. The row between the two rotates the inputs
# of `down_proj` alone, where LabLM has large values by nature: see how much of the gain is theirs. There |x| ≥ 6 is common (section 4;
# the threshold was found on the residual stream of large models), so LLM.int8 splits only layers behind a norm here, at columns found on
# the calibration text.
# </details>

# %% [markdown]
# ## 6 · The KV cache in few bits
#
# For long texts the cache outgrows the weights (chapter 01). KIVI (Liu et al. 2024, arXiv:2402.02750) rounds it to 2
# bits: **keys by channel** (a group is 32 positions of one channel, because a few channels are large for every token),
# **values by token** (32 channels of one position), and the newest positions in full.
#
# Its codes count upwards from the group's *minimum*, so that zero need not lie in the range (its section 3.1):
#
# $$s = \frac{\max - \min}{2^b - 1}, \qquad \hat x = s \cdot \operatorname{round}\left(\frac{x - \min}{s}\right) + \min$$
#
# **Tiny numbers:** 5, 6, 7, 8 in 2 bits have s = 1 and come back exactly. Chapter 02's affine range would stretch to zero, s = 8/3,
# and return 5.3, 5.3, 8, 8. Keys of models with a key bias, such as Qwen2's, may lie that far from zero.
#
# Servers often take the simpler way, FP8 for each key and value (E4M3, here without any scale).
#
# ## Exercise 3.6: round_keys
#
# Write `round_keys(keys, bits, group_size)`: keys are (batch, heads, positions, head_dim); round them as KIVI does, the same shape
# back. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Which axis must be last for a group to hold positions? Turn it there, and cut it into groups.</details>
# <details><summary>Hint 2</summary>Keys of 8 positions and 4 channels in groups of 4 positions: 2 groups for each channel. Which shape has groups as its last axis but one, and how do you get back?</details>
# <details><summary>Hint 3</summary><code>x.unflatten(-1, (-1, group_size))</code> makes groups, <code>amin(-1, keepdim=True)</code> finds their minima.</details>


# %%
# EXERCISE round_keys
def round_keys(keys, bits, group_size):
    """Keys rounded by channel."""
    ### BEGIN SOLUTION
    groups = keys.transpose(-1, -2).unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (((groups - low) / scale).round() * scale + low).flatten(-2).transpose(-1, -2)
    ### END SOLUTION


# %%
# CHECK round_keys
ch03.round_keys(round_keys)

# %% [markdown]
# `QuantizedKVCache` packs the codes and goes in wherever a Hugging Face model takes a cache. To measure it, the held-out
# texts are read in pieces of 64 tokens, so that later pieces attend to rounded keys and values. The newest 32 positions
# stay in full (KIVI: 128; our texts are short).

# %%
# What the sections above were measured with is not needed any more: its memory serves others.
served = "held_out three_bits_model scaled_statistics injected injected_statistics rotated smooth"
for name in f"{served} smoothed_statistics after_norms gains_only down_only".split():
    globals().pop(name, None)

from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from labutils.lab.data.corpus import stdlib_documents
from labutils.quantization.kv_cache import QuantizedKVCache

texts = [tokenizer(d.text[:3000], add_special_tokens=False)["input_ids"][:255] for d in stdlib_documents("test")]
rows = torch.tensor([[tokenizer.bos_token_id, *text] for text in texts])
sizes = [len(tokenizer.decode(text).encode()) for text in texts]


@torch.no_grad()
def cached_bits(cache):
    nats = torch.zeros(len(rows))
    for piece, behind in zip(rows.split(64, dim=1), rows[:, 1:].split(64, dim=1), strict=True):
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[:, : behind.shape[1]]
        nats += cross_entropy(logits.transpose(1, 2), behind, reduction="none").sum(dim=1)
    return list(zip((nats / math.log(2)).tolist(), sizes, strict=True))


# %%
full = QuantizedKVCache(model.config, bits=8, recent=10**6)  # nothing is ever old enough to be rounded
full_bits = cached_bits(full)
settings = {"KIVI 8": (8, "channel", "token"), "KIVI 4": (4, "channel", "token"), "KIVI 2": (2, "channel", "token")}
settings |= {"2, keys by token": (2, "token", "token"), "2, values by channel": (2, "channel", "channel")}


class FP8Cache(DynamicCache):
    """Keys and values that went through E4M3, the newest as well."""

    def update(self, key_states, value_states, *args, **kwargs):
        rounded = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


caches, kilobytes = {}, {}
for name, (bits, keys, values) in settings.items():
    cache = QuantizedKVCache(model.config, bits=bits, recent=32, keys_along=keys, values_along=values)
    caches[name] = cached_bits(cache)
    recent = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    blocks = [block for layer in cache.layers for half in layer.blocks for block in half]
    codes = sum(block.packed.nbytes for block in blocks)
    kilobytes[name] = [part / 1000 for part in (codes, cache.resident_bytes - recent - codes, recent)]
caches["FP8"] = cached_bits(FP8Cache())
kilobytes["FP8"], fp16 = [full.resident_bytes / 4000, 0, 0], full.resident_bytes / 2000
for name, measured in caches.items():
    smaller = fp16 / sum(kilobytes[name])
    print(f"{name:<21} {smaller:4.2f}x smaller than fp16  {paired_quality(measured, full_bits)}")
for other in ("2, keys by token", "2, values by channel"):
    low, high = paired_quality(caches[other], caches["KIVI 2"]).interval
    print(f"{other} minus KIVI 2: [{low:+.4f}, {high:+.4f}] bits per byte, paired")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained")
by_token = told_apart(caches, "2, keys by token", "KIVI 2")
draw_costs(caches, f"2 bits, loss by token against by channel, keys: {by_token}", left, base=full_bits)
left.set_xlabel("more bits per byte than a full cache (95% interval)")
bottoms = [0.0] * len(kilobytes)
for index, part in enumerate(("codes", "scales and minima", "newest, float32")):
    sizes = [parts[index] for parts in kilobytes.values()]
    right.barh(list(kilobytes), sizes, left=bottoms, label=part, color=series_style(index)["color"])
    bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
right.axvline(fp16, color="0.3", linestyle="--", label="all of it in fp16")
right.invert_yaxis()
right.set(xlabel="kB for 17 texts of 256 tokens", title="Where the bytes are", xticks=range(0, 15_000, 5000))
right.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# *Left: the loss against a full float32 cache on the same 17 texts of 256 tokens, for six ways to round it. Right: what their bytes
# hold.*
#
# Each interval in the figure is against the full cache, so two that overlap do not tell their caches apart. The paired differences
# printed above do: an axis matters here if its interval excludes zero. The paper's larger model fell apart when its values were
# rounded along the other axis; see whether LabLM does. Why are 2 bits not eight times smaller than fp16? The right panel says it: the
# newest positions stay in full, and every 32 numbers carry a scale and a minimum. The cache gets smaller, not
# faster: this version unpacks everything in every step.

# %% [markdown]
# ## 7 · Training with quantization in the loop
#
# At 2 bits, rounding destroys LabLM. Quantization-aware training lets the forward pass see rounded weights, and
# adjusts the real ones behind them. But rounding has the gradient 0 almost everywhere. The **straight-through
# estimator** (Bengio et al. 2013, arXiv:1308.3432) pretends that it is 1:
#
# $$\text{forward: } \hat w = \operatorname{round}(w), \qquad \text{backward: } \frac{\partial \hat w}{\partial w} := 1$$
#
# Only round may pretend. A weight beyond the range is clamped, and moving it a little changes nothing, so its gradient is truly 0. And
# the scale has a gradient, too: learned step sizes (LSQ, Esser et al. 2019, arXiv:1902.08153) train it along.
#
# ## Exercise 3.7: straight_through (core)
#
# Write `straight_through(weight, scale, qmax)`: the value s · round(clamp(w / s, −qmax, qmax)), whose gradients, for the weight *and* for the
# scale, are those of the true formula with round's alone replaced by 1. `scale` may be a tensor that broadcasts. There are several
# places for one `.detach()`; all give the same value. 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>x + (round(x) − x) is round(x). Which part of it may be a constant? And which x: the weight, or something else?</details>
# <details><summary>Hint 2</summary>s = 1, qmax = 3: w = 1.4 becomes 1 and w = 9 becomes 3. If w grows by a little, which of the two results should follow? And if s grows by a little, what does 3 · s do?</details>
# <details><summary>Hint 3</summary>Clamp w / s first and call it x. Detach what rounding adds to x, and nothing else; then multiply by the scale.</details>


# %%
# EXERCISE straight_through
def straight_through(weight, scale, qmax):
    """Rounded in the forward pass; in the backward pass round is the identity and nothing else is."""
    ### BEGIN SOLUTION
    x = (weight / scale).clamp(-qmax, qmax)
    codes = x + (x.round() - x).detach()
    return codes * scale
    ### END SOLUTION


# %%
# CHECK straight_through
ch03.straight_through(straight_through)

# %% [markdown]
# **SignRound** (Cheng et al. 2023, arXiv:2309.05516; AutoRound is the program) needs no more than that: it learns for each weight
# whether to round up or down. A shift V of at most half a step is added before rounding, and follows the *sign* of the straight-through
# gradient of the layer's output error:
#
# $$\hat w = S \operatorname{round}(w / S + V), \qquad V \leftarrow \operatorname{clamp}\left(V - \eta\, \operatorname{sign}\frac{\partial\, d G d^\top}{\partial V},\, -\tfrac12, \tfrac12\right)$$
#
# Quantization-aware training (**QAT**) adjusts all weights of the whole model instead. Here it starts from float32, for up to 200 steps of
# 2,048 tokens, and for 30 steps from what GPTQ left. That takes minutes, so the page reads what a stored run
# found, `data/results/qat.json`; `training_run` below made it, and `TRAIN = True` makes it anew.
#
# **Predict:** of GPTQ, SignRound and QAT, which loses least on code at 2 bits, and which on dialogues? What share of plain
# rounding's loss on code is left of the best?

# %%
my_rest = predict("% of RTN's loss at 2 bits that the best of GPTQ, SignRound and QAT leaves", None, unit="%")

# %%
from labutils.quantization.sign_round import sign_round

two_bits = scheme_of(2)
with_gptq_2 = changed(lambda n, w: gptq(w, statistics[n].gram, choose_qparams(w, two_bits), act_order=True))
look("GPTQ 2", with_gptq_2, size_of(two_bits))
look("SignRound 2", changed(lambda n, w: sign_round(w, statistics[n].gram, two_bits)), size_of(two_bits))

# %%
from dataclasses import asdict

from labutils.quantization.qat import train_quantized_

TRAININGS = {  # where each begins, and after how many steps we look
    "QAT 2": ("RTN 2", (30, 100, 200)),
    "QAT 2, from GPTQ": ("GPTQ 2", (30,)),
}


def training_run():
    """What QAT loses after so many steps, from each start, beside the methods that do not train."""
    rows = torch.cat(calibration_batches(tokenizer, code=400, dialogues=400, context=512, seed=2)).reshape(-1, 256)
    rows = rows[torch.randperm(len(rows), generator=seeded())].split(8)
    for name, steps in [(name, steps) for name, (_, some) in TRAININGS.items() for steps in some]:
        trained = copy.deepcopy(with_gptq_2 if "GPTQ" in name else model).train()
        train_quantized_(trained, rows[:steps], two_bits, learning_rate=3e-4)
        look(f"{name}, {steps} steps", trained.eval(), size_of(two_bits))
    kept = [name for name in table if "steps" in name or name in ("float32", "RTN 2", "GPTQ 2", "SignRound 2")]
    found = {
        n: [size, asdict(code), scores, asdict(talk), *rest] for n, (size, code, scores, talk, *rest) in table.items()
    }
    return {"table": {name: found[name] for name in kept}, "bits": {name: bits_of[name] for name in kept}}


# %%
import json

from labutils.lab.models.compare import PairedQuality
from labutils.lab.paths import DATA

STORED, TRAIN = DATA / "results" / "qat.json", False
if TRAIN:
    STORED.write_text(json.dumps(training_run()), encoding="utf-8")
run = json.loads(STORED.read_text(encoding="utf-8"))
stored = {
    name: (size, PairedQuality(**code), scores, PairedQuality(**talk), *rest)
    for name, (size, code, scores, talk, *rest) in run["table"].items()
}
longest = {name: f"{name}, {steps[-1]} steps" for name, (_, steps) in TRAININGS.items()}
table[longest["QAT 2"]] = stored[longest["QAT 2"]]
here, there = table["GPTQ 2"][1].difference, stored["GPTQ 2"][1].difference
print(f"GPTQ 2 loses {here:+.4f} here and {there:+.4f} in the stored run; of the stored run:")
for name, (_, quality, scores, talk, _, flips) in stored.items():
    low, high = talk.interval
    found = ", ".join(f"{task} {score:.3f}" for task, score in scores.items())
    print(
        f"{name:<27} code {quality.difference:+.4f} [{quality.interval[0]:+.4f}, {quality.interval[1]:+.4f}]", end="  "
    )
    print(f"dialogues {talk.difference:+.4f} [{low:+.4f}, {high:+.4f}]  flips {flips:5.1%}, {found}")

# %%
LABELS = {"QAT 2": "QAT, from float32", "QAT 2, from GPTQ": "QAT, from GPTQ"}
figure, panels = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
for axes, place, text in zip(panels, (1, 3), ("code", "dialogues"), strict=True):
    for index, (name, (begin, steps)) in enumerate(TRAININGS.items()):
        points = [stored[n][place] for n in (begin, *(f"{name}, {count} steps" for count in steps))]
        middle = [q.difference for q in points]
        bars = [[m - q.interval[0] for m, q in zip(middle, points, strict=True)]]
        bars += [[q.interval[1] - m for m, q in zip(middle, points, strict=True)]]
        axes.errorbar((0, *steps), middle, yerr=bars, capsize=3, **series_style(index))
        axes.annotate(LABELS[name], (steps[-1], middle[-1]), xytext=(8, -3), textcoords="offset points")
    gptq_alone, last = stored["GPTQ 2"][place].difference, stored[longest["QAT 2"]][place]
    axes.axhline(gptq_alone, color="0.5", linestyle=":")
    axes.annotate("GPTQ alone", (200, gptq_alone), xytext=(8, 3), textcoords="offset points")
    axes.set(xlabel="steps of 2,048 tokens", ylabel="more bits per byte than float32", xlim=(-8, 320))
    axes.set_xticks((0, 30, 100, 200))
    axes.set_title(f"{text}: QAT {last.difference:+.3f} [{last.interval[0]:+.3f}, {last.interval[1]:+.3f}]")
    axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# *The loss against float32 in bits per byte, with the paired 95% interval over documents, after so many steps of a stored run; at 0 stands
# the model before any training, as it is rounded.*

# %%
names = ("GPTQ 2", "SignRound 2", longest["QAT 2"], longest["QAT 2, from GPTQ"])
rest = {name: stored[name][1].difference / stored["RTN 2"][1].difference for name in names}
print("of RTN's loss on code, what is left:", {name: f"{share:.0%}" for name, share in rest.items()})
my_rest.compare(100 * min(rest.values()))
for of, against in ((200, 100), (100, 30)):
    verdict = told_apart(run["bits"], f"QAT 2, {of} steps", f"QAT 2, {against} steps")
    print(f"QAT loses on code after {of} steps, against {against}: {verdict}")
for other in (*names[:2], "QAT 2, 30 steps"):
    print(f"30 steps from GPTQ lose on code, against {other}: {told_apart(run['bits'], names[3], other)}")

# %% [markdown]
# Read the two panels together. On code, does the curve still fall at its end, and do the printed lines tell its points apart? Then 30 steps
# said little about the method. On dialogues a loss below zero is no magic of two bits: training reads a kind of text that float32 could also
# have read longer, so ask what as many steps would have done for *it*. Training needs gradients, memory for them, and text; a real run takes
# thousands of steps. And look at the tasks and flips before you call anything repaired.

# %% [markdown]
# ## 8 · More bits where they count
#
# Layers differ. Round *one* layer at a time, measure how far the model's predictions move (the Kullback–Leibler
# divergence from float32's on calibration text), and choose bits for each layer so that the sum of losses is least under
# a budget of bytes: a knapsack problem, solved exactly here. That losses add up is an assumption; we measure the mixture
# as a whole.

# %%
from labutils.quantization.mixed import choose_under_budget, layer_sensitivity
from labutils.quantization.packing import bits_per_weight

few = torch.cat(calibration_batches(tokenizer, code=1, dialogues=1, context=192, seed=3))
with torch.no_grad():
    of_float32 = model(few).logits.log_softmax(dim=-1)


def divergence(variant):
    return (of_float32.exp() * (of_float32 - variant(few).logits.log_softmax(dim=-1))).sum(dim=-1).mean().item()


options = [scheme_of(bits) for bits in (2, 3, 4)]
sensitivity = layer_sensitivity(model, options, divergence)
shapes = {name: tuple(weight_of(layer).shape) for name, layer in linear_layers(model)}
layer_bytes = {n: [round(bits_per_weight(s, o) * math.prod(s) / 8) for o in options] for n, s in shapes.items()}
choice = choose_under_budget(
    sensitivity, layer_bytes, sum(row[1] for row in layer_bytes.values())
)  # as 3 bits all over
chosen = {name: options[index] for name, index in choice.items()}
look("mixed 2-4, size of 3", changed(lambda n, w: fake_quantize(w, chosen[n])), model_bytes(model, chosen))

# %%
kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
grid = torch.tensor([[chosen[n].bits for n in shapes if n.endswith(kind)] for kind in kinds])
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.imshow(grid, cmap="cividis", vmin=1, vmax=5, aspect="auto")
for (row, column), bits in [((r, c), grid[r, c].item()) for r in range(len(kinds)) for c in range(grid.shape[1])]:
    axes.text(column, row, bits, ha="center", va="center", color="white" if bits < 3 else "black")
most = max(range(len(kinds)), key=lambda r: grid[r].float().mean())
weights_of = {kind: next(math.prod(shape) for name, shape in shapes.items() if name.endswith(kind)) for kind in kinds}
axes.set(xlabel="block", xticks=range(grid.shape[1]), yticks=range(len(kinds)))
axes.set_title(f"With 3 bits to spend on average, {kinds[most]} gets the most")
axes.set_yticklabels([f"{kind} ({weights_of[kind] / 1000:.0f}k weights)" for kind in kinds])
plt.show()
low, high = paired_quality(bits_of["mixed 2-4, size of 3"], bits_of["RTN 3"]).interval
print(f"at the size of RTN 3, the mixture changes bits per byte on code by [{low:+.4f}, {high:+.4f}], paired")

# %% [markdown]
# *The bits chosen for every layer, under the budget of 3 bits all over, and how many weights such a layer has. A small layer is cheap
# to protect.*
#
# ### Rounding several numbers together
#
# At 2 bits a scalar code has four values. QuIP# (Tseng et al. 2024, arXiv:2402.04396) rounds eight numbers at once to points of the E8
# lattice; AQLM (Egiazarian et al. 2024, arXiv:2401.06118) and llama.cpp's IQ formats use codebooks of vectors; QTIP (Tseng et al. 2024, arXiv:2406.11235) and EXL3 use
# a **trellis**: a state of L bits names the number's value, and each number shifts 2 new bits into it.
#
# $$\text{state}_{k+1} = (4 \cdot \text{state}_k + \text{code}_k) \bmod 2^L, \qquad \hat w_k = \text{table}[\text{state}_k]$$
#
# Each number has 2^L possible values, of which four may follow the last; the best path is found by Viterbi's algorithm. **Predict:** how many of the
# decibels between the best scalar code (Lloyd–Max) and the bound of chapter 02 does a trellis win?

# %%
my_trellis = predict("dB that a trellis of 2^10 values wins over Lloyd-Max at 2 bits", None, unit="dB")

# %%
from labutils.quantization.theory import gaussian_bound_db, sqnr_db
from labutils.quantization.trellis import trellis_round

at = "model.layers.2.mlp.up_proj"
turned_weight = weight_of(dict(linear_layers(model))[at])[:64] @ hadamard(256, generator=seeded())  # near a normal
rows_of_one = turned_weight / turned_weight.std(dim=1, keepdim=True)
lloyd_max = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])  # Max 1960, table I, for 4 levels
codes = {"Lloyd-Max, 4 values": lloyd_max[(rows_of_one[..., None] - lloyd_max).abs().argmin(dim=-1)]}
codes |= {f"trellis, 2^{n} values": trellis_round(rows_of_one, state_bits=n, generator=seeded()) for n in (4, 7, 10)}
for label, back in codes.items():
    print(f"2 bits, {label:<21} {sqnr_db(rows_of_one, back):5.2f} dB")
print(f"2 bits, the bound for normals {gaussian_bound_db(2, torch.ones(1)):5.2f} dB")
my_trellis.compare(sqnr_db(rows_of_one, back) - sqnr_db(rows_of_one, codes["Lloyd-Max, 4 values"]))


def trellis_of(name, weight):
    spread = weight.std(dim=1, keepdim=True).half().float()
    return trellis_round(weight / spread, state_bits=7, generator=seeded()) * spread


look("trellis 2, row", changed(trellis_of), size_of(Scheme(bits=2, scale_dtype=torch.float16)))

# %% [markdown]
# The last line is the whole model, a trellis of 2⁷ values, *without* any calibration: compare it with RTN 2, which spends more bits, and
# with those 2-bit rows that have seen text. (Each row starts in a state of its own, 5 bits more in a whole row, which the size leaves out.)
#
# ## 9 · The table of methods
#
# The weights-only variants so far, beside float32 and bfloat16, the format that LabLM ships in. Sizes count everything: codes, scales,
# zero points (HQQ's are real numbers of 16 bits), the embedding in 16 bits. The embedding weighs so much in a small model that "2
# bits" is far from 2 bits a weight; the second column says what it is.


# %%
def print_table(rows):
    head = f"{'method':<22} {'MB':>5} {'bits each':>9} {'bits/byte':>9} {'difference, 95% interval':>26}  dialogues     KL  flips  "
    print(head + "  ".join(TASKS))
    for name, (size_bytes, quality, scores, talk, divergence, flips) in rows:
        low, high = quality.interval
        line = f"{name:<22} {size_bytes / 1e6:5.2f} {8 * size_bytes / model.num_parameters():9.2f} {quality.bits_per_byte:9.4f} "
        line += f"{f'{quality.difference:+.4f} [{low:+.4f}, {high:+.4f}]':>26}  {talk.difference:+9.4f} {divergence:6.4f} {flips:6.1%}  "
        print(line + "  ".join(f"{scores[task]:>{len(task)}.3f}" for task in TASKS))


print_table(sorted(table.items(), key=lambda row: row[1][1].difference))

# %% [markdown]
# **Read it twice**: sorted by bits per byte, is it sorted by the tasks as well? By flips?
#
# Section 15 is a contest: who stores LabLM best in 3 bits?

# %% [markdown]
# ## 10 · Fix the article: quantized twice, then sent to a GPU
#
# The article from which this course began («秒推时代：LLM极速推理引领新风潮», chapter 00) has a listing that calls `nn.quantize_dynamic` twice and
# moves the result to a GPU. Run it.

# %%
import warnings

from torch import nn

network = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1))
print("nn.quantize_dynamic exists:", hasattr(nn, "quantize_dynamic"))
try:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its removal
        once = quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
        twice = quantize_dynamic(once, {nn.Linear}, dtype=torch.qint8)
        x = torch.randn(4, 10)
        print("the second call changes the output:", not torch.equal(once(x), twice(x)))
    print("parameters that .to('cuda') would find:", len(list(once.parameters())))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    print({device: has_kernel("quantized::linear_dynamic", device) for device in ("CPU", "CUDA")})
except (ImportError, NotImplementedError, RuntimeError) as error:
    print(f"{type(error).__name__}: {str(error).splitlines()[0][:110]}")

# %% [markdown]
# There is no such function in `nn`. The second call finds no `nn.Linear` any more and does nothing. The packed weights
# are no parameters, so `.to` moves nothing. The last line asks PyTorch's dispatcher for which devices this build has a kernel of the layer. The
# repair is one call, on the CPU, or modules of your own as in the next section.

# %% [markdown]
# ## 11 · Real speed: integers as they lie
#
# `fake_quantize` saves nothing: the weights are floats again before they are multiplied. To be faster, the machine has to
# *read* fewer bytes. One token reads every weight once, so
#
# $$t_{\text{token}} \ge \frac{\text{bytes of weights}}{\text{bandwidth}}$$
#
# (the roofline of chapter 01, at the memory's end of it). Here is that floor for a model of 0.2 billion weights: random
# ones, since values do not change speed.
#
# **Predict:** how many times faster could int8 and int4 be at best?

# %%
my_int4 = predict("times as fast as float32 that int4, a scale per 64, can be by its bytes", None, unit="times")

# %%
import numpy as np

from labutils.measurement.roofline import bandwidth_probes, last_level_cache_bytes, probe_working_set_bytes
from labutils.measurement.timing import measure_interleaved, paired_ratio

probes = bandwidth_probes(probe_working_set_bytes(), device="cpu", dtype=torch.float32)
timed = measure_interleaved({name: run for name, (run, _) in probes.items()}, repeats=5, warmup=1)
bandwidth = max(moved / min(timed[name].samples_s) for name, (_, moved) in probes.items())
del probes
cache = f"last-level cache {last_level_cache_bytes() / 2**20:.0f} MiB"
print(f"{bandwidth / 1e9:.1f} GB/s with {THREADS}, {cache}")
for name, bits in (("float32", 32), ("int8, a scale per 64", 8.5), ("int4, a scale per 64", 4.5)):
    print(f"{name:<22} {0.2e9 * bits / 8 / 1e6:4.0f} MB a token, at least {0.2e9 * bits / 8 / bandwidth * 1e3:5.1f} ms")
my_int4.compare(32 / 4.5)

# %% [markdown]
# ### How codes lie in memory
#
# With AVX2 a processor multiplies 32 bytes at a time (64 with AVX-512, 16 on ARM's NEON). So the course's kernels
# (`labutils/quantization/kernels.c`; open it beside this page) let eight rows travel together: a 32-byte vector holds 4 codes of each of
# 8 rows.
#
# ```
# [row 0: k 0 1 2 3][row 1: k 0 1 2 3] … [row 7: k 0 1 2 3]
# ```
#
# Four inputs, repeated eight times, meet eight rows at once, and each row's sum stays in its own lane. For many tokens (a prompt, a
# batch) a weight that has been loaded meets eight tokens before the next is loaded, and with AVX-512 two of these vectors, of 16 rows,
# share a register: half as many instructions for the same exact sums of integers, so a token's result keeps its bits.
#
# A sum of floats has other bits in another order. The float32 kernel of the same file therefore fixes one order for every batch, thread and
# processor: eight sums a row, over inputs 0, 8, 16 …, over 1, 9, 17 … and so on, each product added with a single rounding (a *fused
# multiply-add*), and then these eight in pairs. Several tokens share a loaded weight there, too.
#
# With 4 bits a byte holds *two* codes. Which two? Not neighbours: code k goes into the low half and code k + 16 into the
# high half. Then one mask yields 16 codes in order, and one shift the next 16; nothing has to be shuffled.

# %% [markdown]
# ## Exercise 3.8: pack_halves (core)
#
# Write `pack_halves(codes)`: `codes` is a NumPy array of dtype uint8 with values 0 … 15; its length is a multiple of 32.
# Return uint8, half as long: of every 32 codes 16 bytes, byte j holding code j in its low half and code j + 16 in its
# high half.
# 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Reshape into (chunks, 2, 16): then [:, 0] are the low codes, [:, 1] the high ones.</details>
# <details><summary>Hint 2</summary>Codes 0 to 31 with code k = k mod 16: byte 0 holds code 0 and code 16. Which two rows of a (2, 16) table meet in it?</details>
# <details><summary>Hint 3</summary>A high half is code · 16, or code &lt;&lt; 4; put both together with |.</details>


# %%
# EXERCISE pack_halves
def pack_halves(codes):
    """Two 4-bit codes a byte: k and k + 16 of every 32."""
    ### BEGIN SOLUTION
    chunks = codes.reshape(-1, 2, 16)
    packed = chunks[:, 0] | (chunks[:, 1] << 4)
    return packed.reshape(-1)
    ### END SOLUTION


# %%
# CHECK pack_halves
from labutils.course.checks import ch03_speed

ch03_speed.pack_halves(pack_halves)

# %% [markdown]
# ### One instruction, and its trap
#
# AVX2's `maddubs` (the instruction VPMADDUBSW) takes 32 *unsigned* bytes and 32 *signed* bytes, multiplies them, adds
# neighbours, and leaves 16 sums in int16:
#
# $$c_i = \operatorname{sat}_{16}(u_{2i}\, s_{2i} + u_{2i+1}\, s_{2i+1}), \qquad \operatorname{sat}_{16}(v) = \min(\max(v, -2^{15}), 2^{15} - 1)$$
#
# (Intel's intrinsics guide, `_mm256_maddubs_epi16`). A sum that does not fit does not wrap around: it sticks at the edge.
# No error, no flag, a wrong number.
#
# **Tiny numbers:** u = (255, 255), s = (127, 127): 255·127 + 255·127 = 64770, and the instruction says 32767.

# %% [markdown]
# ## Exercise 3.9: maddubs (core)
#
# Write `maddubs(unsigned, signed)`: two NumPy arrays of one even length, uint8 and int8; return what the instruction
# leaves, as int16, half as long.
# 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Widen both to int32 before you multiply; reshape(-1, 2).sum(axis=1) adds neighbours.</details>
# <details><summary>Hint 2</summary>For u = (255, 255) and s = (127, 127) an int8 product has overflowed before anything is added. In which type does 64770 fit, and when may it be cut to 32767?</details>
# <details><summary>Hint 3</summary>np.clip to −32768 … 32767, and only then to int16.</details>


# %%
# EXERCISE maddubs
def maddubs(unsigned, signed):
    """Products of unsigned and signed bytes, neighbours added, saturated to int16."""
    ### BEGIN SOLUTION
    products = unsigned.astype(np.int32) * signed.astype(np.int32)
    sums = products.reshape(-1, 2).sum(axis=1)
    return np.clip(sums, -(2**15), 2**15 - 1).astype(np.int16)
    ### END SOLUTION


# %%
# CHECK maddubs
ch03_speed.maddubs(maddubs)

# %% [markdown]
# So may the kernels use it at all? How wrong does it get on random codes of 8 bits, and of 4?

# %%
make = np.random.default_rng(0)
inputs = make.integers(-127, 128, 200_000).astype(np.int8)
for bits in (8, 4):
    codes = make.integers(0, 2**bits, inputs.size).astype(np.uint8)
    exact = (codes.astype(np.int64) * inputs).reshape(-1, 2).sum(axis=1)
    saturates = np.clip(exact, -(2**15), 2**15 - 1)
    largest = 2 * (2**bits - 1) * 127
    share = (saturates != exact).mean()
    print(f"{bits} bits: largest sum {largest}, {32767 // largest} such sums fit, {share:.1%} saturate")

# %% [markdown]
# Half bytes are safe, and 8 instructions' results may even be added up in int16 before anyone has to widen them. Hence the
# kernels' trick without VNNI: *a byte is two half bytes*, code = low + 16 · high, and both go through the same safe
# instruction. (Processors with VNNI have one that adds four products straight into int32: `kernels.c` takes it where the
# compiler finds it, and `vdotq_s32` on ARM.)

# %% [markdown]
# ### The inputs are rounded too
#
# Integer products need integers on both sides. So each token's inputs are rounded to int8 as they come, with a scale
# $s_b = \max |x| / 127$ for every block of 64, as llama.cpp does for every 32. With codes q of a row (scale S, zero point
# Z = 128, because bytes count from 0) and codes p of the input:
#
# $$y = \sum_b S s_b \Big( \sum_{k \in b} q_k p_k - Z \sum_{k \in b} p_k \Big)$$
#
# The inner sums are whole numbers: exact in any order, on any machine. $\sum p_k$ is needed once for all rows.

# %% [markdown]
# ## Exercise 3.10: block_product (core)
#
# Write `block_product(codes, scale, x_codes, x_scales)` in NumPy by that formula: codes (rows, n) of dtype uint8, scale
# (rows,), x_codes (n,) of dtype int8, x_scales (blocks,), n = 64 · blocks. Return y (rows,).
# 4 lines, 15 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Widen first: uint8 − 128 and sums of int8 overflow. Reshape the codes to (rows, blocks, 64).</details>
# <details><summary>Hint 2</summary>With one block of codes 130 and 127 and inputs 2 and 1: 2 · 2 − 1 · 1 = 3 whole units. How do 130, 127, 2, 1 and 128 give that 3?</details>
# <details><summary>Hint 3</summary>dots = (q · p).sum(axis=2) − 128 · p.sum(axis=1) has shape (rows, blocks); multiply it by x_scales, sum over blocks, multiply by scale.</details>


# %%
# EXERCISE block_product
def block_product(codes, scale, x_codes, x_scales):
    """One row times one token, in whole numbers within each block."""
    ### BEGIN SOLUTION
    q = codes.astype(np.int32).reshape(len(codes), len(x_scales), -1)
    p = x_codes.astype(np.int32).reshape(len(x_scales), -1)
    dots = (q * p).sum(axis=2) - 128 * p.sum(axis=1)
    return scale * (dots * x_scales).sum(axis=1)
    ### END SOLUTION


# %%
# CHECK block_product
ch03_speed.block_product(block_product)

# %% [markdown]
# What does rounding the *inputs* cost, beside rounding the weights? For the outputs' relative error on Gaussian inputs:

# %%
from labutils.quantization.affine import Scheme, choose_qparams
from labutils.quantization.packed import PackedLinear

torch.manual_seed(0)
layer, x = torch.nn.Linear(1024, 1024, bias=False), torch.randn(16, 1024)
for bits in (8, 4):
    packed = PackedLinear.from_layer(layer, Scheme(bits, granularity="group", group_size=64))
    exact, rounded = layer(x), x @ packed.packed.dequantize().T
    weights_cost, inputs_cost = ((a - b).norm() / exact.norm() for a, b in ((rounded, exact), (packed(x), rounded)))
    print(f"{bits} bits: weights {weights_cost:.4f}, inputs {inputs_cost:.4f} of the output's norm")

# %% [markdown]
# ### From C that anybody would write to C that waits for memory only
#
# The course compiles C for you: `compile_c` calls this machine's compiler and keeps the library under a hash of source,
# flags and compiler, in a folder that only you may enter. Here is the formula, row by row, as one would write it. The
# first step forbids the compiler to use vectors; the second lets it.

# %%
from labutils.lab.layers.compile import compile_c
from labutils.quantization.kernels import find_kernels, instruction_set

kernels, reason = find_kernels()
print(f"{instruction_set(kernels)}, compiled by this machine" if kernels else f"no kernels here: {reason}")

# %%
NAIVE = """
#include <stdint.h>
void matvec(const uint8_t *codes, const float *scale, const int8_t *x, const float *x_scale, float *y,
            int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++) {
        float sum = 0;
        for (int64_t b = 0; b < n / 64; b++) {
            int32_t dot = 0, total = 0;
            for (int64_t k = 64 * b; k < 64 * b + 64; k++) {
                dot += codes[r * n + k] * x[k];
                total += x[k];
            }
            sum += scale[r] * x_scale[b] * (dot - 128 * total);
        }
        y[r] = sum;
    }
}
"""

# %% [markdown]
# A matrix to try it on, 8 bits, 16384 × 8192 random codes: 134 MB, more than most caches keep (yours is printed above). `run_rows` calls a
# compiled `matvec`, `run_packed` a build of the course's own kernels on the packed layout; both take the addresses of
# arrays, as C does.

# %%
from labutils.quantization.affine import QParams
from labutils.quantization.kernels import Weight, load_library, read_sources
from labutils.quantization.packed import PackedWeight
from labutils.quantization.packed_ops import quantize_tokens
from labutils.quantization.packed_steps import Arena

ROWS, N = 16384, 8192
generator = torch.Generator().manual_seed(0)
codes = torch.randint(-127, 128, (ROWS, N), generator=generator, dtype=torch.int8)
row_scales = torch.rand(ROWS, 1, generator=generator) + 0.5
packed = PackedWeight.from_codes(codes, QParams(row_scales, torch.zeros(ROWS, 1, dtype=torch.int32), -128, 127))
bytes_by_row = codes.view(torch.uint8).bitwise_xor_(128)  # code + 128, as unsigned bytes, in the same memory
x = torch.randn(1, N, generator=generator)
x_codes, x_scales = quantize_tokens(x, padded=N, block=64)
y = torch.empty(ROWS)

# %%
import ctypes


def run_rows(library):
    arrays = (bytes_by_row, row_scales, x_codes, x_scales, y)
    library.matvec(*(ctypes.c_void_p(a.data_ptr()) for a in arrays), ctypes.c_int64(ROWS), ctypes.c_int64(N))


def run_packed(library, codes_at, threads=1):
    w = packed
    weight = Weight(codes_at, w.scales.data_ptr(), None, None, N, ROWS, w.padded, w.group, w.block, w.bits)
    library.packed_linear(weight, x.data_ptr(), y.data_ptr(), 1, threads)


# %% [markdown]
# Blocking may help even the naive layout: four rows at a time read the inputs once for four. Then the kernels' own layout,
# first without fetching ahead. Memory answers late, and a core that asks only when it needs something may have to
# wait; `__builtin_prefetch` asks for what comes 2 KiB later. Then huge pages: 2 MiB instead of 4 KiB, so that the
# processor looks up addresses 512 times less often (Linux; elsewhere nothing changes). They must be asked for, and only
# memory of one's own gets them: Python's `mmap` makes memory to *share* unless told otherwise, and for that Linux, as it comes, has huge pages
# turned off, without a word. Last, where the processor has AVX-512 with VNNI, registers of 64 bytes: half as many loads,
# two tiles at once, and nothing is asked for ahead.
#
# **Predict:** which of these steps gains most on your machine? How many times as fast as the scalar loop does the compiler make it alone?

# %%
my_vectors = predict("the compiler's vectors: times as fast as the scalar loop", None, unit="times")

# %%
FOUR_ROWS = (
    NAIVE.replace("r++", "r += 4")
    .replace("float sum = 0", "float sum[4] = {0}")
    .replace("int32_t dot = 0", "int32_t dot[4] = {0}")
    .replace("dot += codes[r * n + k]", "for (int i = 0; i < 4; i++) dot[i] += codes[(r + i) * n + k]")
    .replace("sum += scale[r]", "for (int i = 0; i < 4; i++) sum[i] += scale[r + i]")
    .replace("(dot - 128", "(dot[i] - 128")
    .replace("y[r] = sum", "for (int i = 0; i < 4; i++) y[r + i] = sum[i]")
)
native = ("-march=native",)

# %%
steps = {}
if kernels:
    huge_pages = Arena(packed.codes.nbytes).put([packed.codes])
    narrow = read_sources().replace("#define WIDE", "")  # registers of 32 bytes
    no_prefetch = load_library(compile_c(narrow.replace("AHEAD = 2048", "AHEAD = 0"), flags=native))
    prefetch = load_library(compile_c(narrow, flags=native))
    scalar, vectors = (ctypes.CDLL(compile_c(NAIVE, flags=f)) for f in (("-O1", "-fno-tree-vectorize"), native))
    four = ctypes.CDLL(compile_c(FOUR_ROWS, flags=native))
    steps = {
        "1 scalar": lambda: run_rows(scalar),
        "2 the compiler's vectors": lambda: run_rows(vectors),
        "3 four rows at a time": lambda: run_rows(four),
        "4 eight rows in a vector": lambda: run_packed(no_prefetch, packed.codes.data_ptr()),
        "5 fetched ahead": lambda: run_packed(prefetch, packed.codes.data_ptr()),
        "6 huge pages": lambda: run_packed(prefetch, huge_pages.data_ptr()),
        "7 the whole kernel": lambda: run_packed(kernels, huge_pages.data_ptr()),
    }
    if cores > 1:
        steps[f"8 {THREADS}"] = lambda: run_packed(kernels, huge_pages.data_ptr(), cores)

# %% [markdown]
# Before speed, the same numbers: each step's result must equal the first one's *to the last bit*. Whole-number sums allow
# that, whatever the order; the float sums over blocks run in one order everywhere.
#
# The comparison is not for show, as the case after it will tell.

# %%
results = {}
for name, step in steps.items():
    step()
    results[name] = y.clone()
    print(f"{name:<26} equal to the first: {torch.equal(results[name], results['1 scalar'])}")

# %% [markdown]
# ### A case for a detective
#
# The zero point could also be subtracted at once, `dot += (codes[r * n + k] - 128) * x[k]`. That is correct C, and the same whole
# number. Here it is, compiled three times, the last time for any processor with VNNI in 512-bit registers (where this machine has one).
# **Question:** who is guilty, the C, the compiler, or the processor? Which build is the alibi, and would *your* tests have compared
# whole results?

# %%
import subprocess
from pathlib import Path

from labutils.lab.layers.compile import compiler

SUSPECT = NAIVE.replace("codes[r * n + k] * x[k]", "(codes[r * n + k] - 128) * x[k]").replace(
    "(dot - 128 * total)", "dot"
)
BUILDS = {"-O1": ("-O1",), "-O3": (), "-O3 -march=cascadelake": ("-march=cascadelake",)}
cpu = Path("/proc/cpuinfo")
if not (cpu.exists() and "avx512_vnni" in cpu.read_text()):
    del BUILDS["-O3 -march=cascadelake"]
if kernels:
    print(subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0])
    for name, flags in BUILDS.items():
        run_rows(ctypes.CDLL(compile_c(SUSPECT, flags=flags)))
        wrong = (y != results["1 scalar"]).sum().item()
        print(f"{name:<23} {wrong:5} of {ROWS} rows are wrong")

# %% [markdown]
# We saw GCC 12.2 miscompile this loop for processors with VNNI, whose instruction multiplies *unsigned* by signed bytes, while code − 128
# is signed. If your machine is innocent, the solution's stored run may have the case. The course found it because the cell above compares
# whole results to the last bit. Speed would not have told: a wrong kernel may be as fast as a right one.

# %%
timings = measure_interleaved(steps, repeats=7, warmup=1) if steps else {}
rates = {name: codes.nbytes / timing.median_s / 1e9 for name, timing in timings.items()}
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
axes.barh(list(rates), list(rates.values()), color=series_style(0)["color"])
axes.axvline(bandwidth / 1e9, color=series_style(1)["color"], linestyle="--")
axes.text(bandwidth / 1e9, -0.6, f"memory, {THREADS}, float ", ha="right", va="bottom", fontsize="small")
axes.set_ylim(len(rates) - 0.5, -0.9)
axes.set_xlabel("GB of codes read per second")
if timings:
    by_hand = paired_ratio(timings["2 the compiler's vectors"].samples_s, timings["7 the whole kernel"].samples_s)
    axes.set_title(f"What hands added to the compiler's vectors: {by_hand}", pad=14)
    my_vectors.compare(paired_ratio(timings["1 scalar"].samples_s, timings["2 the compiler's vectors"].samples_s).value)
plt.show()

# %% [markdown]
# *How many bytes of codes each version gets through in a second, and the bandwidth that the float probes
# above found.* The same in numbers, with what each step gained over the one before it:

# %%
before = None
for name, timing in timings.items():
    low, high = timing.interval_s
    ratio = paired_ratio(timings[before].samples_s, timing.samples_s) if before else None
    verdict = "" if ratio is None else "gained" if ratio.low > 1 else "lost" if ratio.high < 1 else "not told apart"
    print(
        f"{name:<26} {timing.median_s * 1e3:7.2f} ms [{low * 1e3:.2f}, {high * 1e3:.2f}]  {rates[name]:5.1f} GB/s, "
        f"{rates[name] * 1e9 / bandwidth:4.0%} of memory  {str(ratio or ''):<20} {verdict}"
    )
    before = name
print(f"medians of 7 interleaved rounds, 1 warm-up, cpu; one thread up to step 7, uint8 codes, {ROWS} x {N}")

# %% [markdown]
# <details><summary>Explain</summary>
#
# Find the largest step: it is among the first, where the loop waits for arithmetic and the compiler's vectors do four times as
# much at once or more. Plain C with four rows in a pass is already far from where it began. Near to what memory gives, not every idea
# pays: the last column says which step gained here, which was not told apart, and which lost. Step 7 differs from step 6 only where
# the kernels were built for AVX-512 with VNNI (the instruction set is printed above). A bar beyond the dashed line is no
# miracle: the probe read small pages, or part of the matrix sat in the cache (its size is printed at the head of this section; a
# virtual machine may state its host's).
# </details>
#
# **Your turn, not graded:** change `NAIVE` (eight rows at a time? another block?), compile it with `compile_c`, and let
# the two cells above compare result and time.

# %%
del codes, bytes_by_row, packed, steps, results
if kernels:
    del huge_pages

# %% [markdown]
# ### A whole model
#
# A token is more than its matrices: normalising, attention and gates, a dozen small steps a layer. NumPy and PyTorch take some time for
# each, *whatever the weights*, and the faster the matrices, the more that counts. `steps.c` does them in C, and `token.c` joins them to
# a whole token, from its id to the logits, so that Python is asked once a token or, decoding greedily, once for many. Below, a model of random
# weights is decoded by `FastLlama`, a decoder for one stream without PyTorch between the steps, in one interleaved run.
#
# What does int8 gain by its bytes, and what by C? For that each of the two must change alone: float32 and int8, each with NumPy and with
# C between its matrices. **Predict** the four cells of this table, with float32 and NumPy as 1.

# %%
my_int8 = predict("int8 with C steps: times as fast as float32 with NumPy steps, 0.07B", None, unit="times")

# %%
import copy

from labutils.course.bench.subject import speed_subject
from labutils.generation.decode import generate_static
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.quantized import fast_float_llama, fast_packed_llama
from labutils.quantization.packed import pack_model_

subject = speed_subject(num_hidden_layers=6, vocab_size=4096)
variants = {}
for name, few_bits in (("int8", Scheme(8)), ("int4", Scheme(4, granularity="group", group_size=64))):
    copied = copy.deepcopy(subject.model, {id(weight): weight for weight in subject.model.parameters()})  # not weights
    variants[name] = pack_model_(copied, few_bits)
del copied
print(f"{subject.name}, 17 tokens after a prompt of {subject.token_ids.shape[1]}")

# %%
runs = {}
if kernels:
    runs = {"float32, C": fast_float_llama(subject.model, max_length=40)}
    runs |= {f"{name}, C": fast_packed_llama(variant, max_length=40) for name, variant in variants.items()}
    for name in ("float32", "int8"):
        runs[f"{name}, NumPy"] = copy.copy(runs[f"{name}, C"])  # the same matrices in the same memory
        runs[f"{name}, NumPy"].few_tokens = None
else:
    runs = {"float32, NumPy": FastLlama(subject.model, max_length=40)}
loops = {name: (lambda f=f: f.generate(subject.token_ids, 17)) for name, f in runs.items()}
loops["int8, modules"] = lambda: generate_static(variants["int8"], subject.token_ids, 17)
timings = measure_interleaved(loops, repeats=7, warmup=1)


def times(name, base):
    """How many times as fast as another run, with its interval."""
    return paired_ratio(timings[base].samples_s, timings[name].samples_s)


for name, timing in timings.items():
    megabytes = f"{runs[name].weight_bytes / 1e6:6.0f} MB a token" if name in runs else ""
    print(
        f"{name:<14} {17 / timing.median_s:7.1f} tokens/s  {times(name, 'float32, NumPy')} float32, NumPy {megabytes}"
    )
print(
    f"17 tokens over the time of the whole call, prompt of 16 included; medians of 7 interleaved rounds, cpu, {THREADS}"
)

# %%
if kernels:
    print(f"{'tokens/s':<10}{'NumPy between':>14}{'C between':>12}   C gains")
    for name in ("float32", "int8"):
        rates = [17 / timings[f"{name}, {steps}"].median_s for steps in ("NumPy", "C")]
        print(f"{name:<10}{rates[0]:14.1f}{rates[1]:12.1f}   {times(f'{name}, C', f'{name}, NumPy')}")
    gains = [str(times(f"int8, {steps}", f"float32, {steps}")) for steps in ("NumPy", "C")]
    print(f"int8 gains with NumPy between the matrices {gains[0]}, with C {gains[1]}")
    my_int8.compare(times("int8, C", "float32, NumPy").value)
del subject, variants, runs, loops

# %% [markdown]
# Read the table by rows and by columns before you praise either. A model of this size hardly fits a cache, so its bytes should count for more
# than its steps; section 13 has the same table for LabLM, which is small. int8 multiplies whole numbers, too: its gain may exceed
# the ratio of the bytes where float32 does not reach the memory's bandwidth.
#
# "modules" are the same packed layers inside the `transformers` model, called as PyTorch operators. They serve any architecture,
# and pay for PyTorch and Python between the kernels. Without a compiler, PyTorch's own operators
# serve, with the same numbers to the last bit; `python -m labutils doctor` says which you have.
#
# Against others, in a terminal: `python -m labutils bench quantization` times the same weights in llama.cpp and ik_llama.cpp
# (`pip install -e .[peers]`) and in PyTorch's own int8, each in a process of its own, and says which of the course's own bars
# were met on your machine.

# %% [markdown]
# ### Keep it
#
# Packed models save to a folder: codes and scales in safetensors, and a `quantization.json` that names every layer's
# scheme. A mismatched file raises an error of one sentence.

# %%
import json
import tempfile
from pathlib import Path

from labutils.lab.models.load import LoadError
from labutils.lab.models.quantized import load_quantized, save_quantized

small = pack_model_(copy.deepcopy(model), Scheme(4, granularity="group", group_size=64))
ids = tokenizer("def area(width, height):\n", return_tensors="pt").input_ids
with tempfile.TemporaryDirectory() as folder:
    save_quantized(small, tokenizer, Path(folder), method="rtn")
    megabytes = (Path(folder) / "model.safetensors").stat().st_size / 1e6
    again = load_quantized(Path(folder)).model
    print(f"{megabytes:.1f} MB on disk, same logits: {torch.equal(again(ids).logits, small(ids).logits)}")
    (Path(folder) / "quantization.json").write_text(json.dumps({"version": 7}), encoding="utf-8")
    try:
        load_quantized(Path(folder))
    except LoadError as error:
        print(str(error).replace(folder, "the folder"))

# %% [markdown]
# ## 12 · Where integers are slower
#
# Fewer bits do not mean less time by themselves. One layer of 1024 × 1024 random numbers, read by 1, 16 and 256 tokens
# at once: float32, bfloat16, W8A8 in plain PyTorch calls (`IntegerLinear`), and weights packed in 8 and 4 bits.
#
# **Predict** which of the five is fastest for 1 token, and which for 256. How many times as fast as float32 is packed int4 for 1 token?

# %%
my_packed = predict("packed 4 bits: times as fast as float32, one layer, 1 token", None, unit="times")

# %%
from labutils.measurement.timing import measure_interleaved
from labutils.quantization.integer_linear import IntegerLinear
from labutils.quantization.packed import PackedLinear

plain = nn.Linear(1024, 1024, bias=False)
symmetric = {bits: Scheme(bits=bits, granularity="group", group_size=64) for bits in (8, 4)}
layers = {"float32": plain, "bfloat16": copy.deepcopy(plain).bfloat16(), "W8A8, eager": IntegerLinear(plain)}
layers |= {f"packed {bits} bits": PackedLinear.from_layer(plain, symmetric[bits]) for bits in (8, 4)}
TOKENS = (1, 16, 256)
calls = {}
for tokens in TOKENS:
    for label, layer in layers.items():
        x = torch.randn(tokens, 1024, dtype=torch.bfloat16 if label == "bfloat16" else torch.float32)
        calls[label, tokens] = lambda layer=layer, x=x: layer(x)
with torch.inference_mode():
    timings = measure_interleaved(calls, repeats=7, warmup=2, calls_per_sample=3)

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
print(f"{'tokens':<15}" + "".join(f"{n:>9}   " for n in TOKENS))
for index, label in enumerate(layers):
    rates = [timings["float32", n].median_s / timings[label, n].median_s for n in TOKENS]
    axes.plot(range(3), rates, label=label, **series_style(index))
    print(f"{label:<15}" + "".join(f"{timings[label, n].median_s * 1e6:9.0f} µs" for n in TOKENS))


def fastest(n):
    """The fastest layer for n tokens, and those whose speed is not told apart from its."""
    best = min(layers, key=lambda label: timings[label, n].median_s)
    ratios = {label: paired_ratio(timings[label, n].samples_s, timings[best, n].samples_s) for label in layers}
    return " or ".join([best, *(label for label, ratio in ratios.items() if label != best and ratio.low <= 1)])


axes.set(xlabel="tokens in one pass", ylabel="speed, float32 = 1", yscale="log")
axes.set_xticks(range(3), [str(n) for n in TOKENS])
axes.set_title(f"Fastest at 1 token: {fastest(1)}; at 256: {fastest(256)}", wrap=True)
axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
axes.set_yticks([], minor=True)
axes.grid(alpha=0.25, which="both")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
print(f"medians of 7 rounds, 3 calls each, 2 warm-up, cpu, {THREADS}")
my_packed.compare(timings["float32", 1].median_s / timings["packed 4 bits", 1].median_s)

# %% [markdown]
# *The speed of one layer relative to float32 of the same pass (above 1 is faster), for one, 16 and 256
# tokens.*
#
# <details><summary>Explain</summary>
#
# One token reads each weight for a single product, so fewer bytes pay (this one matrix may sit in a cache, where the argument
# holds as well). Many tokens share a weight and wait for arithmetic. There no bytes are left to save, and what helps is faster
# arithmetic: products of int8 in the packed layers and in W8A8, bfloat16 where the processor multiplies it in hardware (AMX, AVX-512 BF16).
# Eager W8A8 rounds, masks and scales in calls of their own. Compare its line with the packed 8 bits at one token to see what those cost.
# </details>

# %% [markdown]
# ## 13 · The one plot
#
# Only variants that we can honestly time appear here: packed layers, real integer products, bfloat16. (A fake-quantized
# model computes in float32, and its speed would be a lie.) The packed layers also round their inputs to 8 bits, so
# their quality is measured anew, on the very modules that are timed.

# %%
from labutils.quantization.packed import replace_packed_


def packed(codes_of):
    """LabLM with every layer packed from (codes, qparams) of `codes_of(name, weight)`, and its head in 8 bits by row."""
    variant = copy.deepcopy(model)
    for name, layer in list(linear_layers(variant)):
        weight = PackedWeight.from_codes(*codes_of(name, weight_of(layer)))
        replace_packed_(variant, name, PackedLinear(weight, layer.bias))
    replace_packed_(variant, "lm_head", PackedLinear.from_layer(variant.lm_head, Scheme()))
    return variant


def nearest_codes(scheme):
    return lambda _, w: (quantize(w, q := choose_qparams(w, scheme)), q)


def gptq_codes(scheme):
    def codes(name, w):
        qparams = choose_qparams(w, scheme)
        return quantize(gptq(w, statistics[name].gram, qparams), qparams), qparams

    return codes


# %%
def clip_codes(name, w):
    qparams = clipped_qparams(name, w, statistics[name].gram, four_bits)
    return quantize(w, qparams), qparams


# %%
variants = {
    "float32": model,
    "float32, NumPy steps": model,
    "float32, PyTorch": model,
    "bfloat16, PyTorch": copy.deepcopy(model).bfloat16(),
    "W8A8, PyTorch": use_integers_(copy.deepcopy(model)),
    "int8, row, PyTorch": packed(nearest_codes(Scheme())),
    "int8, row, NumPy steps": packed(nearest_codes(Scheme())),
    "int8, row": packed(nearest_codes(Scheme())),
    "int8, group 64": packed(nearest_codes(symmetric[8])),
    "int4, row": packed(nearest_codes(scheme_of(4, None))),
    "int4, group 128": packed(nearest_codes(scheme_of(4, 128))),
    "int4, group 64": packed(nearest_codes(four_bits)),
    "int4, group 32": packed(nearest_codes(scheme_of(4, 32))),
    "int4, group 64, head too": pack_model_(copy.deepcopy(model), four_bits),
    "HQQ int4": packed(lambda _, w: hqq(w, four_bits)),
    "clipped int4": packed(clip_codes),
    "GPTQ int4": packed(gptq_codes(four_bits)),
    "GPTQ int3 in 4 bits": packed(gptq_codes(scheme)),
}

# %% [markdown]
# Two ways to generate. "PyTorch" runs the Hugging Face model with a static cache. The others use section 11's `FastLlama` with every
# step in C; "NumPy steps" are the controls. Where no C compiler is found, the others run in PyTorch too, and you will see it in
# the numbers.

# %%
from labutils.measurement import ledger
from labutils.quantization.kernels import KernelError

prompt, NEW_TOKENS = calibration[0][:1, :64], 32


def generator_of(name, variant):
    try:
        if "PyTorch" not in name:
            in_float = FastLlama if "NumPy" in name else fast_float_llama
            make = in_float if variant is model else fast_packed_llama
            decoder = make(variant, max_length=prompt.shape[1] + NEW_TOKENS)
            decoder.few_tokens = None if "NumPy" in name else decoder.few_tokens
            return lambda: decoder.generate(prompt, NEW_TOKENS)
    except KernelError as error:
        print(f"{name}: {error}")
    return lambda: generate_static(variant, prompt, NEW_TOKENS)


bits_of_variant = {name: bits_by_document(variant, tokenizer, documents) for name, variant in variants.items()}
qualities = {name: paired_quality(bits, baseline) for name, bits in bits_of_variant.items()}
runs = measure_interleaved({n: generator_of(n, v) for n, v in variants.items()}, repeats=7, warmup=1)


# %%
def format_of(name):
    """What the weights lie in, and what they are multiplied with."""
    if "int" in name:
        return f"{'int4' if 'int4' in name or '4 bits' in name else 'int8'} weights, int8 inputs"
    return {"bfloat16, PyTorch": "bfloat16", "W8A8, PyTorch": "int8 weights and inputs"}.get(name, "float32")


records = []
for name, quality in qualities.items():
    record = ledger.Record(
        technique=name, model="lablm", device="cpu", dtype=format_of(name),
        threads=torch.get_num_threads(), prompt_tokens=prompt.shape[1], output_tokens=NEW_TOKENS,
        samples=[NEW_TOKENS / seconds for seconds in runs[name].samples_s],
        bits_per_byte=quality.bits_per_byte, baseline_bits_per_byte=quality.baseline_bits_per_byte,
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in documents),
        document_bits=bits_of_variant[name], chapter="03",
    )  # fmt: skip
    records.append(record)
    ledger.append(record)

# %%
from labutils.lab.plots.speed_quality import beaten_by, draw_speed_quality, speed_quality_table

figure, axes = plt.subplots(figsize=(9, 8), layout="constrained")
draw_speed_quality(records, ax=axes)
plt.show()
print(speed_quality_table(records))
beaten = [record.technique for record in records if beaten_by(record, records)]
print("\nsurely slower and surely worse than another, on this machine at batch 1:", "; ".join(beaten) or "none")
print(f"\n{'tokens/s':<12}{'NumPy between':>14}{'C between':>12}")
for name in ("float32", "int8, row"):
    rates = [NEW_TOKENS / runs[each].median_s for each in (f"{name}, NumPy steps", name)]
    print(
        f"{name:<12}{rates[0]:14.0f}{rates[1]:12.0f}   C gains {paired_ratio(runs[f'{name}, NumPy steps'].samples_s, runs[name].samples_s)}"
    )
for end in (", NumPy steps", ""):
    gain = paired_ratio(runs[f"float32{end}"].samples_s, runs[f"int8, row{end}"].samples_s)
    print(f"int8 gains with {'NumPy' if end else 'C'} between the matrices {gain}")

# %% [markdown]
# *Generation speed (32 tokens after a prompt of 64, batch 1, 7 interleaved rounds, one warm-up) against bits per byte for the variants of
# LabLM. The dashed line joins the medians that no other median beats in both. In the table, `*` marks what no other variant
# **surely** beats: both differences, in speed and in bits per byte paired by document, exclude zero.*
#
# Read the small table before you praise integers. Along a row the weights stay and the steps between the matrices change; along a column
# the steps stay and the weights change. Does C gain more here than on section 11's larger model? In a small model the steps
# weigh more, and if 23 MB of float32 fit into your processor's cache (section 11 printed its size), bytes cost less.

# %% [markdown]
# ## 14 · What other libraries store
#
# One day you will open a file that another program wrote. "int8, symmetric, one scale a row" sounds like a full description, and it
# leaves out what decides every weight: is the scale max|w| / 127 or max|w| / 127.5? Where does a tie go? Which of two codes lies in the
# low half of a byte? Libraries answer differently, and few of them say so. One may even answer twice: look for llama.cpp's Q8_0 below.
#
# **Predict:** below are several libraries' formats. Do most of them share one rule for the scale? How many different rules will you count?

# %%
my_rules = predict("different rules for the scale in the table of libraries' formats", None)

# %%
from IPython.display import Markdown, display

from labutils.quantization.conventions import casts_table, conventions_table, observed

my_rules.compare(len({row["scale"] for seen in observed().values() for row in seen["rows"].values() if "scale" in row}))
display(Markdown(conventions_table("scale", "codes", "zero point", "rounding")))

# %% [markdown]
# No row of this table was copied from documentation. `tests/formats_of_others.py` quantizes small rows of numbers with each package and
# keeps the one rule that explains every scale it saw. [FORMATS.md](FORMATS.md) adds groups, nibbles, what stays in floating point and
# surprising defaults.
#
# **Explain:** what is each of the rules 127, 127.5 and 128 good for, and what happens to a weight that is read with another one?
#
# <details><summary>An explanation</summary>
#
# 127 makes both +max and −max exact. 127.5 gives all 255 steps the same width, so the largest positive weight has to be
# clamped. 128 reaches one end exactly and loses the other, unless the scale carries a sign. None of these is wrong. What is wrong is to read
# codes with another library's rule: every weight is then off by the same small factor, which looks like rounding noise and is a bias.
# </details>

# %%
row = torch.randn(1000, generator=seeded())
codes = torch.round(row / (row.abs().max() / 127.5)).clamp(-128, 127)
for levels in (127.5, 127):
    back = codes * row.abs().max() / levels
    print(f"read with max|w| / {levels}: on average {(back @ row) / (row @ row):.4f} times the weight")

# %% [markdown]
# ### GGUF's four bits
#
# llama.cpp's Q4_0 keeps 32 weights in 18 bytes: a float16 scale d, then 16 bytes of codes q from 0 to 15. Byte j holds weight j in its
# low half and weight j + 16 in its high half:
#
# $$w = d \cdot (q - 8)$$
#
# Codes reach −8 but only +7. To lose nothing, the weight of the largest magnitude always gets q = 0, the step −8: if that weight is positive,
# **d is negative**. **Tiny numbers:** d = −0.5 and q = 0 mean −0.5 · (0 − 8) = 4.
#
# ## Exercise 3.11: decode_q4_0
#
# Write `decode_q4_0(block)`: the 32 weights, as float32, of one block, a NumPy array of 18 bytes (uint8). 3 lines, 8 minutes,
# difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>block[:2].view(np.float16)</code> reads the scale, <code>& 15</code> and <code>>> 4</code> read the halves.</details>
# <details><summary>Hint 2</summary>A byte 0x2F with d = 1 holds the codes 15 and 2. Which weights are they, j and j + 16, and what are their values?</details>
# <details><summary>Hint 3</summary>Join the 16 low halves and the 16 high halves, in that order, and convert to float32 before you subtract 8.</details>


# %%
# EXERCISE decode_q4_0
def decode_q4_0(block):
    """The 32 weights of one Q4_0 block."""
    ### BEGIN SOLUTION
    scale = block[:2].view(np.float16).astype(np.float32)
    codes = np.concatenate([block[2:] & 15, block[2:] >> 4])
    return scale * (codes.astype(np.float32) - 8)
    ### END SOLUTION


# %%
# CHECK decode_q4_0
from labutils.course.checks import ch03_formats

ch03_formats.decode_q4_0(decode_q4_0)

# %% [markdown]
# `labutils` writes GGUF files (`python -m labutils export gguf`) and reads them, including the larger blocks Q4_K and Q6_K, in which the
# scales are quantized as well. How many of LabLM's Q4_0 scales are negative?

# %%
from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.gguf_blocks import encode_q4_0
from labutils.lab.models.gguf_read import read_gguf

weight = model.model.layers[0].mlp.down_proj.weight.detach()
with tempfile.TemporaryDirectory() as folder:
    export_gguf(model, tokenizer, Path(folder) / "lablm.gguf", format="Q4_0")
    stored = read_gguf(Path(folder) / "lablm.gguf")
blocks = encode_q4_0(weight.numpy()).reshape(-1, 18)
negative = (blocks[:, :2].copy().view(np.float16) < 0).mean()
back = torch.from_numpy(stored.tensors["blk.0.ffn_down.weight"])
print(f"{len(stored.tensors)} tensors, {len(stored.metadata)} entries; negative scales in one matrix: {negative:.0%}")
print(f"error after Q4_0: {(back - weight).norm() / weight.norm():.1%}; with |d| instead of d: ", end="")
signs = (
    torch.from_numpy(np.sign(blocks[:, :2].copy().view(np.float16).astype(np.float32)))
    .expand(-1, 32)
    .reshape(weight.shape)
)
print(f"{(back * signs - weight).norm() / weight.norm():.0%}")

# %% [markdown]
# ### The same scale, and codes that differ by one
#
# GGUF's Q8_0 and several other formats share the rule max|w| / 127. Their codes still differ in places, always by one. The
# table's last column tells why: $w / d$ may lie halfway between two codes. IEEE 754 and most libraries then choose the *even* one (0.5 → 0,
# 1.5 → 2); GGUF goes *away from zero* (0.5 → 1, 1.5 → 2).
#
# ## Exercise 3.12: differing_codes
#
# Write `differing_codes(row)`: the indices of the weights whose codes differ between the two roundings, as a NumPy array; the scale is
# max|w| / 127. 3 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary><code>np.rint</code> rounds ties to even. For the other way, add a half that has the number's own sign, then cut the fraction off.</details>
# <details><summary>Hint 2</summary>For 2.5 and −2.5, ties to even gives 2 and −2, away from zero 3 and −3. What does cutting off the fraction make of 3.0 and −3.0, and how do you get there from ±2.5?</details>
# <details><summary>Hint 3</summary><code>np.trunc(ratio + np.copysign(0.5, ratio))</code>, and <code>np.flatnonzero</code> of where the codes differ.</details>


# %%
# EXERCISE differing_codes
def differing_codes(row):
    """Where ties to even and ties away from zero give different int8 codes."""
    ### BEGIN SOLUTION
    ratio = row / (np.abs(row).max() / 127)
    away = np.trunc(ratio + np.copysign(0.5, ratio))
    return np.flatnonzero(away != np.rint(ratio))
    ### END SOLUTION


# %%
# CHECK differing_codes
ch03_formats.differing_codes(differing_codes)

# %% [markdown]
# ### compressed-tensors, and the axis of its zero points
#
# The checkpoints of vLLM and of LLM Compressor keep a matrix (outputs, inputs) as `weight_packed`: eight 4-bit codes in each 32-bit word,
# neighbours along the *inputs*, the first in the lowest bits, each stored as code + 8. The zero points, one for each output and group, are
# packed in the same way, but down the **outputs**: word (i, g) holds those of outputs 8 i to 8 i + 7 for group g.
#
# ## Exercise 3.13: unpack_zero_points
#
# Write `unpack_zero_points(packed, outputs)`: integers of shape (outputs, groups) from int32 words of shape (words, groups). 3 lines, 10
# minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Shift each word right by 0, 4, 8 … 28 and keep the lowest four bits: a new axis of length 8.</details>
# <details><summary>Hint 2</summary>One word 0x98 has the codes 8 and 9, so outputs 0 and 1 have zero points 0 and 1. Where must the new axis of eight stand, so that the words' axis and it become the outputs?</details>
# <details><summary>Hint 3</summary><code>packed[:, None, :] >> shifts[:, None] & 15</code> has the new axis where it can be merged with the words by <code>reshape</code>.</details>


# %%
# EXERCISE unpack_zero_points
def unpack_zero_points(packed, outputs):
    """Zero points (outputs, groups) that were packed down the outputs."""
    ### BEGIN SOLUTION
    shifts = 4 * np.arange(8)
    codes = packed[:, None, :] >> shifts[:, None] & 15
    return codes.reshape(-1, packed.shape[1])[:outputs] - 8
    ### END SOLUTION


# %%
# CHECK unpack_zero_points
ch03_formats.unpack_zero_points(unpack_zero_points)

# %% [markdown]
# `save_compressed_tensors` writes such a folder from any method's codes; the head and the embedding stay in floating point. With the package
# `compressed-tensors` installed, `transformers` loads it. So does vLLM: on a CPU only codes of 4 bits, in float16 or bfloat16. Below, symmetric
# groups of 64, which have no zero points to pack.

# %%
from labutils.lab.models.compressed_tensors import read_compressed_tensors, save_compressed_tensors

layers = {name: nearest_codes(symmetric[4])(name, weight_of(layer)) for name, layer in linear_layers(model)}
with tempfile.TemporaryDirectory() as folder:
    save_compressed_tensors(model, tokenizer, Path(folder), layers)
    again = read_compressed_tensors(Path(folder))
    megabytes = (Path(folder) / "model.safetensors").stat().st_size / 1e6
    written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
same = all(torch.equal(dequantize(*again[name]), dequantize(*layers[name])) for name in layers)
scheme_written = written["config_groups"]["group_0"]["weights"]
print(f"{megabytes:.1f} MB, {len(again)} layers, the same weights: {same}")
print({key: scheme_written[key] for key in ("num_bits", "symmetric", "strategy", "group_size")})

# %% [markdown]
# ### Casts
#
# The last step is a cast, and casts disagree about numbers that the type does not hold. **Predict:** float8 E4M3 ends at 448. What do 1000 and
# NaN become in PyTorch, in JAX and in MLX? And what does 100 become as an int4?

# %%
display(Markdown(casts_table()))
print("PyTorch here:", torch.tensor([464.0, 465.0, 1000.0, float("nan")]).to(torch.float8_e4m3fn).float().tolist())
for name, bad in (("inf", float("inf")), ("nan", float("nan"))):
    try:
        fake_quantize(torch.tensor([[1.0, bad]]), Scheme(bits=4))
    except ValueError as error:
        print(f"labutils, {name}: {error}")

# %% [markdown]
# **Explain:** which of these behaviours would you want in a program that you have to debug?
#
# <details><summary>An explanation</summary>
#
# A cast that saturates hides an overflow. A cast that returns NaN shows it, one layer too late. An integer cast may do neither
# and keep the lowest bits. So check that numbers are finite, round and clamp by your own rule *before* you cast. That is what
# `quantize`, `encode`, the GGUF writer and the packed layers do: they name the problem before anything is stored.
# </details>
#
# Two more surprises of this kind, for those who mix tools. `transformers` has a quantized cache with a `residual_length`; its first call
# rounds the whole prompt all the same, while `QuantizedKVCache` of section 6 keeps the newest positions from the start. And safetensors'
# NumPy writer stores a transposed array as other numbers unless you call `np.ascontiguousarray` first.

# %% [markdown]
# ## 15 · The best LabLM in 3 bits
#
# Now choose. Below, your function stores each of the 42 layers, and the whole model must take at most 4.06 MB, with the embedding in 16 bits as
# in section 9. What counts is held-out code: there the loss of RTN 3 has to be beaten, by a paired interval that excludes zero.
#
# ## Exercise 3.14: three_bits
#
# Write `three_bits(name, weight, gram)`: the tuple (codes, qparams) of one layer. Codes are an int8 tensor of the weight's shape that needs 3
# bits, `qparams` a `QParams`, and `dequantize(codes, qparams)` is what the model will use. `gram` is XᵀX of the calibration text. `scheme` (3 bits,
# groups of 64), `choose_qparams`, `clipped_qparams`, `gptq`, `hqq` and `quantize` are at hand. Choose by calibration rows and look at the result
# last, or you measure your luck. 3 lines, 20 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Two choices are independent: which grid a group gets, and which point of it a weight is rounded to. Section 4 has ways for the first, section 3 for the second.</details>
# <details><summary>Hint 2</summary><code>gptq</code> returns rounded floats on the grid that you hand it. What turns them into codes again?</details>
# <details><summary>Hint 3</summary>Round a second time: on its own grid, <code>quantize(rounded, qparams)</code> changes nothing and gives the codes.</details>


# %%
# EXERCISE three_bits
def three_bits(name, weight, gram):
    """Codes of at most 3 bits, and their scales and zero points, for one layer."""
    ### BEGIN SOLUTION
    qparams = clipped_qparams(name, weight, gram, scheme)
    rounded = gptq(weight, gram, qparams, act_order=True)
    return quantize(rounded, qparams), qparams
    ### END SOLUTION


# %%
# CHECK three_bits
from labutils.course.checks import ch03_contest

ch03_contest.three_bits(three_bits, model, tokenizer, statistics)

# %% [markdown]
# ### The leaderboard
#
# Each entry becomes a record of your ledger: packed (3 bits travel in 4 here, as in section 13), timed, and judged by code, paired by document,
# and by translations. Change your function and `NAME`, and run its cells and this one again: the board keeps every entry. Two entries whose
# paired interval contains zero share a rank, however their averages are ordered.

# %%
from labutils.course.checks import CheckFailed
from labutils.measurement.timing import measure

NAME = "clipped grid, GPTQ"


def enter(name, answer):
    """Times and judges an answer, and appends it to the ledger."""
    layers, size_bytes = ch03_contest.entry(answer, model, statistics)
    variant = packed(lambda name, _: layers[name])
    bits = bits_by_document(variant, tokenizer, documents)
    timing = measure(generator_of(name, variant), repeats=5)
    record = ledger.Record(
        technique=f"contest: {name}", model="lablm", device="cpu", dtype="int3 weights in 4 bits, int8 inputs",
        threads=torch.get_num_threads(), prompt_tokens=prompt.shape[1], output_tokens=NEW_TOKENS,
        samples=[NEW_TOKENS / seconds for seconds in timing.samples_s], bytes_resident=size_bytes,
        bits_per_byte=sum(bit for bit, _ in bits) / sum(size for _, size in bits), document_bits=bits,
        baseline_bits_per_byte=table["float32"][1].bits_per_byte, task="to_english",
        task_score=score_task(variant, tokenizer, "to_english", count=40).accuracy, chapter="03",
    )  # fmt: skip
    ledger.append(record)


# %%
def leaderboard(records):
    """The contest's records as text, the least bits per byte first; entries not told apart share a rank."""
    board = sorted((r for r in records if r.technique.startswith("contest: ")), key=lambda r: r.bits_per_byte)
    lines, rank, leader = ["rank bits/byte  right     MB  tokens/s  entry"], 0, None
    for place, r in enumerate(board, start=1):
        if leader is None or paired_quality(r.document_bits, leader.document_bits).interval[0] > 0:
            rank, leader = place, r
        numbers = f"{rank:4} {r.bits_per_byte:9.4f} {r.task_score:6.1%} {r.bytes_resident / 1e6:6.2f}"
        lines.append(f"{numbers} {r.tokens_per_s:9.0f}  {r.technique.removeprefix('contest: ')}")
    return "\n".join(lines)


enter("round to nearest", lambda name, weight, gram: nearest_codes(scheme)(name, weight))
try:
    enter(NAME, three_bits)
except (CheckFailed, NotImplementedError) as reason:
    print(f"no entry: {reason}")
print(leaderboard(ledger.read()))

# %% [markdown]
# ## Words
#
# | word | meaning |
# | --- | --- |
# | RTN | round to nearest, each weight for itself |
# | calibration text | what the layers are fed while a method looks at their inputs; never what is measured on |
# | Gram matrix | XᵀX: how inputs vary together |
# | W8A8, W4A4 | so many bits for weights and for activations |
# | dynamic, static | an input's scale from itself; from calibration text |
# | outlier | an input channel far larger than the others |
# | to fold | to multiply a factor into a neighbouring weight, once and for all |
# | flip | a place where the likeliest token is another than float32's |
# | straight-through estimator | the gradient of round() taken as 1 |
# | VNNI, AMX | processor instructions that multiply 8-bit integers and add them up; on vectors, on tiles |
# | packed | codes as dense in memory as their bits allow |

# %% [markdown]
# ## What you have
#
# - a way to see losses: layer by layer, in paired bits per byte on the text that you serve, in flips, and in tasks;
# - GPTQ, AWQ, HQQ, SmoothQuant, LLM.int8, rotation, KIVI, SignRound, training and a trellis, each measured against plain rounding;
# - calibration text as a choice that decides what survives;
# - integer layers that are really faster, what of that is the weights' and what is C's, and cases in which they are not;
# - readers for two formats of the field, and the habit of asking for the scale rule, the rounding and the byte order.
#
# **Open question:** a hospital wants your 3-bit translator. Which text would you calibrate on, and which would you keep
# aside, so that nobody is fooled by the score?
#
# Next: **04 · Pruning**.

# %%
from labutils.course import predictions

predictions.calibration()

# %%
from labutils.course.progress import progress

progress()
