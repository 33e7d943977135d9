"""Checks of chapter 04, first part: similarity, masks, n:m, the OBS update."""

from functools import partial

import torch

from labutils.course.checks import exercise, expect_function
from labutils.pruning import masks, scores, similarity


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("4.1")
def explained_share(answer):
    """cos² of every pair of rows."""

    def reference(rows):
        return similarity.explained(rows @ rows.T)

    expect_function(
        answer,
        reference,
        cases=[{"rows": torch.tensor([[0.3, 0.0], [0.5, 0.5], [0.0, 0.2]])}, {"rows": _random(4, 3)}],
        atol=1e-6,
        mistakes=[
            (
                lambda rows: similarity.projection(rows @ rows.T),
                "that is the article's coefficient, which passes 1: divide by the powers of both rows, and square",
            ),
            (
                lambda rows: similarity.projection(rows @ rows.T).T,
                "divided by the power of one row only: the share needs the powers of both",
            ),
            (
                lambda rows: torch.cosine_similarity(rows[:, None], rows[None], dim=-1),
                "that is the cosine, and it can be negative: the share of the power is its square",
            ),
            (
                lambda rows: torch.cosine_similarity(rows[:, None], rows[None], dim=-1).abs(),
                "that is the size of the cosine: the share of the power is its square",
            ),
            (lambda rows: 1 - reference(rows), "that is what stays unexplained: 1 minus it is the share"),
            (lambda rows: similarity.explained(rows.T @ rows), "you compared the columns: use rows @ rows.T"),
            (lambda rows: (rows @ rows.T) ** 2, "nothing is divided: a share compares with the rows' own powers"),
        ],
    )


def _weights():
    return [
        {"weight": torch.tensor([[0.5, -0.1, 0.3], [-0.9, 0.2, 0.05]]), "sparsity": 0.5},
        {"weight": _random(4, 8), "sparsity": 0.25},
        {"weight": _random(4, 8, seed=1), "sparsity": 1.0},
        {"weight": _random(3, 5, seed=2), "sparsity": 0.65},  # 9.75 weights: round() gives 10, int() gives 9
    ]


@exercise("4.2")
def magnitude_mask(answer):
    """The layer's largest weights by size, exact to the weight."""

    def reference(weight, sparsity):
        return masks.mask_layer(scores.magnitude(weight), sparsity)

    expect_function(
        answer,
        reference,
        cases=_weights(),
        mistakes=[
            (lambda weight, sparsity: ~reference(weight, sparsity), "inverted: True means kept, False means zero"),
            (
                lambda weight, sparsity: masks.mask_layer(weight, sparsity),
                "signs were left in, so large negative weights went first: compare sizes, weight.abs()",
            ),
            (
                lambda weight, sparsity: masks.mask_layer(-weight.abs(), sparsity),
                "the largest went: sparsity is the share that becomes zero, the smallest",
            ),
            (
                lambda weight, sparsity: reference(weight, 1 - sparsity),
                "sparsity is the share of zeros, not the share kept",
            ),
            (
                lambda weight, sparsity: masks.mask_rows(weight.abs(), sparsity),
                "each row lost its own smallest: here the whole layer competes, so flatten it first",
            ),
            (
                lambda weight, sparsity: reference(weight, int(sparsity * weight.numel()) / weight.numel()),
                "the count was cut off, not rounded: round(sparsity * weight.numel())",
            ),
            (
                lambda weight, sparsity: weight.abs() > weight.abs().max() * sparsity,
                "a share of the largest weight is no share of the weights: rank them, and count",
            ),
            (lambda weight, sparsity: weight * reference(weight, sparsity), "return the mask, not the pruned weight"),
        ],
    )


def _weights_with_norms():
    make, loud = torch.Generator().manual_seed(3), torch.tensor([[1.0], [9.0], [1.0], [9.0]])
    return [
        {"weight": torch.tensor([[1.0, -3.0], [2.0, 0.5]]), "norms": torch.tensor([6.0, 1.0]), "sparsity": 0.5},
        {"weight": _random(4, 4) * loud, "norms": torch.rand(4, generator=make) * 5, "sparsity": 0.5},
        {"weight": _random(4, 4, seed=2), "norms": torch.rand(4, generator=make) * 5, "sparsity": 0.25},
        {"weight": torch.tensor([[3.0, 1.0]]), "norms": torch.tensor([1.0, 2.0]), "sparsity": 0.5},  # 3 against 2
    ]


@exercise("4.3")
def wanda_mask(answer):
    """Size times input norm, compared within each row."""

    def reference(weight, norms, sparsity):
        return masks.mask_rows(scores.wanda(weight, norms), sparsity)

    expect_function(
        answer,
        reference,
        cases=_weights_with_norms(),
        mistakes=[
            (
                lambda weight, norms, sparsity: masks.mask_layer(scores.wanda(weight, norms), sparsity),
                "the whole layer competed: Wanda compares within each row, so that no output loses more than another",
            ),
            (
                lambda weight, norms, sparsity: masks.mask_rows(weight.abs(), sparsity),
                "the inputs are missing: multiply each column by its norm",
            ),
            (
                lambda weight, norms, sparsity: masks.mask_rows(weight * norms, sparsity),
                "signs were left in: the size counts, weight.abs()",
            ),
            (
                lambda weight, norms, sparsity: masks.mask_rows(weight.abs() * norms[:, None], sparsity),
                "the norms met the rows: they belong to the inputs, which are the columns",
            ),
            (
                lambda weight, norms, sparsity: masks.mask_rows(weight.abs() / norms, sparsity),
                "you divided by the norms: a loud input makes a weight matter more",
            ),
            (
                lambda weight, norms, sparsity: masks.mask_rows(scores.wanda(weight, norms).T, sparsity).T,
                "compared within each column: a row of the weight is an output, and rows are compared",
            ),
            (
                lambda weight, norms, sparsity: masks.mask_rows(weight.abs() * norms**2, sparsity),
                "the norms were squared (or the sizes rooted, which ranks alike): the score is |W| times the norm",
            ),
        ],
    )


@exercise("4.4")
def two_of_four(answer):
    """The two largest of every four neighbours in a row."""

    def reference(scores):
        return masks.mask_n_of_m(scores, 2, 4)

    expect_function(
        answer,
        reference,
        cases=[{"scores": torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 9.0, 8.0, 7.0]])}, {"scores": _random(8, 16).abs()}],
        mistakes=[
            (lambda scores: ~reference(scores), "the two smallest of each four were kept: keep the largest"),
            (
                lambda scores: masks.mask_rows(scores, 0.5),
                "half of each row, but some fours keep 3: rank inside each four",
            ),
            (
                lambda scores: masks.mask_layer(scores, 0.5),
                "half of the layer, but not 2 of every 4: rank inside each four",
            ),
            (lambda scores: masks.mask_n_of_m(scores, 1, 4), "one of four was kept: 2:4 keeps two"),
            (
                lambda scores: masks.mask_n_of_m(scores, 4, 8),
                "that is 4:8, two fours sharing their places: cut rows by 4",
            ),
            (
                lambda scores: masks.mask_n_of_m(scores.T.contiguous(), 2, 4).T,
                "the fours ran down the columns: neighbours stand in a row, along the inputs",
            ),
        ],
    )


def _obs(weights, inverse, index, *, sign=-1.0, divide=True, exact=True):
    factor = weights[index] / (inverse[index, index] if divide else 1.0)
    changed = weights + sign * factor * inverse[index]
    if exact:
        changed[index] = 0
    return changed


@exercise("4.5")
def remove_one(answer):
    """Optimal Brain Surgeon: one weight goes, the others make up for it."""

    def case(seed, index):
        x = _random(20, 4, seed=seed)
        return {"weights": _random(4, seed=seed + 1), "inverse": torch.linalg.inv(x.T @ x), "index": index}

    def only_masked(weights, inverse, index):
        return weights * (torch.arange(len(weights)) != index)

    expect_function(
        answer,
        _obs,
        cases=[case(0, 1), case(5, 3)],
        rtol=1e-3,
        atol=1e-6,
        mistakes=[
            (only_masked, "the weight is gone, but nobody made up for it: change the others along inverse[index]"),
            (partial(_obs, sign=1.0), "the others moved the wrong way: subtract"),
            (partial(_obs, sign=1.0, exact=False), "the weight doubled, the sign is wrong: subtract"),
            (
                partial(_obs, divide=False),
                "divide by inverse[index, index], so that the weight itself lands on 0",
            ),
            (
                partial(_obs, divide=False, exact=False),
                "divide by inverse[index, index]: the weight itself must land on 0",
            ),
            (
                lambda weights, inverse, index: _obs(weights, torch.linalg.inv(inverse), index),
                "that used the Gram matrix itself: `inverse` is inverted already",
            ),
        ],
    )
