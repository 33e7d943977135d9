"""GPTQ: round a weight column by column, and let the columns not yet rounded make up for each error.

Frantar et al. 2022 (arXiv:2210.17323). Minimises ||X (W − Ŵ)ᵀ||², row by row of W; X has one
calibration input a row.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.lab.layers.calibration import inverse_factor
from labutils.quantization.affine import QParams, dequantize, grouped, quantize


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "out n"],
    gram: Float[Tensor, "m m"],
    qparams: QParams,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> Float[Tensor, "out n"]:
    """The weight rounded to the grid of `qparams`, with each column's error handed to the columns after it.

        e_j = (w_j − ŵ_j) / U_jj,    w_k ← w_k − e_j · U_jk  for k > j

    Columns are worked off in blocks, and a block's errors reach the columns behind it in one product: the same
    numbers, less memory traffic. Scales are chosen beforehand (RTN's, or a clip search's), which keeps them in order
    under `act_order`; the paper chooses a group's scale when it reaches the group.

    Args:
        weight: rows are outputs.
        gram: XᵀX of the layer's calibration inputs; m = n.
        qparams: scale and zero point of the whole weight, from `choose_qparams`.
        damping: share of the mean diagonal that is added to the diagonal.
        block: columns in a block.
        act_order: begin with the inputs of the largest energy, while most columns can still make up for the error.

    Raises:
        ValueError: when the shapes do not fit.
    """
    n = weight.shape[1]
    if gram.shape != (n, n):
        raise ValueError(f"gram must have shape (in_features, in_features) = {(n, n)}; got {tuple(gram.shape)}")
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(n, device=weight.device)
    factor = inverse_factor(gram[order][:, order], damping=damping).to(weight.device, torch.float32)
    scale, zero_point = (_by_column(part, weight, qparams)[:, order] for part in (qparams.scale, qparams.zero_point))
    work, rounded = weight.float()[:, order], torch.empty_like(weight, dtype=torch.float32)
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = torch.empty_like(work[:, start:end])
        for j in range(start, end):
            column = QParams(scale[:, j], zero_point[:, j], qparams.qmin, qparams.qmax)
            rounded[:, order[j]] = dequantize(quantize(work[:, j], column), column)
            errors[:, j - start] = (work[:, j] - rounded[:, order[j]]) / factor[j, j]
            work[:, j + 1 : end] -= errors[:, j - start, None] * factor[j, j + 1 : end]
        work[:, end:] -= errors @ factor[start:end, end:]
    return rounded.to(weight.dtype)


def _by_column(part: Tensor, weight: Tensor, qparams: QParams) -> Tensor:
    """Scale or zero point, one for every number of the weight."""
    return part.expand_as(grouped(weight, qparams.group_size)).reshape(weight.shape)
