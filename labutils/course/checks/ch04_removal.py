"""Checks of chapter 04, second part: a column of SparseGPT, physical removal, block influence, a budget of heads."""

from functools import partial

import torch

from labutils.course.checks import exercise, expect_function
from labutils.pruning import allocation, similarity


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def column_pruned(weight, factor, column, gone, *, sign=-1.0, divide=True, everyone=False, update=True, start=1):
    """One column of SparseGPT as exercise 4.6 asks for it; the settings are mistakes."""
    errors = weight[:, column] / (factor[column, column] if divide else 1.0)
    errors = errors if everyone else torch.where(gone, errors, 0.0)
    changed = weight.clone()
    if update:
        later = slice(column + start, None)
        changed[:, later] += sign * errors[:, None] * factor[column, later]
    changed[gone, column] = 0
    return changed


@exercise("4.6")
def prune_column(answer):
    """Errors of the pruned weights, handed on along a row of U."""

    def case(seed, column, gone):
        x = _random(30, 5, seed=seed)
        factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True)
        return {"weight": _random(3, 5, seed=seed + 1), "factor": factor, "column": column, "gone": torch.tensor(gone)}

    tiny = {"weight": torch.tensor([[4.0, 5.0]]), "factor": torch.tensor([[2.0, 1.0], [0.0, 1.0]])}
    expect_function(
        answer,
        column_pruned,
        cases=[
            tiny | {"column": 0, "gone": torch.tensor([True])},
            case(0, 1, [True, False, True]),
            case(3, 4, [False, True, False]),
        ],
        rtol=1e-3,
        atol=1e-6,
        mistakes=[
            (partial(column_pruned, update=False), "the weights are gone, but no column made up for them"),
            (partial(column_pruned, sign=1.0), "the later columns moved the wrong way: subtract"),
            (partial(column_pruned, divide=False), "divide by factor[column, column]: the error is w / U_jj"),
            (partial(column_pruned, everyone=True), "rows that keep their weight moved too: their error is 0"),
            (partial(column_pruned, start=2), "the next column was left out: it begins at column + 1"),
        ],
    )


def _repaired(down, gram, kept):
    return similarity.reconstruct(down, gram, kept, damping=0.0)


def _down_by(change):
    """The right gate and up with another down."""
    return lambda gate, up, down, gram, kept: (gate[kept], up[kept], change(down, gram, kept))


def _mistakes_of_mlp():
    downs = [
        (
            lambda down, gram, kept: down[:, kept],
            "down's kept columns are as they were, so nobody speaks for the removed neurons: solve the equation",
        ),
        (
            lambda down, gram, kept: _repaired(down, gram, kept) - down[:, kept],
            "that is only what down gains: its kept columns' own part is missing",
        ),
        (
            lambda down, gram, kept: down @ gram[:, kept],
            "nothing was solved: W A A_Kᵀ still has to be divided by A_K A_Kᵀ, gram[kept][:, kept]",
        ),
        (
            lambda down, gram, kept: down @ gram[:, kept] / gram.diagonal()[kept],
            "each kept neuron was treated as if it were alone: divide by the matrix gram[kept][:, kept]",
        ),
        (
            lambda down, gram, kept: down @ gram[:, kept] @ torch.linalg.inv(gram)[kept][:, kept],
            "a part of the inverse is not the inverse of a part: take gram[kept][:, kept], then invert",
        ),
    ]
    mistakes = [(_down_by(change), hint) for change, hint in downs]
    return mistakes + [
        (
            lambda gate, up, down, gram, kept: (gate[:, kept], up[:, kept], _repaired(down, gram, kept)),
            "a neuron is an output of gate and up: take their rows",
        ),
        (
            lambda gate, up, down, gram, kept: (gate[kept], up, _repaired(down, gram, kept)),
            "up still has every neuron: gate and up are multiplied, neuron by neuron",
        ),
    ]


@exercise("4.7")
def smaller_mlp(answer):
    """Rows of gate and up, columns of down, repaired by least squares."""
    spoken = _random(6, 40, seed=3) + _random(1, 40, seed=4)  # all neurons have something in common
    case = {
        "gate": _random(6, 6),
        "up": _random(6, 6, seed=1),
        "down": _random(6, 6, seed=2),
        "gram": spoken @ spoken.T,
    }
    expect_function(
        answer,
        _down_by(_repaired),
        cases=[case | {"kept": torch.tensor([0, 2, 5])}, case | {"kept": torch.tensor([4])}],
        rtol=1e-3,
        atol=1e-4,
        mistakes=_mistakes_of_mlp(),
    )


@exercise("4.8")
def influence(answer):
    """1 minus the mean cosine of what goes in and what comes out."""

    def cosine(before, after):
        return torch.cosine_similarity(before, after, dim=-1)

    before = _random(5, 8)
    cases = [{"before": before, "after": before + 0.5 * _random(5, 8, seed=1)}, {"before": before, "after": 3 * before}]
    expect_function(
        answer,
        lambda before, after: 1 - cosine(before, after).mean().item(),
        cases=cases,
        atol=1e-5,
        mistakes=[
            (lambda before, after: cosine(before, after).mean().item(), "that is how little it does: 1 minus the mean"),
            (
                lambda before, after: 1 - torch.cosine_similarity(before, after, dim=0).mean().item(),
                "compared channel by channel: a position is a row, so dim=-1",
            ),
            (
                lambda before, after: 1 - torch.cosine_similarity(before.flatten(), after.flatten(), dim=0).item(),
                "one cosine over everything lets long rows drown short ones: one a position, then the mean",
            ),
            (
                lambda before, after: ((after - before).norm() / before.norm()).item(),
                "that is the size of the change: a layer that only makes the stream longer has no influence",
            ),
            (
                lambda before, after: (before * after).sum(dim=-1).mean().item(),
                "a dot product grows with the lengths: divide by both norms",
            ),
            (
                lambda before, after: 1 - (before * after).sum(dim=-1).mean().item(),
                "a dot product grows with the lengths: divide by both norms",
            ),
        ],
    )


def _ranked(damage, kv_heads, remove, *, group=torch.sum, together=True, spare=True, sign=1.0, neighbours=True):
    if neighbours:
        cost = group(damage.unflatten(1, (kv_heads, -1)), dim=-1)
    else:
        cost = group(damage.unflatten(1, (-1, kv_heads)), dim=1)
    cost = sign * cost
    if spare:
        cost[torch.arange(len(cost)), (sign * cost).argmax(dim=1)] = torch.inf
    if not together:
        cost = cost.argsort(dim=1).argsort(dim=1) + torch.arange(len(cost))[:, None] / len(cost)
    kept = torch.ones(cost.numel(), dtype=torch.bool)
    kept[cost.flatten().argsort()[:remove]] = False
    return kept.view_as(cost)


@exercise("4.9")
def head_budget(answer):
    """The cheapest groups of the model, never a layer's last one."""
    tiny = torch.tensor([[9.0, 1.0, 2.0, 2.0], [3.0, 4.0, 1.0, 0.0]])
    uneven = torch.tensor(
        [[0.1, 0.2, 0.3, 0.5, 9.0, 8.0], [5.0, 7.0, 1.0, 6.0, 0.6, 4.0], [3.0, 2.0, 9.0, 9.5, 6.0, 2.5]]
    )
    expect_function(
        answer,
        allocation.head_budget,
        cases=[
            {"damage": tiny, "kv_heads": 2, "remove": 2},
            {"damage": uneven, "kv_heads": 3, "remove": 3},
            {"damage": torch.tensor([[1.0, 2.0, 3.0, 5.0], [50.0, 60.0, 70.0, 90.0]]), "kv_heads": 2, "remove": 2},
            {"damage": uneven, "kv_heads": 3, "remove": 0},
        ],
        mistakes=[
            (lambda **a: ~allocation.head_budget(**a), "inverted: True means that a group stays"),
            (partial(_ranked, spare=False), "a layer lost its last group: its dearest one must stay"),
            (partial(_ranked, neighbours=False), "the query heads of a group are neighbours: 0 and 1, then 2 and 3"),
            (partial(_ranked, group=torch.amax), "a group costs what its heads cost together: add them up"),
            (partial(_ranked, sign=-1.0), "the dearest groups went: remove the cheapest"),
            (partial(_ranked, together=False), "every layer lost as many: rank the groups of all layers together"),
        ],
    )
