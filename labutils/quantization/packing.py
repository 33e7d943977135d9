"""Codes stored in the bits that they need, and what a weight then costs with its scales and zero points."""

import math

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from labutils.quantization.affine import Scheme


def pack(codes: Int[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Writes each row's codes one behind the other, lowest bit first, and fills up the row's last byte with zeros.

    Codes are counted from 0: store `codes - qmin` of signed ones.

    Raises:
        ValueError: when bits is not in 1 … 8, or a code needs more.

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist()  # 2·16 + 1, then 3
    [33, 3]
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits must be a whole number from 1 to 8; got {bits}")
    if codes.numel() and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise ValueError(f"codes of {bits} bits lie in 0 to {2**bits - 1}; got {codes.min()} to {codes.max()}")
    stream = (codes.int()[..., None] >> torch.arange(bits, device=codes.device) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device)).sum(dim=-1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int) -> UInt8[Tensor, "*rows count"]:
    """The first `count` codes of each row, counted from 0.

    Raises:
        ValueError: when a row holds fewer.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    if count * bits > packed.shape[-1] * 8:
        raise ValueError(f"{count} codes of {bits} bits need {count * bits} bits; got {packed.shape[-1] * 8}")
    stream = (packed[..., None].int() >> torch.arange(8, device=packed.device) & 1).flatten(-2)
    codes = stream[..., : count * bits].unflatten(-1, (count, bits)) << torch.arange(bits, device=packed.device)
    return codes.sum(dim=-1).to(torch.uint8)


def bits_per_weight(shape: tuple[int, int], scheme: Scheme, *, zero_bits: int | None = None) -> float:
    """What a weight of (out_features, in_features) takes: packed codes, scales, and zero points where there are any.

    Codes are packed row by row into whole bytes; a zero point has as many bits as a code, or `zero_bits` where it is
    a real number, as HQQ's.

    >>> bits_per_weight((256, 256), Scheme(bits=4, granularity="group", group_size=64, scale_dtype=torch.float16))
    4.25

    Raises:
        ValueError: for zero_bits with a symmetric scheme, which has no zero points.
    """
    if scheme.symmetric and zero_bits is not None:
        raise ValueError(f"a symmetric scheme has no zero points; got zero_bits={zero_bits}")
    rows, columns = shape
    parts = {"tensor": 1, "group": rows * (columns // (scheme.group_size or 1))}.get(scheme.granularity, rows)
    each_part = torch.finfo(scheme.scale_dtype).bits + (0 if scheme.symmetric else zero_bits or scheme.bits)
    return (rows * 8 * math.ceil(columns * scheme.bits / 8) + parts * each_part) / (rows * columns)
