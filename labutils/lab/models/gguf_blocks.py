"""Tensors as the blocks of a GGUF file: floats, or 32 weights behind a scale in float16.

Source: https://github.com/ggml-org/ggml, ggml-quants.c.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8

from labutils.quantization.packed import PackedWeight

BLOCK = 32


class Format(NamedTuple):
    """How matrices are stored: ggml's tensor type, llama.cpp's file type, bytes of a row's 32 weights, encoder.

    A block's scale is its largest weight over `levels`, in float16; None where there is no scale.
    """

    tensor_type: int
    file_type: int
    block_bytes: int
    encode: Callable[[np.ndarray], np.ndarray]
    levels: int | None = None


def encode_f32(weight: Float[np.ndarray, "*shape bytes"]) -> UInt8[np.ndarray, "*shape four_bytes"]:
    """Returns the weights' own bytes."""
    return np.ascontiguousarray(weight, dtype="<f4").view(np.uint8)


def encode_q8_0(weight: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows bytes"]:
    """Blocks of 32: a float16 scale and 32 int8, w ≈ scale · q.

    scale = max|w| / 127, q = round(w / scale), halves away from zero. 34 bytes for 32 weights: 8.5 bits each.

    >>> block = encode_q8_0(np.array([[127.0, -63.5] + [0.0] * 30], dtype=np.float32))
    >>> block[0, :2].view("<f2").item(), block[0, 2:4].view(np.int8).tolist()
    (1.0, [127, -64])
    """
    blocks = _blocks(weight)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _join(weight, scale.astype("<f2").view(np.uint8), q.view(np.uint8))


def encode_q4_0(weight: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows bytes"]:
    """Blocks of 32: a float16 scale and 32 four-bit q in 0 … 15, w ≈ scale · (q − 8).

    The weight of largest magnitude, sign kept, becomes −8: scale = w_max / −8, q = min(15, ⌊w / scale + 8.5⌋). Byte j
    holds weight j in its low half and weight j + 16 in its high half. 18 bytes for 32 weights: 4.5 bits each.

    >>> block = encode_q4_0(np.array([[-8.0, 3.0] + [0.0] * 14 + [7.0] + [0.0] * 15], dtype=np.float32))
    >>> block[0, :2].view("<f2").item(), [hex(byte) for byte in block[0, 2:5]]
    (1.0, ['0xf0', '0x8b', '0x88'])
    """
    blocks = _blocks(weight)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / np.float32(-8)
    q = np.minimum(np.trunc(blocks * _inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return _join(weight, scale.astype("<f2").view(np.uint8), q[..., :16] | (q[..., 16:] << 4))


FORMATS = {
    "F32": Format(tensor_type=0, file_type=0, block_bytes=128, encode=encode_f32),
    "Q8_0": Format(tensor_type=8, file_type=7, block_bytes=34, encode=encode_q8_0, levels=127),
    "Q4_0": Format(tensor_type=2, file_type=2, block_bytes=18, encode=encode_q4_0, levels=8),
}

PACKED = {8: "Q8_0", 4: "Q4_0"}  # the format that holds our symmetric codes in groups of 32


@dataclass(frozen=True)
class PackedRows:
    """A packed weight, its rows in the order in which they are to be written; stands in for a matrix."""

    weight: PackedWeight
    rows: torch.Tensor
    ndim: int = 2

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.rows), self.weight.in_features

    def numel(self) -> int:
        """Number of weights."""
        return len(self.rows) * self.weight.in_features

    @property
    def format(self) -> str:
        """The format with the same values.

        Raises:
            ValueError: where GGUF has none: other groups, zero points, or scales that float16 does not hold.
        """
        w = self.weight
        exact = torch.equal(w.scales, w.scales.half().float())
        if w.group_size != BLOCK or w.zeros is not None or not exact:
            rule = f"GGUF holds symmetric groups of {BLOCK} with scales exact in float16 (pack with half_scales=True)"
            raise ValueError(f"{rule}; got {w}, {'exact' if exact else 'inexact'} scales")
        return PACKED[w.bits]

    def encode(self) -> UInt8[np.ndarray, "rows bytes"]:
        """Our codes and scales as blocks: nothing is rounded again."""
        codes, scales, _ = self.weight.unpack(self.rows)
        codes = codes.numpy().reshape(len(self.rows), -1, BLOCK)
        scale = scales.numpy()[..., None].astype("<f2").view(np.uint8)
        if self.weight.bits == 8:
            return _join(codes, scale, codes.astype(np.int8).view(np.uint8))
        q = (codes + 8).astype(np.uint8)
        return _join(codes, scale, q[..., :16] | (q[..., 16:] << 4))


def format_of(tensor: torch.Tensor | PackedRows, chosen: str) -> Format:
    """The format of a tensor: the chosen one for matrices, F32 for vectors, its own for a packed weight."""
    if isinstance(tensor, PackedRows):
        return FORMATS[tensor.format]
    return FORMATS[chosen if tensor.ndim == 2 else "F32"]


def encoded(name: str, tensor: torch.Tensor | PackedRows, chosen: str) -> UInt8[np.ndarray, "..."]:
    """The tensor's bytes.

    Raises:
        ValueError: naming a tensor with numbers that the format cannot hold.
    """
    if isinstance(tensor, PackedRows):
        return tensor.encode()
    stored, array = format_of(tensor, chosen), _array(tensor)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; got inf or nan")
    peak = np.abs(array).max(initial=0)
    with np.errstate(over="ignore"):
        scale = np.float16(peak / np.float32(stored.levels or 1))
    if stored.levels is not None and (np.isinf(scale) or (peak > 0 and scale == 0)):
        rule = f"{name} must have scales (largest weight / {stored.levels}) that float16 holds in {chosen}"
        raise ValueError(f"{rule}; got a largest weight of {peak:.3g}")
    return stored.encode(array)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _blocks(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float32).reshape(len(weight), -1, BLOCK)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _join(weight: np.ndarray, scales: np.ndarray, quants: np.ndarray) -> np.ndarray:
    return np.concatenate([scales, quants], axis=-1).reshape(len(weight), -1)
