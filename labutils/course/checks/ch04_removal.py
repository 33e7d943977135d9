"""Checks of chapter 04, second part: a column of SparseGPT, physical removal, block influence, packed bits."""

from functools import partial

import torch

from labutils.course.checks import exercise, expect_function


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


@exercise("4.7")
def remove_neurons(answer):
    """Rows of gate and up, columns of down."""

    def reference(gate, up, down, kept):
        return gate[kept], up[kept], down[:, kept]

    case = {"gate": _random(6, 6), "up": _random(6, 6, seed=1), "down": _random(6, 6, seed=2)}
    expect_function(
        answer,
        reference,
        cases=[case | {"kept": torch.tensor([0, 2, 5])}, case | {"kept": torch.tensor([4])}],
        mistakes=[
            (
                lambda gate, up, down, kept: (gate[kept], up[kept], down[kept]),
                "a neuron is an input of down: take down's columns, down[:, kept]",
            ),
            (
                lambda gate, up, down, kept: (gate[:, kept], up[:, kept], down[:, kept]),
                "a neuron is an output of gate and up: take their rows",
            ),
            (
                lambda gate, up, down, kept: (gate[:, kept], up[:, kept], down[kept]),
                "rows and columns are swapped: weights are (out_features, in_features)",
            ),
            (
                lambda gate, up, down, kept: (gate[kept], up, down[:, kept]),
                "up still has every neuron: gate and up are multiplied, neuron by neuron",
            ),
            (
                lambda gate, up, down, kept: reference(gate, up, down, torch.arange(len(kept))),
                "those are the first neurons: take the ones in `kept`",
            ),
            (
                lambda gate, up, down, kept: reference(gate, up, down, _others(kept, len(gate))),
                "the kept neurons went and the others stayed",
            ),
            (
                lambda gate, up, down, kept: (*(_zeroed(m, kept) for m in (gate, up)), _zeroed(down.T, kept).T),
                "masked, not removed: zeros still take time and space, so take a part of the matrix",
            ),
        ],
    )


def _others(kept, count):
    return torch.tensor([i for i in range(count) if i not in kept.tolist()])


def _zeroed(matrix, rows):
    result = torch.zeros_like(matrix)
    result[rows] = matrix[rows]
    return result


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


@exercise("4.9")
def packed_bits(answer):
    """Bits of a 2:4 packed matrix: half the weights, and two bits for the place of each."""

    def reference(rows, columns, bits):
        return rows * columns // 2 * (bits + 2)

    expect_function(
        answer,
        reference,
        cases=[{"rows": 1, "columns": 4, "bits": 16}, {"rows": 1024, "columns": 2816, "bits": 32}],
        mistakes=[
            (
                lambda rows, columns, bits: rows * columns // 2 * bits,
                "the places are missing: which two of the four were kept must be stored too",
            ),
            (
                lambda rows, columns, bits: rows * columns * (bits + 2),
                "all weights are counted: two of every four are stored",
            ),
            (
                lambda rows, columns, bits: rows * columns // 2 * (bits + 1),
                "one bit tells two places apart: a four has four, so 2 bits",
            ),
            (
                lambda rows, columns, bits: rows * columns // 2 * (bits + 32),
                "that is CSR with 32-bit columns: inside a four, 2 bits are enough",
            ),
            (lambda rows, columns, bits: reference(rows, columns, bits) / 8, "those are bytes: bits were asked for"),
            (
                lambda rows, columns, bits: rows * columns // 2 * bits + rows * columns // 4 * 2,
                "2 bits for every four: each of its two kept weights needs a place of its own",
            ),
        ],
    )
