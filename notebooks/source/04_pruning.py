# %% [markdown]
# # 04 · Pruning
#
# **Goal:** decide which weights, neurons, heads and layers a model can do without, see what each choice costs, and find
# out which zeros buy time.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 02; 03 helps |
# | Time | 3.5 hours for you; all cells run in about 6 minutes on one core (measured: 374 s, the core shared, the build included) |
# | Memory, download | 3 GB at the peak, in section 9; nothing is downloaded |
# | Hardware | any computer; a C compiler for the sparse kernels of section 9 |
# | Exercises | 9, each checked in the cell below it; those marked *core* fit into one session of two hours |

# %%
import copy
import random
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from labutils.course.predictions import calibration as my_calibration
from labutils.course.predictions import predict
from labutils.lab.layers.calibration import input_statistics, layer_error
from labutils.lab.layers.linears import change_weights_, linear_layers, weight_of
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.lab.models.load import load_model
from labutils.lab.plots import pruning as plots
from labutils.lab.plots.style import series_style

transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # PyTorch calls it beta, in each new kernel

# %%
model, tokenizer = load_model("lablm")
documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(model, tokenizer, documents)
calibration = calibration_batches(tokenizer, code=24, dialogues=24, context=256)
statistics = input_statistics(model, calibration, with_gram=True)


def quality_of(changed):
    return paired_quality(bits_by_document(changed, tokenizer, documents), baseline)


print(f"{sum(b.numel() for b in calibration)} tokens of training text to calibrate on, code and dialogues")
measured_bytes = sum(len(d.text.encode()) for d in documents)
print(f"{len(documents)} held-out modules to measure on, {measured_bytes:,} bytes; cpu, float32", end=", ")
print(f"threads: {torch.get_num_threads()}")
print(f"LabLM: {quality_of(model).bits_per_byte:.4f} bits per byte")

# %% [markdown]
# ## 1 · Fix the article: a rule that points the wrong way
#
# The article prunes row j when a "pruning probability" is small:
#
# $$p_{ij} = \frac{\sum_k w_{ik} w_{jk}}{\sum_k w_{ik}^2}, \qquad \text{prune } j \text{ if } p_{ij} < \theta$$
#
# Its example has three weights, 0.3, 0.5 and 0.2, and θ = 0.5. It reports p = 1, 5/6, 2/6 and concludes that the first two
# go. **Predict:** what does its own formula give, seen from the first weight?

# %%
from labutils.pruning.similarity import article_prunes, explained, projection

article = torch.tensor([[0.3], [0.5], [0.2]])
p = projection(article @ article.T)
print("p_1j =", [round(v, 4) for v in p[0].tolist()], "not 1, 5/6, 2/6")
print("p_j1 =", [round(v, 4) for v in p[:, 0].tolist()], "so p is not symmetric")
print("pruned at 0.5:", article_prunes(article, threshold=0.5))
twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
print("of rows [1 0], [1 0], [0 1] it prunes row", article_prunes(twins, threshold=0.5), "and keeps the copy")

# %% [markdown]
# A probability cannot exceed 1, and nothing is pruned. Worse, among rows of equal length a *small* p means that row j has
# little in common with row i: the rule throws the unique row away and keeps the double. (A short row also gets a small p.)
#
# What p really is: the multiple of row i that comes closest to row j. What is left over then is
#
# $$\lVert w_j - p_{ij} w_i \rVert^2 = (1 - \cos^2)\,\lVert w_j\rVert^2, \qquad
# \cos^2 = \frac{(w_i \cdot w_j)^2}{\lVert w_i \rVert^2 \lVert w_j \rVert^2}$$
#
# So row j is redundant when cos² is **large**: a kept row explains it. (Srinivas and Babu 2015, arXiv:1507.06149, merge
# similar neurons.)

# %% [markdown]
# ## Exercise 4.1: explained_share
#
# Write `explained_share(rows)`: rows of shape (n, k); return (n, n), entry (i, j) the share of row j's power that row i
# explains, cos². No row is zero. 3 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>rows @ rows.T</code> holds every dot product; what stands on its diagonal?</details>
# <details><summary>Hint 2</summary>gram² over the product of both powers: <code>power[:, None] * power[None, :]</code>.</details>


# %%
# EXERCISE explained_share
def explained_share(rows):
    """cos² between every two rows."""
    ### BEGIN SOLUTION
    gram = rows @ rows.T
    power = gram.diagonal()
    return gram**2 / (power[:, None] * power[None, :])
    ### END SOLUTION


# %%
# CHECK explained_share
from labutils.course.checks import ch04, ch04_removal

ch04.explained_share(explained_share)

# %% [markdown]
# Now on real neurons. What matters is not a neuron's weights but what it *answers*: we compare the answers of LabLM's 768
# MLP neurons to the calibration text, layer by layer. Their Gram matrix was watched at `down_proj`.
#
# **Predict:** how many of 768 neurons does some other neuron explain to 90%?

# %%
from labutils.pruning.similarity import redundant_rows

down_grams = [statistics[f"model.layers.{i}.mlp.down_proj"].gram for i in range(6)]
best = []
for i, gram in enumerate(down_grams):
    shares = explained(gram).fill_diagonal_(0).amax(dim=0)
    best.append(shares)
    counts = {t: len(redundant_rows(gram, threshold=t)) for t in (0.9, 0.5, 0.25)}
    print(f"layer {i}: redundant at 90%: {counts[0.9]}, at 50%: {counts[0.5]}, at 25%: {counts[0.25]} of 768")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.boxplot([100 * s.numpy() for s in best], tick_labels=[str(i) for i in range(6)], showfliers=False)
median = 100 * torch.cat(best).median().item()
axes.set(
    xlabel="layer",
    ylabel="explained by the best other neuron (%)",
    title=f"The best other neuron explains {median:.0f}% of the median one",
)
plt.show()

# %% [markdown]
# *For each layer's 768 neurons: how much of a neuron's answers its most similar neighbour explains. Box: quartiles; line:
# median.* This small model has few doubles. But *many* neurons together can stand in for one: least squares over all that are
# kept (`reconstruct`) replaces the article's one-to-one coefficient. Take each layer's 192 least used neurons away, three ways:

# %%
from labutils.pruning.similarity import merge_columns, reconstruct
from labutils.pruning.structured import neuron_scores, strongest

KEEP = 576
chosen = [strongest(s, KEEP) for s in neuron_scores(model, statistics)]
for i in (0, 2, 5):
    down, gram, kept = weight_of(model.model.layers[i].mlp.down_proj), down_grams[i], chosen[i]
    gone = [j for j in range(768) if j not in set(kept.tolist())]
    shares = explained(gram)[kept]
    keepers = {j: kept[shares[:, j].argmax()].item() for j in gone}
    versions = {name: torch.zeros_like(down) for name in ("dropped", "merged one by one", "reconstructed")}
    versions["dropped"][:, kept] = down[:, kept]
    versions["merged one by one"] = merge_columns(down, gram, keepers)
    versions["reconstructed"][:, kept] = reconstruct(down, gram, kept)
    print(f"layer {i}:", {name: f"{layer_error(down, w, gram):.2%}" for name, w in versions.items()})

# %% [markdown]
# The percentages show how much of the layer's output energy is lost, on the calibration text itself. Merging into one similar
# neuron helps a little, reconstruction from all of them a lot. We meet it again as the *OBS update*.

# %% [markdown]
# ## 2 · Single weights: which matter least?
#
# A **mask** says which weights stay. A criterion gives each weight a score, and the smallest go:
#
# | criterion | score | competes in |
# | --- | --- | --- |
# | magnitude (Han 2015) | $\lvert w \rvert$ | model, layer or row |
# | Taylor (Molchanov 2017) | $\lvert w \cdot \partial L/\partial w\rvert$ | layer or model |
# | movement (Sanh 2020) | $-\sum_t w\,\partial L/\partial w$ over a fine-tuning | layer |
# | Wanda (Sun 2023) | $\lvert w_{ij}\rvert \cdot \lVert X_j \rVert_2$ | row |
# | SparseGPT (Frantar 2023) | $w^2 / [H^{-1}]_{jj}$, and the rest is updated | 128 columns |
#
# **Tiny numbers:** weights 1 and −3 of one row, whose inputs have norms 6 and 1. Magnitude drops the 1. Wanda compares 6
# with 3 and drops the −3.

# %% [markdown]
# ## Exercise 4.2: magnitude_mask (core)
#
# Write `magnitude_mask(weight, sparsity)`: a boolean mask of the weight's shape, False for exactly
# `round(sparsity * weight.numel())` weights, the smallest by size in the whole layer. No two sizes are equal.
# 4 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>A threshold is a trap at 0% and 100%. Rank the weights and take the first so many.</details>
# <details><summary>Hint 2</summary><code>argsort</code> of the flattened sizes begins with the smallest. Start from a flat mask of ones; it gets the weight's shape at the end.</details>


# %%
# EXERCISE magnitude_mask
def magnitude_mask(weight, sparsity):
    """Keeps the largest weights of a layer."""
    ### BEGIN SOLUTION
    smallest = weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[smallest] = False
    return mask.view_as(weight)
    ### END SOLUTION


# %%
# CHECK magnitude_mask
ch04.magnitude_mask(magnitude_mask)

# %% [markdown]
# ## Exercise 4.3: wanda_mask (core)
#
# Write `wanda_mask(weight, norms, sparsity)`: score |W_ij| · norms_j; in **each row** False for exactly
# `round(sparsity * in_features)` smallest scores. weight (out, in), norms (in,). 4 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Broadcasting multiplies each column by its norm. <code>argsort(dim=1)</code> ranks inside each row.</details>
# <details><summary>Hint 2</summary><code>mask.scatter_(1, smallest, False)</code> with smallest of shape (out, how many).</details>


# %%
# EXERCISE wanda_mask
def wanda_mask(weight, norms, sparsity):
    """Keeps the largest |W| · ‖X‖ of each row."""
    ### BEGIN SOLUTION
    scores = weight.abs() * norms
    smallest = scores.argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    mask = torch.ones_like(weight, dtype=torch.bool)
    return mask.scatter_(1, smallest, False)
    ### END SOLUTION


# %%
# CHECK wanda_mask
ch04.wanda_mask(wanda_mask)

# %% [markdown]
# Hardware does not like scattered zeros. **N:M** sparsity keeps n of every m neighbours in a row: 2:4 is what NVIDIA's sparse
# tensor cores multiply (Mishra et al. 2021, arXiv:2104.08378). Any criterion can fill the pattern.
#
# ## Exercise 4.4: two_of_four (core)
#
# Write `two_of_four(scores)`: scores (out, in), in a multiple of 4; a boolean mask that keeps the two largest of every four
# neighbours of a row. No two scores are equal. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Reshape to (…, 4): each line then holds one group.</details>
# <details><summary>Hint 2</summary><code>topk</code> finds indices, and <code>scatter_</code> writes at indices; the mask goes back to the first shape.</details>


# %%
# EXERCISE two_of_four
def two_of_four(scores):
    """Keeps the two largest of every four neighbours."""
    ### BEGIN SOLUTION
    fours = scores.reshape(-1, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool)
    return mask.scatter_(1, fours.topk(2, dim=1).indices, True).view_as(scores)
    ### END SOLUTION


# %%
# CHECK two_of_four
ch04.two_of_four(two_of_four)

# %%
from labutils.pruning.masks import apply_masks_, mask_layer, mask_model, mask_rows, sparsity
from labutils.pruning.scores import magnitude_scores, wanda_scores

magnitudes, wandas = magnitude_scores(model), wanda_scores(model, statistics)
NAME = "model.layers.2.mlp.down_proj"
masks = {
    "magnitude, layer": mask_layer(magnitudes[NAME], 0.5),
    "magnitude, row": mask_rows(magnitudes[NAME], 0.5),
    "Wanda, row": mask_rows(wandas[NAME], 0.5),
    "magnitude, 2:4": mask_model({"": magnitudes[NAME]}, (2, 4))[""],
}
figure, panels = plt.subplots(1, 4, figsize=(10, 3), layout="constrained")
plots.draw_masks(panels, masks)
differ = (masks["magnitude, row"] != masks["Wanda, row"]).float().mean()
figure.suptitle(f"Half of the weights, four ways; Wanda decides differently from magnitude for {differ:.0%}")
plt.show()

# %% [markdown]
# *The upper left corner (32 × 32) of layer 2's `down_proj`; dark weights stay. Under Wanda some columns are fuller or
# emptier: those inputs are loud or quiet. 2:4 leaves two dark squares in every four.*

# %% [markdown]
# ## 3 · The OBS update
#
# Magnitude and Wanda only choose. **Optimal Brain Surgeon** (Hassibi and Stork 1993) also repairs: when weight q of a row w
# becomes zero, the change of the others that hurts $\lVert X(w-\hat w)^\top\rVert^2$ least, and what is then still lost, are
#
# $$\delta w = -\frac{w_q}{[H^{-1}]_{qq}}\, H^{-1}_{:,q}, \qquad \varepsilon_q = \frac{w_q^2}{[H^{-1}]_{qq}}, \qquad H = X^\top X$$
#
# (X holds one input a row.) **Tiny numbers:** two inputs that almost always agree, w = [1, 10]. Drop the 1: the other becomes
# almost 11, and almost nothing is lost. Magnitude alone would have lost 1. If they always agree, H is singular, so the code
# adds a small number to its diagonal first (*damping*).

# %% [markdown]
# ## Exercise 4.5: remove_one (core)
#
# Write `remove_one(weights, inverse, index)`: weights (n,) of one row, inverse (n, n) = H⁻¹, already inverted. Return the new
# row with weights[index] exactly 0. Do not change the input. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>One line of the inverse tells in which proportion the others move.</details>
# <details><summary>Hint 2</summary>Subtract a multiple of <code>inverse[index]</code>: which multiple leaves 0 at the index? Rounding may leave 1e-9 there: set it to 0.</details>


# %%
# EXERCISE remove_one
def remove_one(weights, inverse, index):
    """Removes one weight and lets the others make up for it."""
    ### BEGIN SOLUTION
    changed = weights - weights[index] / inverse[index, index] * inverse[index]
    changed[index] = 0
    return changed
    ### END SOLUTION


# %%
# CHECK remove_one
ch04.remove_one(remove_one)

# %% [markdown]
# One inverse for each weight would take for ever. **SparseGPT** (Frantar and Alistarh 2023, arXiv:2301.00774) goes through the
# columns from left to right, all rows at once. A column that has been treated stays fixed, so each step needs the inverse of a smaller
# H, and one upper Cholesky factor U, with $H^{-1} = U^\top U$, holds all of them. Column j then costs one division and one product:
#
# $$e = \frac{w_j}{U_{jj}} \text{ where the weight goes, else } 0, \qquad w_{k} \leftarrow w_{k} - e\,U_{jk} \quad (k > j)$$
#
# **Tiny numbers:** U = [[2, 1], [0, 1]], one row w = [4, 5], column 0 goes: e = 2, and w becomes [0, 5 − 2 · 1] = [0, 3].

# %% [markdown]
# ## Exercise 4.6: prune_column (core)
#
# Write `prune_column(weight, factor, column, gone)`: weight (rows, n), factor U (n, n), gone (rows,) boolean: the rows that lose their
# weight in this column. Return the new weight, those entries exactly 0; do not change the input. 5 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>A row that keeps its weight has no error, so nothing of it moves.</details>
# <details><summary>Hint 2</summary>The errors are a column and U's row j is a row: <code>errors[:, None] * factor[column, column + 1 :]</code> is what the later columns lose.</details>


# %%
# EXERCISE prune_column
def prune_column(weight, factor, column, gone):
    """One step of SparseGPT: a column loses weights, and the later ones make up for them."""
    ### BEGIN SOLUTION
    errors = torch.where(gone, weight[:, column] / factor[column, column], 0.0)
    changed = weight.clone()
    changed[:, column + 1 :] -= errors[:, None] * factor[column, column + 1 :]
    changed[gone, column] = 0
    return changed
    ### END SOLUTION


# %%
# CHECK prune_column
ch04_removal.prune_column(prune_column)

# %% [markdown]
# SparseGPT does this for every column, and chooses masks for 128 columns at a time by $w^2 / [H^{-1}]_{jj}$.
#
# The yardstick is text that nobody calibrated on. **Predict:** in how many of LabLM's 42 matrices does SparseGPT beat
# magnitude there, at 50%?

# %%
my_wins = predict("of LabLM's 42 matrices: where SparseGPT loses less than magnitude at 50%", None)

# %%
from labutils.pruning.sparsegpt import sparsegpt

unseen_ids = [tokenizer(d.text, return_tensors="pt").input_ids[:, :256] for d in documents]
unseen = input_statistics(model, unseen_ids, with_gram=True)
rows = {"magnitude": [], "Wanda": [], "SparseGPT": []}
for name, layer in linear_layers(model):
    w, gram = weight_of(layer), unseen[name].gram
    rows["magnitude"].append(layer_error(w, w * mask_layer(magnitudes[name], 0.5), gram))
    rows["Wanda"].append(layer_error(w, w * mask_rows(wandas[name], 0.5), gram))
    rows["SparseGPT"].append(layer_error(w, sparsegpt(w, statistics[name].gram, 0.5), gram))
wins = sum(ours < theirs for ours, theirs in zip(rows["SparseGPT"], rows["magnitude"], strict=True))
print(f"SparseGPT beats magnitude in {wins} of {len(rows['magnitude'])} matrices")
if wins:
    my_wins.compare(wins)

# %%
figure, axes = plt.subplots(figsize=(12, 3.8), layout="constrained")
for index, (name, errors) in enumerate(rows.items()):
    axes.plot([100 * e for e in errors], label=name, **series_style(index) | {"linestyle": "none"})
kinds = [name.rpartition(".")[2].removesuffix("_proj") for name, _ in linear_layers(model)]
axes.set_xticks(range(42), kinds, rotation=90, fontsize="small")
for i in range(6):
    axes.axvline(7 * i - 0.5, color="0.8")
    axes.text(7 * i, 0.98, f"layer {i}", transform=axes.get_xaxis_transform(), va="top")
axes.set(ylabel="output lost (%)", title=f"At 50% zeros SparseGPT loses less than magnitude in {wins} of 42 matrices")
axes.grid(alpha=0.25)
axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
# *Share of each matrix' output energy that pruning half of it destroys, on held-out text; one column a matrix. Lower is better.*

# %% [markdown]
# ## 4 · What a whole model loses
#
# Now prune all 42 matrices (embeddings and head stay: they are one tensor here, and pruning it would prune both). The
# baseline and every variant read the same documents, so each difference has its own paired interval.
#
# **Predict:** which criterion wins at 70%? Published results for large models put magnitude last by far.

# %%
from labutils.pruning.scores import gradient_scores

tailored = gradient_scores(model, [b[:4] for b in calibration]).taylor
CRITERIA = {
    "magnitude, layer": (magnitudes, "layer"),
    "magnitude, global": (magnitudes, "global"),
    "magnitude, row": (magnitudes, "row"),
    "Taylor, global": (tailored, "global"),
    "Wanda, row": (wandas, "row"),
}


def pruned_by(criterion, pattern):
    variant = copy.deepcopy(model)
    if criterion == "SparseGPT":
        change_weights_(variant, lambda name, w: sparsegpt(w, statistics[name].gram, pattern))
    else:
        scores, scope = CRITERIA[criterion]
        apply_masks_(variant, mask_model(scores, pattern, scope=scope))
    return variant


# %%
LEVELS = (0.3, 0.5, 0.7)
curves = {}
for criterion in (*CRITERIA, "SparseGPT"):
    variants = [pruned_by(criterion, level) for level in LEVELS]
    assert [round(sparsity(v), 2) for v in variants] == list(LEVELS)
    curves[criterion] = [(level, quality_of(v)) for level, v in zip(LEVELS, variants, strict=True)]
    print(f"{criterion:<18}", "  ".join(f"{level:.0%}: {q.difference:+.3f}" for level, q in curves[criterion]))

# %%
patterns = {}
for ours, criterion in (("magnitude", "magnitude, layer"), ("Wanda", "Wanda, row"), ("SparseGPT", "SparseGPT")):
    half = next(q for level, q in curves[criterion] if level == 0.5)
    patterns[ours] = [half, *(quality_of(pruned_by(criterion, p)) for p in ((4, 8), (2, 4)))]
    print(
        f"{ours:<10}",
        "  ".join(f"{p}: {q.difference:+.3f}" for p, q in zip(plots.PATTERNS, patterns[ours], strict=True)),
    )
both = [quality_of(pruned_by("Taylor, global", p)).difference for p in ((4, 8), (2, 4))]
print(f"Taylor      4:8: {both[0]:+.3f}  2:4: {both[1]:+.3f}")
norms = {name: s.squares.sqrt() for name, s in statistics.items()}
loud = max(norms, key=lambda name: (norms[name].max() / norms[name].median()).item())
print(f"loudest input channel: {norms[loud].max() / norms[loud].median():.0f} times the median one, at {loud}")

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
plots.draw_curves(left, curves)
plots.draw_published(middle, right, patterns)
plt.show()

# %% [markdown]
# *Left: bits per byte lost over the share of zeros, with paired 95% intervals over the 17 modules. Middle: half of the weights
# in three patterns, here. Right: the same three patterns for Llama-2-7B, perplexity above the dense 5.12, as published in
# Wanda's repository (not measured here; another unit).*
#
# **Explain.** Compare the two panels criterion by criterion. One ordering carries over: the freer the pattern, the less is
# lost (50%, then 4:8, then 2:4). Others do not. SparseGPT comes first in all three of our columns, but at 7B Wanda is
# slightly ahead of it at 50% and at 4:8, and SparseGPT leads only at 2:4. And at 7B magnitude falls far behind. Wanda's authors
# put that down to a few huge input channels, which appear at about 6.7 billion parameters (Dettmers et al. 2022, arXiv:2208.07339);
# the last line printed says how loud LabLM's loudest is. Taylor,
# printed above for 4:8 and 2:4, adds a first-order score in groups and does worst of all. Read your own numbers before you
# quote a paper's.

# %% [markdown]
# ## 5 · Slowly, and back to the start
#
# Pruning all at once shocks a model. **Gradual** pruning trains on while sparsity rises (Zhu and Gupta 2017,
# arXiv:1710.01878):
#
# $$s_t = s_f + (s_i - s_f)\left(1 - \tfrac{t}{T}\right)^3$$
#
# **Tiny numbers:** from 0 to 80% in two steps: after one, 80% · (1 − 1/8) = 70%. Fast while there is much to spare, slow at the
# end.
#
# Try it on LabLM-small, which becomes a specialist: 12 steps of fine-tuning on service dialogues only, ending at 70% zeros.
# By magnitude, by **movement** (keep what training pushes away from zero), and all at once before the same 12 steps.
# Quality: bits per byte on dialogues of held-out phrasings.

# %%
from labutils.lab.data import service
from labutils.lab.models.compare import held_out_dialogues
from labutils.lab.models.mixture import chat_text
from labutils.pruning.recovery import fine_tune_, gradual_

small, _ = load_model("lablm-small")
talks = held_out_dialogues(bundles=8, each=5)
small_base = bits_by_document(small, tokenizer, talks)
lessons = calibration_batches(tokenizer, code=0, dialogues=96, context=128, batch=8, seed=1)
at_once = mask_model(magnitude_scores(small), 0.7)
specialists = {name: copy.deepcopy(small) for name in ("at once", "gradual, magnitude", "gradual, movement")}
apply_masks_(specialists["at once"], at_once)
fine_tune_(specialists["at once"], lessons, lr=1e-3, masks=at_once)
gradual_(specialists["gradual, magnitude"], lessons, final=0.7, lr=1e-3)
gradual_(specialists["gradual, movement"], lessons, final=0.7, lr=1e-3, by_movement=True)
after = {name: bits_by_document(variant, tokenizer, talks) for name, variant in specialists.items()}
for name, bits in after.items():
    print(f"{name:<20}", paired_quality(bits, small_base))
low, high = paired_quality(after["gradual, magnitude"], after["at once"]).interval
print(f"gradual minus at once [{low:+.4f}, {high:+.4f}] bits per byte, paired")

# %% [markdown]
# **Explain.** Movement needs a long fine-tuning before its sums say more than noise (its paper takes tens of thousands of
# steps); with the few steps it gets here it is a bad guide, and a longer run may change that. Each line compares one specialist with
# the dense model, and two such intervals may overlap. The last line pairs gradual pruning with pruning at once on the same
# dialogues: it settles which is better where its interval excludes zero.
#
# **Lottery tickets** (Frankle and Carbin 2019, arXiv:1803.03635): train, prune the smallest, set the survivors *back to their
# first values*, and train again. If the same mask with other first values does worse, the ticket was the initialisation. A
# network small enough to train many times: which of 63 intents is this query?

# %%
NAMES = list(service.intents())


def bag_of_tokens(split, count):
    rng = random.Random(split)
    queries = [service.sample_query(rng, split) for _ in range(count)]
    bags = torch.zeros(count, len(tokenizer))
    for row, query in enumerate(queries):
        bags[row, tokenizer(query.text_en)["input_ids"]] = 1
    return bags, torch.tensor([NAMES.index(q.intent) for q in queries])


(train_bags, train_labels), (test_bags, test_labels) = bag_of_tokens("train", 1500), bag_of_tokens("test", 800)
used = train_bags.any(dim=0)
train_bags, test_bags = train_bags[:, used], test_bags[:, used]
print(f"{train_bags.shape[1]} different tokens in {len(train_bags)} training queries, {len(test_bags)} test queries")


# %%
def new_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(train_bags.shape[1], 128), nn.ReLU(), nn.Linear(128, len(NAMES)))


def trained_accuracy(network, masks=None, steps=60):
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = torch.randint(len(train_bags), (256,))
        loss = nn.functional.cross_entropy(network(train_bags[rows]), train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if masks:
            apply_masks_(network, masks)
    with torch.no_grad():
        return (network(test_bags).argmax(dim=1) == test_labels).float().mean().item()


# %%
from labutils.pruning.recovery import rewound_

tickets = {name: {} for name in ("ticket, rewound", "same mask, other start", "random mask")}
dense = []
for seed in (0, 1):
    network = new_network(seed)
    start, masks = copy.deepcopy(network.state_dict()), None
    dense.append(trained_accuracy(network))
    for kept in (1 / 4, 1 / 8, 1 / 16):
        sizes = {n: s * masks[n] if masks else s for n, s in magnitude_scores(network).items()}
        masks = mask_model(sizes, 1 - kept)
        luck = mask_model({n: torch.rand_like(s) for n, s in sizes.items()}, 1 - kept)
        rewound_(network, start, masks)
        others = [(new_network(seed + 100), masks), (new_network(seed), luck)]
        for contender, mask in others:
            apply_masks_(contender, mask)
        for name, (contender, mask) in zip(tickets, [(network, masks), *others], strict=True):
            tickets[name].setdefault(kept, []).append(trained_accuracy(contender, mask))

# %%
for name, runs in tickets.items():
    print(f"{name:<24}", {f"1/{1 / kept:.0f}": [round(a, 3) for a in found] for kept, found in runs.items()})
print(f"{'dense':<24}", [round(a, 3) for a in dense])
pairs = [sum(tickets[name].values(), []) for name in ("ticket, rewound", "same mask, other start")]
ahead = sum(rewound > other for rewound, other in zip(*pairs, strict=True))
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for index, (name, results) in enumerate(tickets.items()):
    kept, style = [f"{k:.3g}" for k in (100 * k for k in results)], series_style(index)
    axes.plot(kept, [sum(r) / len(r) for r in results.values()], label=name, **style)
    for run in zip(*results.values(), strict=True):
        axes.plot(kept, run, linestyle="none", alpha=0.4, **style)
axes.axhline(sum(dense) / len(dense), color="0.4", linestyle="--", label="dense")
axes.set(xlabel="weights kept (%)", ylabel="accuracy")
axes.set_title(f"The rewound ticket is ahead of another start in {ahead} of {len(pairs[0])} pairs")
axes.legend(fontsize="small")
plt.show()

# %% [markdown]
# *Test accuracy on 63 intents over the share of weights kept; faint: the two seeds, solid: their mean; 60 steps of training each.*
# A pair is one seed at one density. The mask carries most of the luck: compare the random masks of the same density. How much the first
# values add shows in the gap between the first two curves, where two seeds are too few for more than a hint. And after so few steps a
# sparse network has hardly converged: these accuracies say how *fast* it learns, not how good it becomes.

# %% [markdown]
# ## 6 · Structure: remove, do not mask
#
# A zero still lies in memory. Structured pruning takes whole parts out, and what is left is an **ordinary smaller
# checkpoint**:
#
# - **neurons** of the MLP: rows of gate and up, columns of down;
# - **heads**: a key-value head goes with *all* query heads that share it (GQA), or the rest would look up the wrong keys;
# - **layers** with little influence;
# - **width**: channels of the residual stream, through embeddings, norms and every matrix.

# %% [markdown]
# Two more ways keep every neuron and store fewer numbers:
#
# - **low rank:** W ≈ A B with two thin matrices, from the SVD of W alone or of W weighted by its inputs (*activation-aware*). **Tiny
#   numbers:** a 4 × 4 matrix of rank 1 is 4 + 4 numbers in place of 16;
# - **SliceGPT** (Ashkboos et al. 2024, arXiv:2401.15024): turn the residual stream onto its principal axes, then cut the last channels.
#   Turning is free: with Q a rotation, (W Qᵀ)(Q x) = W x, layers only *add* to the stream, and a norm sees no change of length. **Tiny
#   numbers:** inputs (1, 1), (2, 2), (−3, −3): along the axis (1, 1)/√2 one channel says all, and the other is 0.

# %% [markdown]
# Neurons first. Section 1 showed that those which stay can speak for those which go (`reconstruct`). With one column of A for each
# text position and one row for each neuron, `down` computes W A. Only the rows K stay, so we want the Ŵ that makes
# $\lVert W A - \hat W A_K \rVert^2$ least. There the error has nothing left that a kept neuron could explain:
#
# $$(W A - \hat W A_K)\, A_K^\top = 0$$
#
# All that this needs of A is its Gram matrix G = A Aᵀ. **Tiny numbers:** G = [[4, 2], [2, 1]], W = [1, 10], neuron 0 stays: Ŵ · 4 =
# 1 · 4 + 10 · 2, so Ŵ = 6.

# %% [markdown]
# ## Exercise 4.7: smaller_mlp
#
# Write `smaller_mlp(gate, up, down, gram, kept)`: gate and up (intermediate, hidden), down (hidden, intermediate), gram (intermediate,
# intermediate), kept: indices. Return the three smaller matrices, down made up for the removed neurons by the equation above.
# (In the check all are square: shapes alone will not warn you.) 4 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>A neuron is an output of gate and up and an input of down. Multiply the equation out: which blocks of gram are A A_Kᵀ and A_K A_Kᵀ?</details>
# <details><summary>Hint 2</summary>The unknown stands on the left of its matrix: <code>torch.linalg.solve(…, …, left=False)</code> solves X M = B.</details>


# %%
# EXERCISE smaller_mlp
def smaller_mlp(gate, up, down, gram, kept):
    """The MLP with only the kept neurons, and a down that makes up for the others."""
    ### BEGIN SOLUTION
    among = gram[kept][:, kept]
    wanted = down @ gram[:, kept]
    return gate[kept], up[kept], torch.linalg.solve(among, wanted, left=False)
    ### END SOLUTION


# %%
# CHECK smaller_mlp
ch04_removal.smaller_mlp(smaller_mlp)

# %% [markdown]
# Which layer does least? **Block influence** (ShortGPT, Men et al. 2024, arXiv:2403.03853):
#
# $$\text{BI} = 1 - \frac{1}{n}\sum_{t} \frac{x_t \cdot y_t}{\lVert x_t\rVert\,\lVert y_t\rVert}$$
#
# with x going into a layer and y coming out, one row a position. Near 0, the layer hardly turns the stream.
#
# ## Exercise 4.8: influence
#
# Write `influence(before, after)`: both (positions, hidden); return a float. 2 lines, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>One cosine a position, then the mean, then 1 minus it.</details>
# <details><summary>Hint 2</summary><code>torch.cosine_similarity</code> divides by both norms: along which axis?</details>


# %%
# EXERCISE influence
def influence(before, after):
    """Block influence of a layer."""
    ### BEGIN SOLUTION
    return 1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
    ### END SOLUTION


# %%
# CHECK influence
ch04_removal.influence(influence)

# %%
from labutils.pruning.low_rank import low_rank, principal_axes, rank_for, rotated
from labutils.pruning.structured import (
    block_influence,
    channel_scores,
    head_group_scores,
    keep_channels,
    keep_head_groups,
    keep_layers,
    keep_neurons,
)

influences = block_influence(model, calibration[:2])
least = min(range(6), key=influences.__getitem__)
print("block influence:", [round(v, 3) for v in influences], "so it would take layer", least, "first")

# %%
halves = [strongest(s, 384) for s in neuron_scores(model, statistics)]
groups = [strongest(s, 1) for s in head_group_scores(model, statistics)]
turned = rotated(model, principal_axes(model, calibration[:2]))  # SliceGPT, with one rotation for all layers
smaller = {
    "3/4 of the neurons": keep_neurons(model, chosen),
    "3/4 of the neurons, reconstructed": keep_neurons(model, chosen, grams=down_grams),
    "1/2 of the neurons, reconstructed": keep_neurons(model, halves, grams=down_grams),
    "1 of 2 head groups": keep_head_groups(model, groups),
    f"without layer {least}": keep_layers(model, [i for i in range(6) if i != least]),
    "width 224 of 256": keep_channels(model, strongest(channel_scores(model, statistics), 224)),
    "SliceGPT, width 224": keep_channels(turned, torch.arange(224)),
    "SliceGPT, width 192": keep_channels(turned, torch.arange(192)),
}

# %%
structure = {name: (variant.num_parameters(), quality_of(variant)) for name, variant in smaller.items()}
for aware in (False, True):
    variant = copy.deepcopy(model)

    def thin(name, w, aware=aware):
        rank = rank_for(0.75, out_features=len(w), in_features=w.shape[1])
        left, right = low_rank(w, rank, gram=statistics[name].gram if aware else None)
        return left @ right

    change_weights_(variant, thin)
    stored = model.num_parameters() - sum(m.numel() for m in magnitudes.values()) // 4
    structure[f"low rank (would store), {'activation-aware' if aware else 'plain SVD'}"] = stored, quality_of(variant)
for name, (count, quality) in structure.items():
    print(f"{name:<40} {count / 1e6:5.2f} M parameters  {quality}")

# %% [markdown]
# **Predict:** block influence names one layer after a single forward pass. Remove each of the six in turn and measure: was it right?

# %%
removed = {i: quality_of(keep_layers(model, [j for j in range(6) if j != i])) for i in range(6)}
for i in sorted(removed, key=lambda i: removed[i].difference):
    print(f"without layer {i} (block influence {influences[i]:.3f}): {removed[i]}")
print("order by cost:     ", sorted(removed, key=lambda i: removed[i].difference))
print("order by influence:", sorted(range(6), key=influences.__getitem__))
cheapest = min(removed, key=lambda i: removed[i].difference)
structure[f"without layer {cheapest}"] = smaller[f"without layer {least}"].num_parameters(), removed[cheapest]

# %%
figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
plots.draw_structure(axes, structure, dense=model.num_parameters())
plt.show()

# %% [markdown]
# *Each point is one smaller model: what it stores against what it lost, with paired 95% intervals; dotted: the dense model.*
#
# **Explain.** Compare the two orders printed above. Block influence tells the layers that must stay from those that may go, for the price of
# one forward pass; which of the cheap ones is cheapest, six evaluations say better. The figure shows the layer that it named and the one
# that cost least. The low-rank rows state what two thin factors would store; the model measured holds their product, a dense matrix.
#
# Slicing beats dropping channels at one width, but LabLM's embedding and head are one tensor: the rotation needs two, so a slice can *store more* than the model it came
# from. In a large model the vocabulary is a small share and this cost vanishes. SliceGPT proper gives every block its own
# rotation and pays with an extra matrix on each residual connection; one rotation for all keeps the checkpoint ordinary.

# %% [markdown]
# Removal equals masking, and the result is a checkpoint like any other. The proof, with LabLM itself:

# %%
from transformers import AutoModelForCausalLM

from labutils.lab.models.gguf import export_gguf

shorter = smaller["3/4 of the neurons"]
masked = copy.deepcopy(model)
for layer, kept in zip(masked.model.layers, chosen, strict=True):
    layer.mlp.down_proj.weight.data *= torch.isin(torch.arange(768), kept)
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    ours, theirs = shorter(unseen_ids[0]).logits, masked(unseen_ids[0]).logits
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    shorter.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    same = torch.equal(again(unseen_ids[0]).logits, ours)
    export_gguf(shorter, tokenizer, Path(folder) / "model.gguf", format="Q8_0")
    print(f"masked against removed, of the largest logit: {difference:.1e}; loaded again, the same logits: {same}")
    print(f"GGUF for llama.cpp: {(Path(folder) / 'model.gguf').stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## 7 · Which layer bears how much
#
# A uniform 70% treats all matrices alike. Measure instead: prune one matrix alone, read the loss on a little training text,
# put it back. Then solve for a budget: again and again raise the matrix where the next step costs least per weight.
# (Damages are taken to add up. They do not quite: it is a heuristic.)

# %%
from labutils.pruning.allocation import sensitivity, solve_budget

probe = calibration_batches(tokenizer, code=8, dialogues=8, context=128, batch=16, seed=5)[0]


@torch.no_grad()
def probe_loss():
    return scout(input_ids=probe, labels=probe, use_cache=False).loss.item()


scout, GRID = copy.deepcopy(model), (0.0, 0.5, 0.7, 0.85)
dense_loss = probe_loss()
damage = sensitivity(
    scout,
    lambda name, s: weight_of(dict(linear_layers(model))[name]) * mask_layer(magnitudes[name], s),
    probe_loss,
    levels=GRID[1:],
)
damage = {name: [dense_loss, *losses] for name, losses in damage.items()}
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
plots.draw_sensitivity(axes, {name: losses[:3] for name, losses in damage.items()}, dense_loss, "70%")
plt.show()
helped = [losses[2] - dense_loss for losses in damage.values() if losses[2] < dense_loss]
print(
    f"{probe.numel()} tokens; {len(helped)} of {len(damage)} numbers are negative, down to {min(helped, default=0.0):.3f}"
)

# %% [markdown]
# *Nats per token that the loss on the probe rises by when this matrix alone loses 70% of its weights by magnitude.
# A negative number does not mean that pruning helps: it is as small a loss as so short a text can tell from none, and positive numbers
# of its size say no more. The solver below works from all of them, which is one reason to judge it on other text.*
#
# **Predict:** does a budget solved from this picture beat the same 70% everywhere?

# %%
sizes = {name: w.numel() for name, w in magnitudes.items()}
budget = solve_budget(damage, sizes, levels=GRID, sparsity=0.7)
allotted = copy.deepcopy(model)
apply_masks_(allotted, mask_model(magnitudes, budget))
print("levels chosen:", {level: list(budget.values()).count(level) for level in GRID})
print(f"uniform 70%:   {dict(curves['magnitude, layer'])[0.7]}")
print(f"solved, {sparsity(allotted):.1%}: {quality_of(allotted)}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in damage))
for index, kind in enumerate(kinds):
    rows_of = [losses for name, losses in damage.items() if name.endswith(kind)]
    means = [sum(r[i] for r in rows_of) / len(rows_of) - dense_loss for i in range(len(GRID))]
    axes.plot([100 * g for g in GRID], means, label=kind, **series_style(index))
axes.set(xlabel="zeros in this matrix alone (%)", ylabel="loss added (nats per token)")
worst = max(kinds, key=lambda k: sum(r[-1] for n, r in damage.items() if n.endswith(k)))
axes.set_title(f"Sensitivity curves: {worst} suffers most at {GRID[-1]:.0%}")
axes.grid(alpha=0.25)
axes.legend(fontsize="small", ncols=2)
plt.show()

# %% [markdown]
# *The same measurement as curves, averaged over the six layers: what one matrix alone costs as it gets sparser.*

# %% [markdown]
# ### A budget of heads
#
# The same with whole parts. LabLM has 4 query heads a layer and 2 key-value heads, each shared by two neighbouring query heads (GQA). We
# silence one query head alone and read the loss on the probe. But what frees memory is a **group**: a key-value head *with* its query
# heads. And a layer without any head is no attention layer, so one group stays in each.
#
# **Tiny numbers:** damages [[9, 1, 2, 2], [3, 4, 1, 0]], 2 key-value heads: the groups cost [[10, 4], [7, 1]]. Remove two: 1 and 4. A third
# could not go.

# %% [markdown]
# ## Exercise 4.9: head_budget
#
# Write `head_budget(damage, kv_heads, remove)`: damage (layers, query heads), what each head costs alone; add up the costs of a group.
# Return a boolean tensor (layers, kv_heads), False for exactly `remove` groups: the cheapest in the whole model, while every layer
# keeps its dearest one. 6 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary><code>unflatten</code> gives the heads of a group an axis of their own. Which groups may never go, and what cost would keep them out of every choice?</details>
# <details><summary>Hint 2</summary>Put <code>torch.inf</code> at each layer's <code>argmax</code>, then rank all groups of the model together, flattened.</details>


# %%
# EXERCISE head_budget
def head_budget(damage, kv_heads, remove):
    """Which head groups stay, when the cheapest of the model go and each layer keeps one."""
    ### BEGIN SOLUTION
    cost = damage.unflatten(1, (kv_heads, -1)).sum(dim=-1)
    cost[torch.arange(len(cost)), cost.argmax(dim=1)] = torch.inf
    kept = torch.ones(cost.numel(), dtype=torch.bool)
    kept[cost.flatten().argsort()[:remove]] = False
    return kept.view_as(cost)
    ### END SOLUTION


# %%
# CHECK head_budget
ch04_removal.head_budget(head_budget)

# %% [markdown]
# Adding up is an assumption: two heads of a group may do the same work. **Predict:** what does a whole group cost, over the sum of what its
# two heads cost alone? Below 1, they did different things; above 1, each stood in for the other.

# %%
my_sum = predict("a head group's damage over the sum of its heads' damages, median of 12", None, unit="times")

# %%
from labutils.pruning.allocation import head_budget as budget_of_heads

WIDTH, HEADS, GROUPS = (getattr(model.config, n) for n in ("head_dim", "num_attention_heads", "num_key_value_heads"))
SHARED = HEADS // GROUPS


def silenced(pairs):
    """LabLM with these (layer, query head) unheard: zeros where `o_proj` reads them."""
    variant = copy.deepcopy(model)
    for i, head in pairs:
        variant.model.layers[i].self_attn.o_proj.weight.data[:, head * WIDTH : (head + 1) * WIDTH] = 0
    return variant


def heads_of(i, group):
    return [(i, group * SHARED + head) for head in range(SHARED)]


def rise(pairs):
    global scout
    scout = silenced(pairs)
    return probe_loss() - dense_loss


alone = torch.tensor([[rise([(i, head)]) for head in range(HEADS)] for i in range(6)])
whole = torch.tensor([[rise(heads_of(i, group)) for group in range(GROUPS)] for i in range(6)])
added = alone.unflatten(1, (GROUPS, -1)).sum(dim=-1)

# %%
from labutils.lab.plots.style import label_points, plain_log_scale

figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
axes.scatter(added, whole, **{k: v for k, v in series_style(0).items() if k in ("color", "marker")})
axes.axline((0.1, 0.1), (0.2, 0.2), color="0.6", linestyle=":", label="they would add up")
plain_log_scale(axes, "x")
plain_log_scale(axes, "y")
middle, above = (whole / added).median().item(), int((whole > added).sum())
axes.set(xlabel="its heads, each alone, added up (nats per token)", ylabel="the whole group (nats per token)")
axes.set_title(f"{above} of {whole.numel()} groups cost more than their heads; median {middle:.2f} times")
axes.legend(loc="lower right")
every = [(i, group) for i in range(6) for group in range(GROUPS)]
label_points(axes, [(f"{i}.{group}", added[i, group].item(), whole[i, group].item()) for i, group in every])
plt.show()
my_sum.compare(middle)

# %% [markdown]
# *Each point is a key-value head with its query heads, named layer.group: what the probe loses without the group, against the sum of what it
# loses without each of its heads alone; both axes logarithmic.*
#
# Now spend it: three of twelve groups go, by these damages or by the weights' own scores (section 6's `head_group_scores`).

# %%
by_weights = torch.stack(head_group_scores(model, statistics)).repeat_interleave(SHARED, dim=1) / SHARED
spent = {}
for name, scores in {"by damage": alone, "by weights": by_weights}.items():
    stays = budget_of_heads(scores, GROUPS, remove=3)
    gone = [(i, group) for i, group in (~stays).nonzero().tolist()]
    spent[name] = bits_by_document(silenced([pair for each in gone for pair in heads_of(*each)]), tokenizer, documents)
    print(f"{name:<11} without {', '.join(f'{i}.{g}' for i, g in gone)}: {paired_quality(spent[name], baseline)}")
gap = paired_quality(spent["by weights"], spent["by damage"])
low, high = gap.interval
told = "worse" if low > 0 else "better" if high < 0 else "not told apart"
print(f"by weights minus by damage: {gap.difference:+.4f} [{low:+.4f}, {high:+.4f}], paired: {told}")

# %% [markdown]
# Both spend the same three groups' memory. The last line, on text that chose nothing, says whether 24 evaluations bought more than a score that
# needs none. (An ordinary checkpoint needs equally many heads in each layer: these groups are silenced, and a format with a
# number of heads for each layer would store them as nothing.)

# %% [markdown]
# ## 8 · Recovery, and pruning with quantization
#
# A few steps of training repair much. Three ways, each 12 steps of 1,024 tokens, zeros kept at zero: on the text itself; on
# the dense model's predictions (it is a teacher, chapter 05); and **LoRA**, which trains only thin matrices. Plain LoRA would
# fill the zeros when it is merged, so its change is masked too: $W + M \odot (BA)$.

# %%
from labutils.pruning.recovery import add_lora_, merge_lora_

refresher = calibration_batches(tokenizer, code=48, dialogues=48, context=128, batch=8, seed=2)
random.Random(0).shuffle(refresher)
at_70 = mask_model(magnitudes, 0.7)
recovered = {}  # the learning rates were not tuned: three examples, and no contest
for name in ("on text", "with the dense teacher", "LoRA, rank 8"):
    variant = pruned_by("magnitude, layer", 0.7)
    if name.startswith("LoRA"):
        add_lora_(variant, at_70, rank=8, generator=torch.Generator().manual_seed(0))
        fine_tune_(variant, refresher, lr=3e-3)
        merge_lora_(variant)
    else:
        fine_tune_(variant, refresher, lr=1e-3, masks=at_70, teacher=model if "teacher" in name else None)
    recovered[name] = bits_by_document(variant, tokenizer, documents)
    print(f"{name:<24} {sparsity(variant):.0%} zeros  {paired_quality(recovered[name], baseline)}")
print(f"{'before':<24} 70% zeros  {dict(curves['magnitude, layer'])[0.7]}")
low, high = paired_quality(recovered["with the dense teacher"], recovered["on text"]).interval
print(f"teacher minus text, at one learning rate [{low:+.4f}, {high:+.4f}] bits per byte, paired; one run each")

# %% [markdown]
# Chapter 03 made weights small in bits; here they get few. **Together**, which comes first? And SparseGPT can do both in one
# pass: round each kept weight while its error can still be handed on. 50% zeros and 4 bits a weight, one scale a row.

# %%
from labutils.quantization.affine import Scheme, choose_qparams, dequantize, fake_quantize, quantize

FOUR = Scheme(bits=4)


def one_pass(name, w):
    grid = choose_qparams(w, FOUR)
    return sparsegpt(
        w, statistics[name].gram, 0.5, quantize=lambda c: dequantize(quantize(c[:, None], grid), grid)[:, 0]
    )


def prune(name, w):
    return sparsegpt(w, statistics[name].gram, 0.5)


orders = {
    "only pruned": prune,
    "only 4 bits": lambda name, w: fake_quantize(w, FOUR),
    "pruned, then 4 bits": lambda name, w: fake_quantize(prune(name, w), FOUR),
    "pruned by size, then 4 bits": lambda name, w: fake_quantize(w * mask_layer(w.abs(), 0.5), FOUR),
    "4 bits, then pruned by size": lambda name, w: (q := fake_quantize(w, FOUR)) * mask_layer(q.abs(), 0.5),
    "both in one pass": one_pass,
}

# %%
together = {}
for name, change in orders.items():
    variant = copy.deepcopy(model)
    change_weights_(variant, change)
    together[name] = bits_by_document(variant, tokenizer, documents)
    print(f"{name:<28} {sparsity(variant):.0%} zeros  {paired_quality(together[name], baseline)}")
for what, one, other in (
    ("the order alone", "4 bits, then pruned by size", "pruned by size, then 4 bits"),
    ("the method alone", "pruned by size, then 4 bits", "pruned, then 4 bits"),
    ("two passes or one", "pruned, then 4 bits", "both in one pass"),
):
    gap = paired_quality(together[one], together[other])
    low, high = gap.interval
    print(f"{what}: “{one}” minus “{other}” {gap.difference:+.4f} [{low:+.4f}, {high:+.4f}], paired")

# %% [markdown]
# **Explain.** After rounding, many weights have the same size and a criterion by size cannot tell them apart; and a later
# pruning that *updates* weights would leave the grid. So prune first, or do both at once. How much is the order worth, and how much the
# method (SparseGPT, which chooses and updates, against magnitude, which only chooses)? In the last three lines one step changes at a time. In bits: a bitmap marks each place with one
# bit, so half of the weights in 4 bits cost 0.5 · 4 + 1 = 3 bits for every weight of the dense matrix.

# %% [markdown]
# ## 9 · Which zeros buy time
#
# Decoding waits for memory (chapter 01), so a zero pays when it is *not read*. Four ways to store a sparse matrix: dense, zeros
# and all; **CSR**, each weight with its 32-bit column; a **bitmap**, one bit for each place and then the kept weights; **2:4 packed**,
# two weights of every four and their places.
#
# Inside a group of four a place takes 2 bits, so 2:4 costs (bits + 2) / 2 for each weight of the dense matrix: in fp16 36 bits for four
# weights, in place of 64. CSR pays 32 bits for each place, a bitmap one bit for *every* weight, kept or not.

# %% [markdown]
# Now a clock. Matrix times vector, 1024 × 2816 in float32, four different matrices in a row; one thread. The sparser a matrix, the more
# of it a cache could keep from one round to the next, so before each sample we read something far larger than any cache: every format
# comes from memory. Our kernels are C (`labutils/pruning/sparse_matvec.c`), compiled on first use. Dense goes through NumPy, and one row
# through PyTorch: against a slow dense product every other format looks good.
#
# **Predict:** from which share of zeros on does CSR beat dense? When does 2:4? And what do zeros buy that are stored?

# %%
my_even = predict("percent of zeros from which CSR in C is faster than dense", None, unit="%")

# %%
from labutils.measurement.roofline import probe_working_set_bytes
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import measure_interleaved, paired_ratio
from labutils.pruning.masks import mask_n_of_m
from labutils.pruning.sparse import matvec_2_4, matvec_bitmap, matvec_csr, pack_2_4, to_bitmap, to_csr

SHARES, vector = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95), torch.randn(2816)
originals = [torch.randn(1024, 2816, generator=torch.Generator().manual_seed(s)) for s in range(4)]


contest, read = {}, {}


def enter(name, function, matrices):
    contest[name] = lambda: [function(m, vector) for m in matrices]
    read[name] = sum(stored_bytes(m) for m in matrices)


def stored_bytes(m):
    if isinstance(m, torch.Tensor) and m.layout == torch.sparse_csr:
        return sum(part.nbytes for part in (m.crow_indices(), m.col_indices(), m.values()))
    return m.nbytes


def by_numpy(m, x):
    return m.numpy() @ x.numpy()


enter("dense", by_numpy, originals)
enter("dense, torch", torch.mv, originals)
enter("2:4 packed", matvec_2_4, [pack_2_4(m * mask_n_of_m(m.abs(), 2, 4)) for m in originals])
for share in SHARES:
    zeroed = [m * (torch.rand_like(m) >= share) for m in originals]  # which ones does not matter for time
    if share in (0.0, 0.5, 0.9):
        enter(f"stored {share}", by_numpy, zeroed)
    enter(f"CSR {share}", matvec_csr, [to_csr(m) for m in zeroed])
    enter(f"bitmap {share}", matvec_bitmap, [to_bitmap(m) for m in zeroed])
    enter(f"torch CSR {share}", torch.mv, [m.to_sparse_csr() for m in zeroed])

# %%
large = torch.ones(probe_working_set_bytes() // 4)
with thread_count(1):
    times = measure_interleaved(contest, repeats=15, warmup=1, before=lambda name: large.sum())
del contest, zeroed, large  # more than a gigabyte


def gain(name):
    return paired_ratio(times["dense"].samples_s, times[name].samples_s)


print(times["dense"], times["2:4 packed"], sep="\n")
for name in (
    "dense",
    "dense, torch",
    "2:4 packed",
    *(f"{kind} {s}" for s in (0.5, 0.9) for kind in ("stored", "CSR", "bitmap", "torch CSR")),
):
    rate, fewer = read[name] / times[name].median_s / 1e9, read["dense"] / read[name]
    print(
        f"{name:<14} {read[name] / 1e6:5.1f} MB at {rate:5.1f} GB/s; {gain(name)} by the clock, {fewer:.2f}x by bytes"
    )
kinds = {"stored": "zeros stored", "CSR": "CSR, our kernel", "torch CSR": "CSR, torch", "bitmap": "bitmap, our kernel"}
curve = {words: {s: gain(f"{k} {s}").value for s in SHARES if f"{k} {s}" in times} for k, words in kinds.items()}

# %%
figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
crossings = plots.draw_break_even(axes, curve)
packed_gain = gain("2:4 packed")
axes.plot(
    [50], [packed_gain.value], markersize=11, label="2:4 packed, our kernel", **series_style(4) | {"linestyle": "none"}
)
axes.annotate(f"2:4: {packed_gain.value:.2f}x", (50, packed_gain.value), xytext=(-62, 6), textcoords="offset points")
at = crossings["CSR, our kernel"]
pays = "pays" if packed_gain.low > 1 else "does not pay" if packed_gain.high < 1 else "is not told apart from dense"
axes.set_title(f"CSR's median crosses dense at {at:.0%} zeros" if at else "CSR's median never crosses dense")
axes.set_title(f"{axes.get_title()}; 2:4 {pays} at half")
axes.legend(fontsize="small", loc="upper left")
plt.show()
print("break-even:", {name: c and round(c, 3) for name, c in crossings.items() if name != "zeros stored"})
if at:
    my_even.compare(100 * at)

# %% [markdown]
# *How many times as fast as the dense product (dashed) each format is, over the share of zeros; medians of 15 interleaved rounds,
# one thread, float32, nothing in a cache. Stored zeros do the same work as dense: where they leave the line, you see the noise,
# and that equal matrices lie in different places.*
#
# **Explain.** Stored zeros are read and multiplied like any other number. CSR reads 8 bytes for a weight where dense reads 4 (torch's
# 12: its columns have 64 bits), so by bytes it breaks even at 50%, and a bitmap almost at once. But compare the GB/s: a format that
# reads slower than dense does not wait for memory, it works: with a bitmap, looking for the next place and gathering its input take longer than
# reading a weight. 2:4 knows its places in advance: a fixed stride, 17 bytes for every 32. That is why hardware asks for structure.

# %% [markdown]
# The same on a GPU is one call, and needs sparse tensor cores (Ampere or newer) and a format they take, such as fp16, bf16 or
# int8. Two cases differ: many rows, where arithmetic decides and the tensor cores may do twice as much, and a few, as in decoding, where
# the bytes decide and 9 of 16 are read. **We could not test this cell on such a card**; without one it only says so.

# %%
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
    square = torch.randn(4096, 4096)
    dense_half = (square * mask_n_of_m(square.abs(), 2, 4)).half().cuda()
    packed_half = torch.sparse.to_sparse_semi_structured(dense_half)
    print("backend:", type(packed_half).__name__)
    halves_run = {}
    for count in (2048, 16):
        batch = torch.randn(count, 4096, device="cuda", dtype=torch.half)
        halves_run[f"dense, {count} rows"] = lambda x=batch: nn.functional.linear(x, dense_half)
        halves_run[f"2:4, {count} rows"] = lambda x=batch: nn.functional.linear(x, packed_half)
    print(*measure_interleaved(halves_run, device="cuda", calls_per_sample=20).values(), sep="\n")
else:
    print("no CUDA device of capability 8.0 or newer: to_sparse_semi_structured was not run")

# %% [markdown]
# A matrix is not a model. End to end: one decoding step of a random-weight Llama (values do not change speed), dense, with zeros
# stored, 2:4 packed, and with half of its neurons removed. `python -m labutils bench pruning` does the same for 0.2 billion
# parameters; here a smaller one, for time. Two things change in the packed row: the bytes, and C code in place of NumPy's or PyTorch's product
# (the faster of the two). What the clock gains beyond the bytes is not owed to the zeros.

# %%
from labutils.course.bench.pruning import bench_pruning
from labutils.course.bench.subject import speed_subject

subject = speed_subject(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=8192)
bench_rows, bars = bench_pruning(subject, rounds=25)
for row in bench_rows:
    print(
        f"{row.technique:<20} {row.tokens_per_s:6.1f} tokens/s  {paired_ratio(row.samples, bench_rows[0].samples)}  {row.note}"
    )
print(*bars, sep="\n")

# %% [markdown]
# ## 10 · Who pays?
#
# An average hides who is hurt. LabLM serves customers too: 63 intents, two languages. We name each query's intent (the model's own
# greedy reply, compared token by token) on held-out phrasings, before and after SparseGPT at 50%. The corpus draws every intent
# equally often, so none is rare *by number*. Two other kinds of rare can be measured:
#
# - **novel** verb phrases, which training never showed;
# - what was rare in the **calibration** text: code only, dialogues only, or both.
#
# **Predict:** calibrated on code alone, bits per byte on code will be fine. And the customers?

# %%
my_served = predict("percent of customers' intents still right after calibration on code alone", None, unit="%")

# %%
from torch.nn.utils.rnn import pad_sequence

from labutils.lab.models.mixture import reply_labels
from labutils.lab.models.tokenizer import chat_ids, role_ids

queries = sorted(
    service.evaluation_set(service.INTENT, "test", 315, seed=0), key=lambda d: len(d.messages[-2]["content"])
)
encoded = [torch.tensor(tokenizer(chat_text(q.messages), add_special_tokens=False)["input_ids"]) for q in queries]


@torch.no_grad()
def intents_right(variant):
    """Whether the greedy reply equals the label: every label token is the most likely one after those before it."""
    right = []
    for begin in range(0, len(encoded), 63):
        rows = encoded[begin : begin + 63]
        labels = pad_sequence([reply_labels(ids, roles=role_ids(tokenizer)) for ids in rows], True, -100)[:, 1:]
        said = variant(pad_sequence(rows, True, tokenizer.pad_token_id), use_cache=False).logits[:, :-1].argmax(dim=-1)
        right += ((said == labels) | (labels == -100)).all(dim=1).tolist()
    return torch.tensor(right).float()


# %%
texts = {"code and dialogues": statistics}
for name, counts in {"code only": {"code": 48, "dialogues": 0}, "dialogues only": {"code": 0, "dialogues": 48}}.items():
    seen = calibration_batches(tokenizer, context=256, **counts)
    texts[name] = input_statistics(model, seen, with_gram=True)
outcomes, code_lost = {"dense": intents_right(model)}, {"dense": 0.0}
for name, seen in texts.items():
    variant = copy.deepcopy(model)
    change_weights_(variant, lambda layer, w, seen=seen: sparsegpt(w, seen[layer].gram, 0.5))
    outcomes[name], code_lost[name] = intents_right(variant), quality_of(variant).difference
outcomes["magnitude"] = intents_right(pruned_by("magnitude, layer", 0.5))
code_lost["magnitude"] = dict(curves["magnitude, layer"])[0.5].difference

# %%
groups_of = {
    "all": torch.ones(len(queries), dtype=torch.bool),
    "English": torch.tensor([q.language == "en" for q in queries]),
    "Chinese": torch.tensor([q.language == "zh" for q in queries]),
    "known phrases": torch.tensor([not service.is_novel_act(q.phrasings[0]) for q in queries]),
    "novel phrases": torch.tensor([service.is_novel_act(q.phrasings[0]) for q in queries]),
}
print(f"{'calibrated on':<20}{'code lost':>10}" + "".join(f"{g:>16}" for g in groups_of))
for name, right in outcomes.items():
    shares = "".join(f"{right[m].mean().item():>16.3f}" for m in groups_of.values())
    print(f"{name:<20}{code_lost[name]:>+10.3f}{shares}")
print("items:", {g: int(m.sum()) for g, m in groups_of.items()})
if outcomes["code only"].any():
    my_served.compare(100 * outcomes["code only"].mean().item())

# %%
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1.3, 1))
shares = {name: [right[m].mean().item() for m in groups_of.values()] for name, right in outcomes.items()}
plots.draw_groups(left, shares, {group: int(m.sum()) for group, m in groups_of.items()})
worst = min(texts, key=lambda name: shares[name][0])
left.set_title(f"SparseGPT hurts customers most when calibrated on {worst}")
by_intent = {n: [i for i, q in enumerate(queries) if q.phrasings[0].intent == n] for n in NAMES}
drops = {n: (outcomes["dense"][i] - outcomes["code and dialogues"][i]).mean().item() for n, i in by_intent.items() if i}
first = sorted(drops, key=drops.get, reverse=True)[:10]
right_axes.barh(first[::-1], [drops[n] for n in first[::-1]], color="#0072B2")
untouched = sum(d <= 0 for d in drops.values())
right_axes.set(
    xlabel="share of queries lost, less those gained",
    title=f"The first ten to go; {untouched} of {len(drops)} lost nothing",
)
plt.show()

# %% [markdown]
# *Left: share of held-out queries whose intent is named right, 50% of the weights zero, by calibration text and by group (bars: one
# standard error). Right: the ten intents that lose most when calibrated on both; about five queries each, so read it as "uneven",
# not as a ranking.*
#
# **Explain.** Look for two variants that lose about the same bits per byte on code. Their customers may fare very differently: whether
# they are still served depends almost entirely on what the calibration text contained. Hooker et al. 2020 (arXiv:2010.03058) found the same unequal harm in images. Whoever is rare
# in your calibration set is pruned first, so measure by group, always.

# %% [markdown]
# ## 11 · Prune it while it speaks
#
# How does a model sound as its weights go? Move the slider: LabLM goes on with its answer to a customer at that sparsity. Below it, the
# plain function answers at four levels, each time from the start. **Predict:** at which sparsity does it stop making sense?

# %%
from labutils.lab.widgets.pruning import PrunedSpeaker, print_speech, pruning_widget

ASKED = next(q for q in service.evaluation_set(service.ANSWER, "test", 20, seed=12) if q.language == "en")
PROMPT = tokenizer.decode(chat_ids(tokenizer, ASKED.messages[:-1], add_generation_prompt=True))
pruning_widget(PrunedSpeaker(model, tokenizer, statistics, PROMPT))

# %%
print("customer:", ASKED.messages[-2]["content"])
for level in (0.0, 0.5, 0.7, 0.9):
    print_speech(PrunedSpeaker(model, tokenizer, statistics, PROMPT), [level])

# %% [markdown]
# ## 12 · All points on the one plot
#
# Every variant that can be decoded becomes a record: tokens per second (here with LabLM, 32 tokens, growing cache), bits per byte,
# and the size of its checkpoint **on disk**, in bfloat16, as written. **Predict:** which of them is smaller on disk, and which
# is faster?

# %%
from labutils.generation.decode import generate_cached

final = {
    "dense": model,
    "50% zeros, SparseGPT": pruned_by("SparseGPT", 0.5),
    "2:4 zeros, SparseGPT": pruned_by("SparseGPT", (2, 4)),
    "neurons 3/4, reconstructed": smaller["3/4 of the neurons, reconstructed"],
    "neurons 1/2, reconstructed": smaller["1/2 of the neurons, reconstructed"],
    "1 of 2 head groups": smaller["1 of 2 head groups"],
    f"without layer {least}": smaller[f"without layer {least}"],
    "SliceGPT, width 192": smaller["SliceGPT, width 192"],
}
ask = unseen_ids[0][:, :16]
decoders = {name: lambda m=m: generate_cached(m, ask, 32) for name, m in final.items()}
runs = measure_interleaved(decoders, repeats=7, warmup=1)

# %%
import zipfile

from safetensors.torch import save_file


def disk_bytes(variant):
    """Size of the saved weights, and of a zip around them."""
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(variant).to(torch.bfloat16).save_pretrained(folder)
        plain = Path(folder) / "model.safetensors"
        with zipfile.ZipFile(Path(folder) / "model.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(plain)
        return plain.stat().st_size, (Path(folder) / "model.zip").stat().st_size


# %%
def packed_disk_bytes(variant):
    """Size of a 2:4 packed file: fp16 weights and 2-bit places, the rest in bfloat16."""
    packed = {name: pack_2_4(weight_of(layer)) for name, layer in linear_layers(variant)}
    tensors = {f"{n}.weights": p.weights.half() for n, p in packed.items()}
    tensors |= {f"{n}.places": p.places for n, p in packed.items()}
    body = {f"{n}.weight" for n in packed} | {"lm_head.weight"}
    tensors |= {n: t.bfloat16() for n, t in variant.state_dict().items() if n not in body}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "packed.safetensors")
        return (Path(folder) / "packed.safetensors").stat().st_size


# %%
from labutils.measurement import ledger

print(f"{'technique':<28}{'on disk':>9}{'zipped':>9}{'tokens/s':>10}{'against dense':>22}  bits per byte lost")
for name, variant in final.items():
    quality, (plain, zipped) = quality_of(variant), disk_bytes(variant)
    speed = [32 / s for s in runs[name].samples_s]
    record = ledger.Record(
        technique=name, model="lablm", device="cpu", dtype="float32", threads=torch.get_num_threads(),
        prompt_tokens=16, output_tokens=32, samples=speed, bits_per_byte=quality.bits_per_byte,
        baseline_bits_per_byte=quality.baseline_bits_per_byte, bytes_resident=4 * variant.num_parameters(),
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in documents), chapter="04",
    )  # fmt: skip
    ledger.append(record)
    ratio = paired_ratio(runs["dense"].samples_s, runs[name].samples_s)
    print(
        f"{name:<28}{plain / 1e6:6.2f} MB{zipped / 1e6:6.2f} MB{record.tokens_per_s:10.1f}{ratio!s:>22}  {quality.difference:+.4f}"
    )
print(f"2:4 zeros in a packed file: {packed_disk_bytes(final['2:4 zeros, SparseGPT']) / 1e6:.2f} MB")

# %%
from labutils.lab.plots.speed_quality import draw_speed_quality

records = [r for r in ledger.read() if r.chapter == "04" and r.bits_per_byte is not None]
figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
draw_speed_quality(records[-len(final) :], ax=axes)
plt.show()

# %% [markdown]
# *Tokens per second (median of 7 rounds, 95% interval) against bits per byte, for this chapter's decodable variants.*
#
# **Explain.** A checkpoint with zeros is as large as the dense one and decodes at its speed; only a zip or a packed file notices them.
# What was removed for good is smaller on disk and faster to run, in any program. LabLM is so small that Python between the kernels takes
# its share of each token; section 9 has the model for claims about bytes.

# %% [markdown]
# ## What you have
#
# - the article's rule turned round: similar means redundant, and the kept ones speak for the removed;
# - six criteria, n:m patterns and the OBS update, each with its cost and interval;
# - smaller ordinary checkpoints: neurons, heads, layers, width, slices; a budget spent on the groups that cost least;
# - the share of zeros from which a sparse format pays *on this machine*, and one that is stored dense and pays nothing;
# - a table by group, which an average would have hidden.
#
# **Open question:** you have a budget of one percent in quality. Would you spend it on 2:4 zeros, on fewer layers, or on 4 bits? Which
# measurement of this chapter would you repeat on *your* model before you answer?
#
# Next: **05 · Knowledge distillation**.

# %%
my_calibration()

# %%
from labutils.course.progress import progress

progress()
