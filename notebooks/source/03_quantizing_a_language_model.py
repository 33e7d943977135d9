# %% [markdown]
# # 03 · Quantizing a language model
#
# **Goal:** bring a whole model to 8, 4, 3 and 2 bits with the methods that people really use, see what each one costs in
# quality, and find out which of them buy speed.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 02 |
# | Time | 3 hours for you; all cells run in about 3 minutes on one core (measured: 171 s, the core shared) |
# | Memory, download | 3 GB at the most; nothing is downloaded |
# | Hardware | any computer; a C compiler helps |
# | Exercises | 13 (3.1 to 3.7 on methods, 3.8 to 3.10 on speed, 3.11 to 3.13 on formats), each checked in the cell below it |

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch

from labutils.models.compare import bits_by_document, held_out_dialogues, held_out_documents, paired_quality
from labutils.models.evaluate_service import score_task
from labutils.models.load import load_model
from labutils.plots.style import series_style

model, tokenizer = load_model("lablm")
documents, dialogues = held_out_documents(limit_bytes=1000), held_out_dialogues()
baseline, dialogue_baseline = (bits_by_document(model, tokenizer, each) for each in (documents, dialogues))
print(
    f"{len(documents)} held-out modules, {len(dialogues)} bundles of dialogues, {torch.get_num_threads()} threads, float32 on cpu"
)

# %% [markdown]
# ## 1 · How to see a loss
#
# Three ways, from near to far:
#
# - **one layer's output**: $\lVert X(W-\hat W)^\top \rVert^2 / \lVert XW^\top \rVert^2$;
# - **bits per byte** on held-out code, and on held-out service dialogues, *paired*: the difference on the same texts, with its
#   own 95% interval;
# - **tasks**: customers' intents named, and Chinese requests put into English, in phrasings that recombine what training showed.
#
# `look` keeps the last two for the table at the end (of each module its first 1,000 bytes, so the number is higher than chapter 00's,
# which reads further: a text's beginning is its hardest part). A score over 40 items is coarse: one item is 2.5 points, and the
# standard error of a share near one half is 8 points.

# %%
TASKS = ("intent", "to_english")
table = {}


def look(name, variant, size_bytes, tasks=TASKS):
    """Measures a variant on the held-out text and on the tasks, and keeps it for the table."""
    quality = paired_quality(bits_by_document(variant, tokenizer, documents), baseline)
    talk = paired_quality(bits_by_document(variant, tokenizer, dialogues), dialogue_baseline)
    scores = {task: score_task(variant, tokenizer, task, count=40).accuracy for task in tasks}
    table[name] = (size_bytes, quality, scores, talk)
    shares = ", ".join(f"{task} {score:.3f}" for task, score in scores.items())
    low, high = quality.interval
    relative = f"dialogues {talk.difference / talk.baseline_bits_per_byte:+.1%}"
    print(
        f"{name:<22} {size_bytes / 1e6:5.2f} MB  {quality.difference:+.4f} [{low:+.4f}, {high:+.4f}]  {relative:<17} {shares}"
    )


look("float32", model, 4 * model.num_parameters())
look("bfloat16, as shipped", copy.deepcopy(model).bfloat16(), 2 * model.num_parameters())
print(f"float32 needs {table['float32'][1].bits_per_byte:.4f} bits per byte")

# %% [markdown]
# Some methods look at text first. **Calibration text** comes from the training split, never from what we measure on:
# here eight rows of library code and eight of service dialogues. One pass collects for each layer what it was fed:
# $X^\top X$, mean and largest $|x_j|$. Text X itself need not be kept.

# %%
from labutils.layers.calibration import input_statistics, layer_error
from labutils.layers.linears import change_weights_, linear_layers, weight_of
from labutils.models.calibration_text import calibration_batches

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
# ## Exercise 3.1: output_error
#
# Write `output_error(weight, rounded, gram)`: $\lVert X(W-\hat W)^\top \rVert^2 / \lVert XW^\top \rVert^2$ as one number; weights
# are (out, in), the Gram matrix (in, in). 3 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>d G dᵀ for every row d of the difference, then the sum over rows. And the same for W itself.</details>
# <details><summary>Hint 2</summary><code>((d @ gram) * d).sum()</code> does all rows at once.</details>


# %%
# EXERCISE output_error
def output_error(weight, rounded, gram):
    """Relative squared error of a layer's outputs."""
    ### BEGIN SOLUTION
    difference = weight - rounded
    whole = ((weight @ gram) * weight).sum()
    return ((difference @ gram) * difference).sum() / whole
    ### END SOLUTION


# %%
# CHECK output_error
from labutils.checks import ch03

ch03.output_error(output_error)

# %% [markdown]
# ## 2 · Round to nearest
#
# The method that all others have to beat: chapter 02's `fake_quantize` on every linear layer. The embedding, which is
# also the head, stays in 16 bits. Sizes count codes, scales and zero points, in the bits they need.
#
# **Predict:** where does the model break: at 4, 3 or 2 bits? And what breaks first: code, intents or translations?

# %%
from labutils.quantization.affine import Scheme, choose_qparams, dequantize, fake_quantize, quantize
from labutils.quantization.model_weights import model_bytes


def scheme_of(bits, group_size=64):
    shared = {"granularity": "group", "group_size": group_size} if group_size else {"granularity": "channel"}
    return Scheme(bits=bits, symmetric=False, scale_dtype=torch.float16, **shared)


def size_of(scheme, zero_bits=None):
    return model_bytes(model, {name: scheme for name, _ in linear_layers(model)}, zero_bits=zero_bits)


def changed(change):
    return change_weights_(copy.deepcopy(model), change)


ROUNDINGS = {"RTN 8, row": (8, None), "RTN 4": (4, 64), "RTN 3": (3, 64), "RTN 3, row": (3, None), "RTN 2": (2, 64)}
for name, (bits, group_size) in ROUNDINGS.items():
    scheme = scheme_of(bits, group_size)
    look(name, changed(lambda _, weight, scheme=scheme: fake_quantize(weight, scheme)), size_of(scheme))

# %%
names = ["float32", *ROUNDINGS]
relative = [100 * table[n][1].difference / table[n][1].baseline_bits_per_byte for n in names]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.bar(range(len(names)), [max(r, 0) for r in relative], color="#0072B2")
left.set(
    ylabel="more bits per byte (%)", yscale="symlog", title=f"3 bits by row: {relative[4]:.1f}% more bits for code …"
)
for index, task in enumerate(TASKS):
    right.plot(range(len(names)), [100 * table[n][2][task] for n in names], label=task, **series_style(index))
translated = 100 * table["RTN 3, row"][2]["to_english"]
right.set(ylabel="exact replies (% of 40)", title=f"… and {translated:.0f}% of the translations left", ylim=(-3, 103))
right.legend()
for axes in (left, right):
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# *The figure shows, for each rounding, how many more bits held-out code costs (left, logarithmic above 1), and the share
# of service requests answered exactly right (right).*
#
# **Explain.** Two things happen at once. The left panel measures *code*, the right one *dialogues*: compare the printed losses on
# dialogues before you say that tasks break first: at 3 bits the loss there is about twice that on code. And a translation is right only if
# *every* token is, so small losses multiply. Look at what the 3-bit model says:

# %%
three_bits = changed(lambda _, weight: fake_quantize(weight, scheme_of(3, None)))
code = tokenizer(
    "<|endoftext|>import os\n\n\ndef read_lines(path):\n    ", return_tensors="pt", add_special_tokens=False
)
for label, variant in (("float32", model), ("3 bits by row", three_bits)):
    written = variant.generate(code["input_ids"], max_new_tokens=32, do_sample=False, pad_token_id=1)
    print(f"--- {label}:\n{tokenizer.decode(written[0], skip_special_tokens=True)}")
said = score_task(three_bits, tokenizer, "to_english", count=40)
for index in [i for i, right in enumerate(said.is_right) if not right][:3]:
    print(f"--- asked for: {said.references[index]}\n--- 3 bits say: {said.predictions[index]}")

# %% [markdown]
# ## 3 · GPTQ: let the others make up for it
#
# Plain rounding treats each weight alone. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds column after column, and
# moves the columns still to come so that the *output* stays where it was. With $H = 2X^\top X + \lambda I$ and U upper
# triangular, $U^\top U = H^{-1}$:
#
# $$e_j = \frac{w_j - \hat w_j}{U_{jj}}, \qquad w_k \leftarrow w_k - e_j\,U_{jk} \quad (k > j)$$
#
# λ is 1% of H's mean diagonal, or H might have no inverse. **Tiny numbers:** w = (0.4, 0.4), step 1, and two inputs that
# are nearly equal. What do the two methods give for x = (1, 1)?

# %%
from labutils.layers.calibration import inverse_factor
from labutils.quantization.gptq import gptq

tiny, gram = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.95], [0.95, 1.0]])
grid = choose_qparams(torch.tensor([[7.0, 0.0]]), Scheme(bits=4))  # a step of 1
nearest, compensated = dequantize(quantize(tiny, grid), grid), gptq(tiny, gram, grid)
print("U =", inverse_factor(gram).tolist())
for label, w in (("exact", tiny), ("to nearest", nearest), ("GPTQ", compensated)):
    print(f"{label:<11} w = {w.tolist()[0]}, output {w.sum():.1f}, output error {layer_error(tiny, w, gram):.3f}")

# %% [markdown]
# ## Exercise 3.2: gptq_round
#
# Write `gptq_round(weight, factor, scale, qmax)`: the rounded weight (out, in) as floats. `factor` is U (in, in),
# `scale` holds one step a row (out,), codes are round(w / scale), clamped to −qmax … qmax. Do not change `weight`.
# 6 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Clone the weight. For each column j: round it, divide the error by U[j, j], and subtract its outer product with row j of U from the columns after j.</details>
# <details><summary>Hint 2</summary><code>work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]</code></details>


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
# `labutils` does the same in blocks of 128 columns (the errors of a block reach the rest in one matrix product) and, with
# `act_order`, begins with the inputs of the largest energy. Scales are RTN's, so only the rounding differs. If H = I there
# is nothing to gain, and both agree bit for bit.
#
# **Predict:** in how many of the 42 layers does GPTQ beat rounding on rows that it never saw?

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
figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
for index, label in enumerate(("round to nearest", "GPTQ")):
    axes.semilogy(range(len(errors)), 100 * errors[:, index], linestyle="none", label=label, **series_style(index))
title = f"GPTQ beats rounding in {wins} of {len(errors)} layers on rows it never saw (3 bits)"
axes.set(xlabel="layer (q, k, v, o, gate, up, down of each block)", ylabel="output error (%)", title=title)
axes.legend()
axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# *The figure shows each layer's relative output error at 3 bits, groups of 64, on rows that were not calibrated on.*
#
# Which text should the calibration show? **Predict:** GPTQ that has only ever seen *code*: better or worse than RTN at
# translating?

# %%
code_only = input_statistics(model, calibration_batches(tokenizer, code=16, dialogues=0), with_gram=True)
look("GPTQ 3, code only", with_gptq(code_only), size_of(scheme))
look("GPTQ 3", gptq_model, size_of(scheme))
rows = ["RTN 3", "GPTQ 3, code only", "GPTQ 3"]
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for index, task in enumerate(TASKS):
    places = [i + 0.36 * index for i in range(3)]
    color = series_style(index)["color"]
    axes.bar(places, [100 * table[row][2][task] for row in rows], width=0.34, label=task, color=color)
labels = [f"{row}\n{table[row][1].difference:+.3f} bits per byte" for row in rows]
axes.set_xticks([i + 0.18 for i in range(3)], labels)
change = 100 * (table["GPTQ 3, code only"][2]["to_english"] - table["RTN 3"][2]["to_english"])
axes.set(
    ylabel="exact replies (% of 40)", title=f"Calibrated on code alone: {change:+.0f} points of translation against RTN"
)
axes.legend(loc="upper center", ncols=2)
axes.set_ylim(top=125)
plt.show()

# %% [markdown]
# *The figure shows both task scores of three 3-bit models of the same size, and below each its loss on held-out code.*
#
# **Explain.** GPTQ keeps what the calibration text uses, and pays with directions that it never saw. Judged by bits per
# byte on code, code-only calibration looks like a success. Bits per byte on dialogues, printed beside it, give it away: measure on
# the domain that you serve.

# %% [markdown]
# ## 4 · AWQ, clipping, HQQ
#
# A weight's error counts as much as its input is large. AWQ (Lin et al. 2023, arXiv:2306.00978) makes the columns that
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
# ## Exercise 3.3: best_alpha
#
# Write `best_alpha(weight, mean_abs, gram, scheme)`: the α of `ALPHAS` with the least output error. Use `awq_scale`,
# `fake_quantize(weight, scheme)` and `layer_error(weight, rounded, gram)`. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Multiply the weight's columns by s, round, divide by s again: that weight meets the original inputs.</details>
# <details><summary>Hint 2</summary>Collect <code>losses[alpha]</code> in a dict and return <code>min(losses, key=losses.get)</code>.</details>


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
# keys are left alone). **HQQ** (Badri and Shaji 2023) wants no text at all: it solves for zero points (real numbers now)
# that leave the weight's own error sparse, $|W-\hat W|^{0.7}$, in at most 20 steps.
#
# Scale and clip search also serve each other, and GPTQ can round on the clipped grid.

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
# Look whether the scale alone helped here. AWQ's idea needs inputs that stick out. In models of billions of parameters a
# few do behind the norms, by a factor of up to 20 (Dettmers et al. 2022, arXiv:2208.07339). In a model as small as LabLM they do not,
# behind the norms; behind the SwiGLU, in the inputs of `down_proj`, it has large values of its own (section 5 meets them).
#
# So we **inject outliers**: three channels behind each norm become 30 times as large (norm gain × 30, the next weights'
# columns ÷ 30). The model computes what it computed. This is a simulation of what large models have by nature.

# %%
from labutils.quantization.folding import inject_outliers_


def seeded():
    return torch.Generator().manual_seed(0)


injected = copy.deepcopy(model)
inject_outliers_(injected, channels=3, factor=30.0, generator=seeded())
injected_statistics = input_statistics(injected, calibration, with_gram=True)
with torch.no_grad():
    print(f"injected: logits moved by at most {(injected(ids).logits - logits).abs().max():.1e}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
at = "model.layers.2.mlp.gate_proj"
for index, (label, seen) in enumerate((("LabLM", statistics), ("with injected outliers", injected_statistics))):
    axes.semilogy(
        seen[at].absmax.sort(descending=True).values, label=label, color=series_style(index)["color"], linewidth=2
    )
ratio = (injected_statistics[at].absmax.max() / statistics[at].absmax.max()).item()
axes.set(xlabel="input channel of block 2's gate_proj, largest first", ylabel="max |x| over the calibration text")
axes.set_title(f"Injected: three channels stand {ratio:.0f} times above LabLM's largest")
axes.legend()
plt.show()

# %% [markdown]
# *The figure shows the largest value of each input channel of one layer, sorted, before and after the injection.*
#
# Now AWQ's ablation ladder (its table 1): keep 1% of the columns in floating point and round the rest to 4 bits. Which
# 1%? The control that makes it an experiment is a **random** 1%. Know what the injection fixes beforehand: it made three channels
# large, 1% of the columns is three, and it divided just those columns' weights by 30. So the ladder can only show that the
# criterion finds what was planted.

# %%
four_bits = scheme_of(4)
random_order = seeded()
ways = {
    "protect nothing": lambda name, w: torch.zeros(w.shape[1]),
    "a random 1%": lambda name, w: torch.rand(w.shape[1], generator=random_order),
    "1% by weight norm": lambda name, w: w.norm(dim=0),
    "1% by mean |x|": lambda name, w: injected_statistics[name].mean_abs,
}


def protecting(score, share=0.01):
    def change(name, w):
        rounded, kept = fake_quantize(w, four_bits), score(name, w).topk(round(share * w.shape[1])).indices
        rounded[:, kept] = w[:, kept]
        return rounded

    return change


# %%
def cost(variant):
    return paired_quality(bits_by_document(variant, tokenizer, documents), baseline)


ladder = {
    way: cost(
        change_weights_(copy.deepcopy(injected), protecting(score, share=0.01 if way != "protect nothing" else 0))
    )
    for way, score in ways.items()
}
variant = copy.deepcopy(injected)
awq_scale_(variant, injected_statistics, four_bits)
ladder["AWQ's scale, nothing kept"] = cost(change_weights_(variant, lambda _, w: fake_quantize(w, four_bits)))
for way, quality in ladder.items():
    print(f"{way:<26} {quality}")


# %%
def draw_costs(qualities, title, axes):
    """Each variant's loss in bits per byte with its paired 95% interval."""
    for index, (label, quality) in enumerate(qualities.items()):
        low, high = quality.interval
        bars = [[max(quality.difference - low, 0)], [max(high - quality.difference, 0)]]
        axes.errorbar([quality.difference], [label], xerr=bars, capsize=4, markersize=8, **series_style(index))
    axes.set(xlabel="more bits per byte than float32 (95% interval)", title=title)
    axes.invert_yaxis()
    axes.grid(alpha=0.25)


figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
nothing, by_chance, best = (ladder[k].difference for k in ("protect nothing", "a random 1%", "1% by mean |x|"))
title = f"A random 1% saves {1 - by_chance / nothing:.0%} of the loss, the largest inputs {1 - best / nothing:.0%}"
draw_costs(ladder, title, axes)
plt.show()

# %% [markdown]
# *The figure shows the loss of LabLM with injected outliers at 4 bits, groups of 64, with different columns kept in
# floating point; the last row keeps none, but scales.*
#
# The activations find the planted columns. The norm of the weight cannot find them here, because the injection made those weights
# small; that row says nothing about weight norms in general. And scaling gets about as far as keeping columns, without a second
# number format.

# %% [markdown]
# ## 5 · Activations in integers too
#
# With weights alone in integers, each product still happens in floats. W8A8 rounds the inputs as well and multiplies
# int8 × int8 → int32: one scale for each output row, and for the inputs either a scale for **each token** (dynamic) or
# one scale **fixed on calibration text** (static; cheaper, and helpless against surprises).
#
# One huge channel ruins a token's scale for all its channels. **Predict:** which of the two suffers more from outliers?

# %%
from labutils.quantization.integer_linear import use_integers_

activations = {}
for kind, source, seen in (("LabLM", model, statistics), ("injected", injected, injected_statistics)):
    activations[f"{kind}, W8A8 dynamic"] = cost(use_integers_(copy.deepcopy(source)))
    activations[f"{kind}, W8A8 static"] = cost(use_integers_(copy.deepcopy(source), static=seen))
for label, quality in activations.items():
    print(f"{label:<24} {quality}")

# %% [markdown]
# Three answers to outliers. **SmoothQuant** (Xiao et al. 2022, arXiv:2211.10438, equation 4) moves half of the difficulty
# into the weights. It divides input j by
#
# $$s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1-\alpha}}, \qquad \alpha = 0.5$$
#
# and multiplies the weight's column by it, folded like AWQ's scale. **Tiny numbers:** max|X| = 64 and max|W| = 1 give
# s = 8: afterwards both reach 8.
#
# ## Exercise 3.4: smoothing
#
# Write `smoothing(input_absmax, weight, alpha)`: s for every input; the weight is (out, in). 2 lines, 5 minutes,
# difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>max |W_j| runs over all outputs that read input j.</details>
# <details><summary>Hint 2</summary><code>weight.abs().amax(dim=0)</code>.</details>


# %%
# EXERCISE smoothing
def smoothing(input_absmax, weight, alpha):
    """SmoothQuant's scale for every input."""
    ### BEGIN SOLUTION
    weight_absmax = weight.abs().amax(dim=0)
    return input_absmax**alpha / weight_absmax ** (1 - alpha)
    ### END SOLUTION


# %%
# CHECK smoothing
ch03.smoothing(smoothing)

# %% [markdown]
# **LLM.int8** (Dettmers et al. 2022) splits the product: the few columns of x in which some token reaches |x| ≥ 6 stay in
# floating point, the others go through int8.
#
# $$x W^\top \approx \sum_{j \in O} x_j w_j + s_x s_w \Big(\sum_{j \notin O} q^x_j\, q^w_j\Big), \quad O = \{j : \exists\, \text{token } |x_j| \ge 6\}$$
#
# ## Exercise 3.5: split_product
#
# Write `split_product(x, weight, threshold)` for x (tokens, in) and weight (out, in). Round with `fake_quantize`: x with
# `Scheme(granularity="token")`, the weight with `Scheme()` (8 bits, one scale a row), both *without* the outlier columns.
# 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Find the columns as a mask. Set them to 0 in copies of x and weight before rounding: zeros change no scale.</details>
# <details><summary>Hint 2</summary><code>outliers = (x.abs() >= threshold).any(dim=0)</code>, then <code>x.masked_fill(outliers, 0)</code>.</details>


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
# stands out: $x W^\top = (xQ)(WQ)^\top$. The residual stream is rotated inside the weights, once the norms' gains are
# folded away; the head needs a matrix of its own then, where it was tied to the embedding.
#
# **Tiny numbers:** Q is Hadamard's matrix, all of its entries ±1/√n.

# %%
from labutils.quantization.rotation import fold_gains_, hadamard, rotate_

rotation = hadamard(8, generator=seeded())
spike = torch.zeros(8).index_fill(0, torch.tensor([3]), 8.0) + 0.1
print("before:", spike.numpy().round(1), "max", round(spike.abs().max().item(), 2))
print("after: ", (spike @ rotation).numpy().round(1), "max", round((spike @ rotation).abs().max().item(), 2))
print("length:", round(spike.norm().item(), 3), round((spike @ rotation).norm().item(), 3))
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

# %%
W8A8 = {
    "nothing": activations["injected, W8A8 dynamic"],
    "nothing, static scales": activations["injected, W8A8 static"],
    "SmoothQuant": cost(use_integers_(copy.deepcopy(smooth))),
    "SmoothQuant, static scales": cost(use_integers_(copy.deepcopy(smooth), static=smoothed_statistics)),
    "LLM.int8": cost(use_integers_(copy.deepcopy(injected), outliers=after_norms)),
    "gains folded": cost(use_integers_(copy.deepcopy(gains_only))),
    "rotation": cost(use_integers_(copy.deepcopy(rotated))),
}
W4A4 = {
    "nothing": cost(use_integers_(copy.deepcopy(injected), bits=4)),
    "SmoothQuant": cost(use_integers_(smooth, bits=4)),
    "gains folded": cost(use_integers_(gains_only, bits=4)),
    "rotation": cost(use_integers_(rotated, bits=4)),
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
best8, best4 = (min(rows, key=lambda k, rows=rows: rows[k].difference) for rows in (W8A8, W4A4))
draw_costs(W8A8, f"W8A8: least loss with {best8}", left)
draw_costs(W4A4, f"W4A4: least loss with {best4}", right)
right.set_xscale("log")
plt.show()
for bits, rows in (("W8A8", W8A8), ("W4A4", W4A4)):
    for label, quality in rows.items():
        print(f"{bits} {label:<27} {quality}")

# %% [markdown]
# *The figure shows what integer weights and activations cost LabLM with injected outliers: 8 bits (left) and 4 bits
# (right, logarithmic), by the way in which outliers are treated.*
#
# **Explain, and be fair.** Our injection sits in the norms' gains, so folding the gains *undoes* it: "gains folded" is
# the control that shows how much is left for the rotation itself. At 4 bits that is real: it spreads the large values
# that LabLM has by nature, in the inputs of `down_proj`. There |x| ≥ 6 is common (the threshold belongs to the residual
# stream of large models), so LLM.int8 splits only layers behind a norm here, at columns found on the calibration text.

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
# and return 5.3, 5.3, 8, 8. Keys of models with a key bias, such as Qwen2's, lie that far from zero.
#
# ## Exercise 3.6: round_keys
#
# Write `round_keys(keys, bits, group_size)`: keys are (batch, heads, positions, head_dim); round them as KIVI does, the same shape
# back. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Which axis must be last for a group to hold positions? Turn it there, and cut it into groups.</details>
# <details><summary>Hint 2</summary><code>x.unflatten(-1, (-1, group_size))</code> makes groups, <code>amin(-1, keepdim=True)</code> finds their minima.</details>


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
from torch.nn.functional import cross_entropy

from labutils.data.corpus import stdlib_documents
from labutils.quantization.kv_cache import QuantizedKVCache

texts = [tokenizer(d.text[:3000], add_special_tokens=False)["input_ids"][:255] for d in stdlib_documents("test")]
rows = torch.tensor([[tokenizer.bos_token_id, *text] for text in texts])
sizes = [len(tokenizer.decode(text).encode()) for text in texts]


@torch.no_grad()
def cached_bits(cache):
    pieces = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in rows.split(64, dim=1)]
    nats = cross_entropy(torch.cat(pieces, 1)[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none").sum(dim=1)
    return list(zip((nats / math.log(2)).tolist(), sizes, strict=True))


# %%
full = QuantizedKVCache(model.config, bits=8, recent=10**6)  # nothing is ever old enough to be rounded
full_bits = cached_bits(full)
settings = {"KIVI 8": (8, "channel", "token"), "KIVI 4": (4, "channel", "token"), "KIVI 2": (2, "channel", "token")}
settings |= {"2, keys by token": (2, "token", "token"), "2, values by channel": (2, "channel", "channel")}
caches, bits_of = {}, {}
for name, (bits, keys, values) in settings.items():
    cache = QuantizedKVCache(model.config, bits=bits, recent=32, keys_along=keys, values_along=values)
    bits_of[name] = cached_bits(cache)
    caches[name] = paired_quality(bits_of[name], full_bits)
    print(f"{name:<21} {full.resident_bytes / 2 / cache.resident_bytes:4.2f}x smaller than fp16  {caches[name]}")
for other in ("2, keys by token", "2, values by channel"):
    low, high = paired_quality(bits_of[other], bits_of["KIVI 2"]).interval
    print(f"{other} minus KIVI 2: [{low:+.4f}, {high:+.4f}] bits per byte, paired")
# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
ratio = caches["2, keys by token"].difference / caches["KIVI 2"].difference
draw_costs(caches, f"At 2 bits, keys by token lose {ratio:.2f} times as much as keys by channel", axes)
plt.show()

# %% [markdown]
# *The figure shows the loss against a full float32 cache on the same 17 texts of 256 tokens, for five ways to round it.*
#
# Each interval in the figure is against the full cache, so two that overlap do not tell their caches apart. The paired differences
# printed above do: an axis matters here if its interval excludes zero. The paper's larger model fell apart when its values were
# rounded along the other axis; see whether LabLM does. Why are 2 bits not eight times smaller than fp16? The newest 32 positions
# stay in full, in float32 here, and every 32 numbers carry a scale and a minimum of 16 bits each. The cache gets smaller, not
# faster: this version unpacks everything in every step.

# %% [markdown]
# ## 7 · Training with the rounding in sight
#
# At 2 bits, rounding destroys LabLM. Quantization-aware training lets the forward pass see rounded weights, and
# adjusts the real ones behind them. But rounding has the gradient 0 almost everywhere. The **straight-through
# estimator** (Bengio et al. 2013, arXiv:1308.3432) pretends that it is 1:
#
# $$\text{forward: } \hat w = \operatorname{round}(w), \qquad \text{backward: } \frac{\partial \hat w}{\partial w} := 1$$
#
# ## Exercise 3.7: straight_through
#
# Write `straight_through(weight, scheme)`: its value is `fake_quantize(weight, scheme)`, its gradient that of `weight`
# itself. 1 line, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Write the rounded weight as weight + (rounded − weight). Through which part may the gradient flow?</details>
# <details><summary>Hint 2</summary><code>.detach()</code> makes a constant of the bracket.</details>


# %%
# EXERCISE straight_through
def straight_through(weight, scheme):
    """Rounded in the forward pass, the identity in the backward pass."""
    ### BEGIN SOLUTION
    return weight + (fake_quantize(weight, scheme) - weight).detach()
    ### END SOLUTION


# %%
# CHECK straight_through
ch03.straight_through(straight_through)

# %%
from labutils.quantization.qat import train_quantized_

two_bits, STEPS = scheme_of(2), 14
training_rows = torch.cat(calibration_batches(tokenizer, code=4 * STEPS, dialogues=4 * STEPS, context=256, seed=2))
order = torch.randperm(len(training_rows), generator=seeded())
trained = copy.deepcopy(model).train()
losses = train_quantized_(trained, training_rows[order].split(8), two_bits, learning_rate=3e-4)
print(f"{STEPS} steps of {training_rows[:8].numel()} tokens: {losses[0]:.2f} → {losses[-1]:.2f} nats per token")
rounded = changed(lambda n, w: gptq(w, statistics[n].gram, choose_qparams(w, two_bits), act_order=True))
look("GPTQ 2", rounded, size_of(two_bits))
look("QAT 2", trained.eval(), size_of(two_bits))

# %% [markdown]
# Compare with RTN at 2 bits above, and with GPTQ. Training needs gradients, memory for them, and text; a real run takes
# thousands of steps, ours takes the few printed above, too few to judge the method. Bits per byte came more than half of the way
# back; look at the tasks before you call it repaired.

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
    expected = model(few).logits.log_softmax(dim=-1)


def divergence(variant):
    return (expected.exp() * (expected - variant(few).logits.log_softmax(dim=-1))).sum(dim=-1).mean().item()


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
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
axes.imshow(grid, cmap="cividis", vmin=1, vmax=5)
for (row, column), bits in [((r, c), grid[r, c].item()) for r in range(len(kinds)) for c in range(grid.shape[1])]:
    axes.text(column, row, bits, ha="center", va="center", color="white" if bits < 3 else "black")
most = max(range(len(kinds)), key=lambda r: grid[r].float().mean())
axes.set(
    xlabel="block", yticks=range(len(kinds)), title=f"With 3 bits to spend on average, {kinds[most]} gets the most"
)
axes.set_yticklabels(kinds)
plt.show()
gain = table["RTN 3"][1].difference - table["mixed 2-4, size of 3"][1].difference
print(f"at the size of RTN 3, the mixture saves {gain:.4f} bits per byte")

# %% [markdown]
# *The figure shows the bits chosen for every layer, under the budget of 3 bits all over.*
#
# ## 9 · The table of methods
#
# All weights-only variants so far, beside float32 and bfloat16, the format that LabLM ships in. Sizes count everything: codes, scales,
# zero points (HQQ's are real numbers of 16 bits), the embedding in 16 bits. The embedding weighs so much in a small model that "2
# bits" is far from 2 bits a weight; the second column says what it is.

# %%
print(
    f"{'method':<22} {'MB':>6} {'bits each':>9} {'bits/byte':>10} {'difference, 95% interval':>28}  "
    + "dialogues  "
    + "  ".join(TASKS)
)
for name, (size_bytes, quality, scores, talk) in sorted(table.items(), key=lambda row: row[1][1].difference):
    low, high = quality.interval
    each = 8 * size_bytes / model.num_parameters()
    line = f"{name:<22} {size_bytes / 1e6:6.2f} {each:9.2f} {quality.bits_per_byte:10.4f} "
    line += f"{f'{quality.difference:+.4f} [{low:+.4f}, {high:+.4f}]':>28}  {talk.difference:+9.4f}  "
    print(line + "  ".join(f"{scores[task]:>{len(task)}.3f}" for task in TASKS))

# %% [markdown]
# **Read it twice**: sorted by bits per byte, is it sorted by the tasks as well?
#
# ## 10 · Fix the article: quantized twice, then sent to a GPU
#
# The article's listing calls `nn.quantize_dynamic` twice and moves the result to a GPU. Run it.

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
# are no parameters, so `.to` moves nothing. The last line asks PyTorch's dispatcher for which devices this layer has a kernel. The
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
import numpy as np

from labutils.measurement.roofline import bandwidth_probes, last_level_cache_bytes, probe_working_set_bytes
from labutils.measurement.timing import measure_interleaved

probes = bandwidth_probes(probe_working_set_bytes(), device="cpu", dtype=torch.float32)
timed = measure_interleaved({name: run for name, (run, _) in probes.items()}, repeats=5, warmup=1)
bandwidth = max(moved / min(timed[name].samples_s) for name, (_, moved) in probes.items())
del probes
cache = f"last-level cache {last_level_cache_bytes() / 2**20:.0f} MiB"
print(f"{bandwidth / 1e9:.1f} GB/s with {torch.get_num_threads()} threads, {cache}")
for name, bits in (("float32", 32), ("int8, a scale per 64", 8.5), ("int4, a scale per 64", 4.5)):
    print(f"{name:<22} {0.2e9 * bits / 8 / 1e6:4.0f} MB a token, at least {0.2e9 * bits / 8 / bandwidth * 1e3:5.1f} ms")

# %% [markdown]
# ### How codes lie in memory
#
# With AVX2 a processor multiplies 32 bytes at a time (64 with AVX-512, 16 on ARM's NEON). So the course's kernels (`labutils/quantization/kernels.c`: open it beside this
# page) let eight rows travel together: a 32-byte vector holds 4 codes of each of 8 rows.
#
# ```
# [row 0: k 0 1 2 3][row 1: k 0 1 2 3] … [row 7: k 0 1 2 3]
# ```
#
# Four inputs, repeated eight times, meet eight rows at once, and each row's sum stays in its own lane.
#
# With 4 bits a byte holds *two* codes. Which two? Not neighbours: code k goes into the low half and code k + 16 into the
# high half. Then one mask yields 16 codes in order, and one shift the next 16; nothing has to be shuffled.

# %% [markdown]
# ## Exercise 3.8: pack_halves
#
# Write `pack_halves(codes)`: `codes` is a NumPy array of dtype uint8 with values 0 … 15; its length is a multiple of 32.
# Return uint8, half as long: of every 32 codes 16 bytes, byte j holding code j in its low half and code j + 16 in its
# high half.
# 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Reshape into (chunks, 2, 16): then [:, 0] are the low codes, [:, 1] the high ones.</details>
# <details><summary>Hint 2</summary>A high half is code · 16, or code &lt;&lt; 4; put both together with |.</details>


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
from labutils.checks import ch03_speed

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
# ## Exercise 3.9: maddubs
#
# Write `maddubs(unsigned, signed)`: two NumPy arrays of one even length, uint8 and int8; return what the instruction
# leaves, as int16, half as long.
# 3 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Widen both to int32 before you multiply; reshape(-1, 2).sum(axis=1) adds neighbours.</details>
# <details><summary>Hint 2</summary>np.clip to −32768 … 32767, and only then to int16.</details>


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
# ## Exercise 3.10: block_product
#
# Write `block_product(codes, scale, x_codes, x_scales)` in NumPy by that formula: codes (rows, n) of dtype uint8, scale
# (rows,), x_codes (n,) of dtype int8, x_scales (blocks,), n = 64 · blocks. Return y (rows,).
# 4 lines, 15 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Widen first: uint8 − 128 and sums of int8 overflow. Reshape the codes to (rows, blocks, 64).</details>
# <details><summary>Hint 2</summary>dots = (q · p).sum(axis=2) − 128 · p.sum(axis=1) has shape (rows, blocks); multiply it by x_scales, sum over blocks, multiply by scale.</details>


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
from labutils.layers.compile import compile_c
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
# A matrix to try it on, 8 bits, 16384 × 8192 random codes: 134 MB, so that few caches can keep it. `run_rows` calls a
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
bytes_by_row = codes.view(torch.uint8) ^ 128  # code + 128, as unsigned bytes
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
# Blocking helps even the naive layout: four rows at a time read the inputs once for four. Then the kernels' own layout,
# first without fetching ahead: memory answers after some 100 ns, so a core that asks only when it needs something mostly
# waits. `__builtin_prefetch` asks for what comes 2 KiB later. Last, huge pages: 2 MiB instead of 4 KiB, so that the
# processor looks up addresses 512 times less often (Linux; elsewhere nothing changes).
#
# **Predict:** which of these steps gains most on your machine?

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
cores = torch.get_num_threads()

# %%
steps = {}
if kernels:
    huge_pages = Arena(packed.codes.nbytes).put([packed.codes])
    no_prefetch = load_library(compile_c(read_sources().replace("AHEAD = 2048", "AHEAD = 0"), flags=native))
    scalar, vectors = (ctypes.CDLL(compile_c(NAIVE, flags=f)) for f in (("-O1", "-fno-tree-vectorize"), native))
    four = ctypes.CDLL(compile_c(FOUR_ROWS, flags=native))
    steps = {
        "1 scalar": lambda: run_rows(scalar),
        "2 the compiler's vectors": lambda: run_rows(vectors),
        "3 four rows at a time": lambda: run_rows(four),
        "4 eight rows in a vector": lambda: run_packed(no_prefetch, packed.codes.data_ptr()),
        "5 fetched ahead": lambda: run_packed(kernels, packed.codes.data_ptr()),
        "6 huge pages": lambda: run_packed(kernels, huge_pages.data_ptr()),
        f"7 {cores} threads": lambda: run_packed(kernels, huge_pages.data_ptr(), cores),
    }

# %% [markdown]
# Before speed, the same numbers: each step's result must equal the first one's *to the last bit*. Whole-number sums allow
# that, whatever the order; the float sums over blocks run in one order everywhere.
#
# The comparison is not for show. Written as `(codes[r * n + k] - 128) * x[k]`, the loop is correct C, yet GCC 12.2 miscompiles it
# on CPUs with VNNI (`-O3 -march=native`). This very cell caught it.

# %%
results = {}
for name, step in steps.items():
    step()
    results[name] = y.clone()
    print(f"{name:<26} equal to the first: {torch.equal(results[name], results['1 scalar'])}")

# %%
timings = measure_interleaved(steps, repeats=7, warmup=1) if steps else {}
rates = {name: codes.nbytes / timing.median_s / 1e9 for name, timing in timings.items()}
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
axes.barh(list(rates), list(rates.values()), color=series_style(0)["color"])
axes.axvline(bandwidth / 1e9, color=series_style(1)["color"], linestyle="--", label=f"memory, {cores} threads, float")
axes.invert_yaxis()
gain = f"The best step: {max(rates.values()) / rates['1 scalar']:.0f} times the scalar loop" if rates else "no compiler"
axes.set(xlabel="GB of codes read per second", title=gain)
axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.35))
plt.show()

# %% [markdown]
# *The figure shows how many bytes of codes each version gets through in a second, and the bandwidth that the float probes
# above found.* The same in numbers, with the spread:

# %%
for name, timing in timings.items():
    low, high = timing.interval_s
    print(f"{name:<26} {timing.median_s * 1e3:7.2f} ms [{low * 1e3:.2f}, {high * 1e3:.2f}]  {rates[name]:5.1f} GB/s")
print(f"medians of 7 interleaved rounds, 1 warm-up, cpu; one thread up to step 6, uint8 codes, {ROWS} x {N}")

# %% [markdown]
# **Explain.** Find the largest step: it is the compiler's, once four rows share one pass over the input. The first steps wait for
# arithmetic. The later ones come near to what memory gives, and there not every idea pays: a step whose interval overlaps the one
# before it gained nothing here, and one may even lose. A bar beyond the dashed line is no miracle: the probe read small pages, or
# part of the matrix sat in the cache (its size is printed at the head of this section; a virtual machine may state its host's).
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
# A token is more than its matrices: normalising, attention and gates, a dozen small steps a layer. In NumPy or PyTorch
# each costs some microseconds *whatever the weights*, and the faster the matrices, the more that counts. `steps.c`
# does them in C; `fast_packed_llama` puts both together. Below, a model of random weights, decoded in float32, int8 and int4, in
# one interleaved run. Two things differ between float32 and the others: the bytes, and the steps between the matrices, which
# float32 takes in NumPy. So there is a third row, int8 with NumPy steps: from float32 to it only the weights change, from it to
# "int8, C" only the steps.

# %%
import copy

from labutils.bench.subject import speed_subject
from labutils.generation.decode import generate_static
from labutils.generation.fast_llama import FastLlama
from labutils.models.quantized import fast_packed_llama
from labutils.quantization.packed import pack_model_

subject = speed_subject(num_hidden_layers=8)
int8, int4 = Scheme(8), Scheme(4, granularity="group", group_size=64)
variants = {name: pack_model_(copy.deepcopy(subject.model), s) for name, s in (("int8", int8), ("int4", int4))}
print(f"{subject.name}, 17 tokens after a prompt of {subject.token_ids.shape[1]}")

# %%
runs = {"float32, plain": FastLlama(subject.model, max_length=40)}
if kernels:
    runs |= {f"{name}, C": fast_packed_llama(variant, max_length=40) for name, variant in variants.items()}
    runs["int8, NumPy steps"] = fast_packed_llama(copy.deepcopy(variants["int8"]), max_length=40)
    runs["int8, NumPy steps"].few_tokens = None  # the same matrices, and NumPy between them as in float32
loops = {name: (lambda f=f: f.generate(subject.token_ids, 17)) for name, f in runs.items()}
loops["int8, modules"] = lambda: generate_static(variants["int8"], subject.token_ids, 17)
timings = measure_interleaved(loops, repeats=5, warmup=1)
base = timings["float32, plain"].median_s
for name, timing in timings.items():
    megabytes = f"{runs[name].weight_bytes / 1e6:6.0f} MB a token" if name in runs else ""
    print(f"{name:<18} {17 / timing.median_s:7.1f} tokens/s  {base / timing.median_s:5.2f}x float32 {megabytes}")
print(f"medians of 5 interleaved rounds, 1 warm-up, prompt included, cpu, {torch.get_num_threads()} threads, batch 1")

# %% [markdown]
# "modules" are the same packed layers inside the `transformers` model, called as PyTorch operators: the right choice for any
# architecture, slower by what PyTorch and Python cost between the kernels. Without a compiler, PyTorch's own operators
# serve, with the same numbers to the last bit and no gain in speed; `python -m labutils doctor` says which you have.
#
# Against others, in a terminal: `python -m labutils bench quantization` times the same weights in llama.cpp (where it is
# installed), torchao and `torch.ao`, and says which of the course's own bars were met on your machine.

# %% [markdown]
# ### Keep it
#
# Packed models save to a folder: codes and scales in safetensors, and a `quantization.json` that names every layer's
# scheme. A file that does not fit is an error of one sentence.

# %%
import json
import tempfile
from pathlib import Path

from labutils.models.load import LoadError
from labutils.models.quantized import load_quantized, save_quantized

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
# **Predict** which of the five is fastest for 1 token, and which for 256.

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
for index, label in enumerate(layers):
    rates = [timings["float32", n].median_s / timings[label, n].median_s for n in TOKENS]
    axes.plot(range(3), rates, label=label, **series_style(index))
    print(f"{label:<15}" + "".join(f"{n:>4} tokens {timings[label, n].median_s * 1e6:8.0f} µs " for n in TOKENS))
fastest = {n: min(layers, key=lambda label, n=n: timings[label, n].median_s) for n in TOKENS}
axes.set(xlabel="tokens in one pass", ylabel="speed, float32 = 1", yscale="log")
axes.set_xticks(range(3), [str(n) for n in TOKENS])
axes.set_title(f"Fastest at 1 token: {fastest[1]}; at 256: {fastest[256]}")
axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
axes.set_yticks([], minor=True)
axes.grid(alpha=0.25, which="both")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
print(f"medians of 7 rounds, 3 calls each, 2 warm-up, cpu, {torch.get_num_threads()} threads")

# %% [markdown]
# *The figure shows the speed of one layer relative to float32 of the same pass (above 1 is faster), for one, 16 and 256
# tokens.*
#
# **Explain.** One token reads each weight for a single product, so fewer bytes pay (this one matrix may sit in a cache; the argument
# holds there too). Many tokens share a weight and wait for arithmetic: there packed layers have no bytes left to save, and only faster
# arithmetic helps. bfloat16 has that where the processor multiplies it in hardware (AMX, AVX-512 BF16). Eager W8A8 pays
# for rounding, masking and scaling in separate calls; for one token they cost more than the product.

# %% [markdown]
# ## 13 · The one plot
#
# Only variants with a speed of their own get on it: packed layers, real integer products, bfloat16. (Fake-quantized
# models compute in float32, and their speed would be a lie.) The packed layers also round their inputs to 8 bits, so
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
# Two ways to generate. "PyTorch" runs the Hugging Face model with a static cache. The others use `FastLlama` of
# `labutils.generation`, a decoder for one stream without PyTorch between the steps: on packed layers with every step in C, in float32
# with NumPy steps, and so is one int8 variant, as a control. Where no C compiler is found, the packed variants run in PyTorch too, and you will see it in the numbers.

# %%
from labutils.measurement import ledger
from labutils.quantization.kernels import KernelError

prompt, NEW_TOKENS = calibration[0][:1, :64], 32


def generator_of(name, variant):
    try:
        if "PyTorch" not in name:
            make = FastLlama if variant is model else fast_packed_llama
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
from labutils.plots.speed_quality import beaten_by, draw_speed_quality, speed_quality_table

figure, axes = plt.subplots(figsize=(9, 8), layout="constrained")
draw_speed_quality(records, ax=axes)
plt.show()
print(speed_quality_table(records))
beaten = [record.technique for record in records if beaten_by(record, records)]
print("\nsurely slower and surely worse than another, on this machine at batch 1:", "; ".join(beaten) or "none")

# %% [markdown]
# *Generation speed (32 tokens after a prompt of 64, batch 1, 7 interleaved rounds, one warm-up) against bits per byte for 17 variants of
# LabLM. The dashed line joins the medians that no other median beats in both. In the table, `*` marks what no other variant
# **surely** beats: both differences, in speed and in bits per byte paired by document, exclude zero.*
#
# Read two pairs of rows before you praise integers. "int8, row" and "int8, row, NumPy steps" have the same weights: the difference is the C
# between the matrices. "int8, row, NumPy steps" and "float32" share their steps: the difference is the weights. LabLM fits into the
# processor's cache, which hides what bytes cost; section 11 uses a model that does not.

# %% [markdown]
# ## 14 · What other libraries store
#
# One day you will open a file that another program wrote. "int8, symmetric, one scale a row" sounds like a full description, and it
# leaves out what decides every weight: is the scale max|w| / 127 or max|w| / 127.5? Where does a tie go? Which of two codes lies in the
# low half of a byte? Libraries answer differently, and few of them say so.
#
# **Predict:** below are several libraries' symmetric int8 formats. Do most of them share one rule for the scale?

# %%
from IPython.display import Markdown, display

from labutils.quantization.conventions import casts_table, conventions_table

display(Markdown(conventions_table("scale", "codes", "zero point", "rounding")))

# %% [markdown]
# No row of this table was copied from documentation. `tests/formats_of_others.py` quantizes small rows of numbers with each package and
# keeps the one rule that explains every scale it saw. [FORMATS.md](FORMATS.md) adds groups, nibbles, what stays in floating point and
# surprising defaults.
#
# **Explain.** 127 makes both +max and −max exact. 127.5 gives all 255 steps the same width, so the largest positive weight has to be
# clamped. 128 reaches one end exactly and loses the other, unless the scale carries a sign. None of these is wrong. What is wrong is to read
# codes with another library's rule: every weight is then off by the same small factor, which looks like rounding noise and is a bias.

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
# <details><summary>Hint 2</summary>Join the 16 low halves and the 16 high halves, in that order, and convert to float32 before you subtract 8.</details>


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
from labutils.checks import ch03_formats

ch03_formats.decode_q4_0(decode_q4_0)

# %% [markdown]
# `labutils` writes GGUF files (`python -m labutils export gguf`) and reads them, including the larger blocks Q4_K and Q6_K, in which the
# scales are quantized as well. How many of LabLM's Q4_0 scales are negative?

# %%
from labutils.models.gguf import export_gguf
from labutils.models.gguf_blocks import encode_q4_0
from labutils.models.gguf_read import read_gguf

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
# <details><summary>Hint 2</summary><code>np.trunc(ratio + np.copysign(0.5, ratio))</code>, and <code>np.flatnonzero</code> of where the codes differ.</details>


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
# <details><summary>Hint 2</summary><code>packed[:, None, :] >> shifts[:, None] & 15</code> has the new axis where it can be merged with the words by <code>reshape</code>.</details>


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
# `compressed-tensors` installed, `transformers` loads it. Below, symmetric groups of 64, which have no zero points to pack.

# %%
from labutils.models.compressed_tensors import read_compressed_tensors, save_compressed_tensors

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
# NaN become in PyTorch, in JAX and in MLX?

# %%
display(Markdown(casts_table()))
print("PyTorch here:", torch.tensor([464.0, 465.0, 1000.0, float("nan")]).to(torch.float8_e4m3fn).float().tolist())
for name, bad in (("inf", float("inf")), ("nan", float("nan"))):
    try:
        fake_quantize(torch.tensor([[1.0, bad]]), Scheme(bits=4))
    except ValueError as error:
        print(f"labutils, {name}: {error}")

# %% [markdown]
# **Explain.** A cast that saturates hides an overflow. A cast that returns NaN shows it, one layer too late. An integer cast may do neither
# and keep the lowest bits. So check that numbers are finite, round and clamp by your own rule *before* you cast. That is what
# `fake_quantize`, the GGUF writer and the packed layers do: they name the problem before anything is stored.
#
# Two more surprises of this kind, for those who mix tools. `transformers` has a quantized cache with a `residual_length`; its first call
# rounds the whole prompt all the same, while `QuantizedKVCache` of section 6 keeps the newest positions from the start. And safetensors'
# NumPy writer stores a transposed array as other numbers unless you call `np.ascontiguousarray` first.

# %% [markdown]
# ## What you have
#
# - a way to see losses: layer by layer, in paired bits per byte, and in tasks, which break first;
# - GPTQ, AWQ, HQQ, SmoothQuant, LLM.int8, rotation, KIVI and training, each measured against plain rounding;
# - calibration text as a choice that decides what survives;
# - integer layers that are really faster, and a list of cases in which they are not;
# - readers for two formats of the field, and the habit of asking for the scale rule, the rounding and the byte order.
#
# **Open question:** a hospital wants your 3-bit translator. Which text would you calibrate on, and which would you keep
# aside, so that nobody is fooled by the score?
#
# Next: **04 · Pruning**.

# %%
from labutils.course.progress import progress

progress()
