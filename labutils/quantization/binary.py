"""One bit: signs and one scale a row, multiplied by counting equal bits (XNOR-Net); and three values (BitNet b1.58)."""

import torch
from jaxtyping import Float, Int, Int8, Int32, UInt8
from torch import Tensor

from labutils.quantization.packing import pack

POPCOUNT = torch.tensor([code.bit_count() for code in range(256)], dtype=torch.int32)


def binarize(x: Float[Tensor, "*rows n"]) -> tuple[Int8[Tensor, "*rows n"], Float[Tensor, "*rows 1"]]:
    """Signs B in {−1, +1} (0 counts as +1) and α = mean |x| of each row: no other α·B is nearer to x.

    Rastegari et al. 2016 (arXiv:1603.05279).

    Raises:
        ValueError: for an empty row, infinity or NaN.

    >>> binarize(torch.tensor([[3.0, -1.0]]))
    (tensor([[ 1, -1]], dtype=torch.int8), tensor([[2.]]))
    """
    if x.numel() == 0 or not x.isfinite().all():
        raise ValueError(f"signs need at least one number a row, all finite; got shape {tuple(x.shape)}, inf or nan")
    return torch.where(x < 0, -1, 1).to(torch.int8), x.float().abs().mean(dim=-1, keepdim=True)


def pack_signs(signs: Int[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows bytes"]:
    """Eight signs a byte: bit 1 for +1, bit 0 for −1 and for the padding."""
    return pack((signs > 0).int(), bits=1)


def xnor_product(
    x: UInt8[Tensor, "rows bytes"], weight: UInt8[Tensor, "out_features bytes"], count: int
) -> Int32[Tensor, "rows out_features"]:
    """Products of sign vectors of `count` entries, from packed bits: count − 2 · (number of different bits).

    Two signs multiply to +1 where their bits agree (XNOR) and to −1 where they differ (XOR); the padding agrees
    with itself and is not counted.

    >>> xnor_product(pack_signs(torch.tensor([[1, -1, 1]])), pack_signs(torch.tensor([[1, 1, 1]])), 3)
    tensor([[1]], dtype=torch.int32)
    """
    different = x[:, None] ^ weight[None]
    return count - 2 * POPCOUNT.to(x.device)[different.int()].sum(dim=-1, dtype=torch.int32)


def ternarize(x: Float[Tensor, "*rows n"]) -> tuple[Int8[Tensor, "*rows n"], Float[Tensor, ""]]:
    """Codes in {−1, 0, 1} and one scale for all: s = mean |x|, q = clamp(round(x / s)).

    BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, equations 1 to 3), which trains with it from the start. Three values
    carry log2 3 = 1.58 bits; five of them fit into a byte, for 3^5 = 243.

    Raises:
        ValueError: for infinity or NaN.

    >>> ternarize(torch.tensor([[3.0, -1.0, 0.5, -3.5]]))
    (tensor([[ 1,  0,  0, -1]], dtype=torch.int8), tensor(2.))
    """
    if not x.isfinite().all():
        raise ValueError("three values stand for finite numbers only; got inf or nan")
    scale = x.float().abs().mean().clamp(min=1e-12)
    return torch.round(x / scale).clamp(-1, 1).to(torch.int8), scale
