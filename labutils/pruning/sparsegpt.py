"""SparseGPT: remove weights one column at a time and let the columns that are left make up for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from labutils.lab.layers.calibration import inverse_factor
from labutils.pruning.masks import Pattern, mask_layer, mask_n_of_m, zeros_for

Column = Float[Tensor, " out"]


@dataclass(frozen=True)
class _Masker:
    """Chooses which weights of a block go, by OBS's error w² / [H⁻¹]_jj; exact over the whole layer."""

    pattern: Pattern
    rows: int

    def block(self, weight: Float[Tensor, "out b"], diagonal: Float[Tensor, " b"], first: int) -> Bool[Tensor, "out b"]:
        """The mask of columns first … first + b; for n:m it is chosen later, group by group."""
        scores = (weight / diagonal) ** 2
        if isinstance(self.pattern, tuple):
            return torch.ones_like(scores, dtype=torch.bool)
        last = first + weight.shape[1]
        zeros = zeros_for(self.pattern, self.rows * last) - zeros_for(self.pattern, self.rows * first)
        return mask_layer(scores, zeros / scores.numel())

    def group(self, mask: Tensor, weight: Tensor, diagonal: Tensor, column: int) -> None:
        """At the first column of a group of m: chooses n of them, on weights as they are by now."""
        if isinstance(self.pattern, tuple) and column % self.pattern[1] == 0:
            n, m = self.pattern
            group = slice(column, column + m)
            mask[:, group] = mask_n_of_m((weight[:, group] / diagonal[group]) ** 2, n, m)


def sparsegpt(
    weight: Float[Tensor, "out n"],
    gram: Float[Tensor, "inputs inputs"],
    pattern: Pattern,
    *,
    block: int = 128,
    damping: float = 0.01,
    quantize: Callable[[Column], Column] = lambda column: column,
) -> Float[Tensor, "out n"]:
    """The pruned weight that nearly minimises ‖X (W − Ŵ)ᵀ‖ (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1).

    Masks are chosen for blocks of columns; each removed or rounded weight's error, divided by U_jj, is subtracted from
    the columns to its right along row j of U (`inverse_factor`).

    Args:
        weight: (out_features, in_features).
        gram: XᵀX of the layer's inputs.
        pattern: sparsity, or (n, m): n kept of every m.
        block: columns that choose their mask together.
        damping: share of the mean diagonal added to it.
        quantize: rounds one kept column onto the rows' grids, so that pruning and quantization share one pass.

    Raises:
        ValueError: when shapes disagree, or m divides neither block nor in_features.
    """
    rows, columns = weight.shape
    if gram.shape != (columns, columns):
        raise ValueError(f"gram must be (in_features, in_features)=({columns}, {columns}); got {tuple(gram.shape)}")
    if isinstance(pattern, tuple) and (columns % pattern[1] or block % pattern[1]):
        raise ValueError(f"m must divide in_features={columns} and block={block}; got {pattern[1]}")
    w, factor = weight.float().clone(), inverse_factor(gram, damping=damping).float()
    w[:, gram.diagonal() == 0] = 0
    masker = _Masker(pattern, rows)
    for first in range(0, columns, block):
        here = slice(first, min(first + block, columns))
        errors = _prune_block_(w[:, here], factor[here, here], masker, first, quantize)
        w[:, here.stop :] -= errors @ factor[here, here.stop :]
    return w.to(weight.dtype)


def _prune_block_(
    w: Float[Tensor, "out b"],
    factor: Float[Tensor, "b b"],
    masker: _Masker,
    first: int,
    quantize: Callable[[Column], Column],
) -> Float[Tensor, "out b"]:
    """Prunes a block's columns in place and returns their errors, which later blocks make up for."""
    errors, diagonal = torch.zeros_like(w), factor.diagonal()
    mask = masker.block(w, diagonal, first)
    for column in range(w.shape[1]):
        masker.group(mask, w, diagonal, column)
        kept = torch.where(mask[:, column], quantize(w[:, column]), 0.0)
        errors[:, column] = (w[:, column] - kept) / diagonal[column]
        w[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
        w[:, column] = kept
    return errors
