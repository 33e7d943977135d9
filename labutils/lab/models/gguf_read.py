"""GGUF files read: the metadata, and every tensor as float32.

A block holds neighbouring weights of a row with the scales that they share. `d` and `dmin` are float16, q are codes:

    Q4_0    32 weights in  18 bytes   w = d · (q − 8)                 d may be negative
    Q8_0    32 weights in  34 bytes   w = d · q
    MXFP4   32 weights in  17 bytes   w = 2^(e − 127) · E2M1(q)
    Q4_K   256 weights in 144 bytes   w = d · s · q − dmin · m        6-bit s and m for each 32 weights
    Q6_K   256 weights in 210 bytes   w = d · s · (q − 32)            8-bit s for each 16 weights

Source: https://github.com/ggml-org/ggml, docs/gguf.md and ggml-quants.c (`dequantize_row_*`).
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from labutils.lab.models.gguf import ALIGNMENT, ARRAY, STRING

Blocks = UInt8[np.ndarray, "blocks bytes"]
Numbers = Float32[np.ndarray, "blocks weights"]
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def decode_q4_0(blocks: Blocks) -> Numbers:
    """Byte j holds weight j in its low half and weight j + 16 in its high half.

    >>> block = np.array([[0x00, 0xBC] + [0x8F] * 16], dtype=np.uint8)  # d = −1; codes 15 and 8
    >>> decode_q4_0(block)[0, [0, 16]].tolist()
    [-7.0, -0.0]
    """
    return _half(blocks[:, :2]) * (_halves(blocks[:, 2:]) - 8)


def decode_q8_0(blocks: Blocks) -> Numbers:
    """Signed bytes behind their scale."""
    return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def decode_mxfp4(blocks: Blocks) -> Numbers:
    """A shared power of two, then E2M1 codes in Q4_0's order; the code 255, NaN by the standard, counts as 2^128."""
    exponent = blocks[:, :1].astype(np.int32) - 128
    return np.ldexp(DOUBLED_E2M1[_halves(blocks[:, 1:]).astype(np.intp)], exponent)


def decode_q4_k(blocks: Blocks) -> Numbers:
    """Eight runs of 32 weights; 32 bytes hold two runs, the first in their low halves.

    The 12 bytes of s and m: bytes 0–3 hold the first four s in their low 6 bits, bytes 4–7 the first four m. Bytes 8–11
    hold the lower halves of the others, s low and m high, whose top 2 bits sit above the 6 of bytes 0–7.
    """
    s, m, rest = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([s & 63, rest & 15 | s >> 6 << 4], axis=1)[:, :, None]
    minima = np.concatenate([m & 63, rest >> 4 | m >> 6 << 4], axis=1)[:, :, None]
    q = _halves(blocks[:, 16:].reshape(-1, 32)).reshape(len(blocks), 8, 32)
    d, dmin = _half(blocks[:, :2])[:, :, None], _half(blocks[:, 2:4])[:, :, None]
    return (d * scales.astype(np.float32) * q - dmin * minima.astype(np.float32)).reshape(len(blocks), 256)


def decode_q6_k(blocks: Blocks) -> Numbers:
    """Two halves of 128 weights: four low bits of each in 64 bytes, two high bits of each in 32 bytes, four a byte."""
    low = _halves(blocks[:, :128].reshape(-1, 64)).reshape(len(blocks), 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = (low + 16 * high.astype(np.float32) - 32).reshape(len(blocks), 16, 16)
    scales = _half(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[:, :, None] * q).reshape(len(blocks), 256)


class Blocked(NamedTuple):
    """A tensor type: its name, weights and bytes of a block, and what reads blocks."""

    name: str
    weights: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


TYPES = {
    0: Blocked("F32", 1, 4, lambda blocks: blocks.view("<f4").astype(np.float32)),
    1: Blocked("F16", 1, 2, lambda blocks: _half(blocks)),
    2: Blocked("Q4_0", 32, 18, decode_q4_0),
    8: Blocked("Q8_0", 32, 34, decode_q8_0),
    12: Blocked("Q4_K", 256, 144, decode_q4_k),
    14: Blocked("Q6_K", 256, 210, decode_q6_k),
    39: Blocked("MXFP4", 32, 17, decode_mxfp4),
}


class GgufFile(NamedTuple):
    """What a file holds: metadata by key, tensors by name, and the name of each tensor's type."""

    metadata: dict[str, object]
    tensors: dict[str, np.ndarray]
    types: dict[str, str]


def read_gguf(path: Path) -> GgufFile:
    """Reads a whole file into memory, its tensors dequantized.

    Raises:
        ValueError: for a file that is no little-endian GGUF of version 2 or 3, is cut off, or holds a tensor of a type
            that is not in `TYPES`, naming it.
    """
    cursor = _Cursor(Path(path).read_bytes())
    magic, version = cursor.take("4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"a file must begin with GGUF and version 2 or 3; got {magic!r}, {version}")
    tensors, entries = cursor.take("QQ")
    metadata = {cursor.string(): cursor.value(*cursor.take("I")) for _ in range(entries)}
    index = [(cursor.string(), *cursor.dimensions(), *cursor.take("IQ")) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment must be a whole number from 1; got {alignment!r}")
    start = cursor.at + -cursor.at % alignment
    types = {name: _type_of(name, shape, kind) for name, shape, kind, _ in index}
    read = {}
    for name, shape, _, offset in index:
        blocked = types[name]
        cursor.at = start + offset
        raw = cursor.bytes(math.prod(shape) // blocked.weights * blocked.block_bytes)
        read[name] = blocked.decode(np.frombuffer(raw, np.uint8).reshape(-1, blocked.block_bytes)).reshape(shape)
    return GgufFile(metadata, read, {name: blocked.name for name, blocked in types.items()})


def _type_of(name: str, shape: tuple[int, ...], kind: int) -> Blocked:
    if kind not in TYPES:
        raise ValueError(f"{name} must be of type {', '.join(t.name for t in TYPES.values())}; got number {kind}")
    if shape[-1] % TYPES[kind].weights:
        raise ValueError(
            f"{TYPES[kind].name} takes rows of whole blocks of {TYPES[kind].weights}; {name} has {shape[-1]}"
        )
    return TYPES[kind]


class _Cursor:
    """Little-endian values one behind the other, none of them beyond the end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"a GGUF file must be whole; it ends {count - len(self.data) + self.at} bytes too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def take(self, form: str) -> tuple:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))

    def string(self) -> str:
        return self.bytes(*self.take("Q")).decode()

    def dimensions(self) -> tuple[tuple[int, ...]]:
        """The shape, outermost first; in parentheses of its own, to be unpacked beside others."""
        (count,) = self.take("I")
        if count not in range(1, 5):
            raise ValueError(f"a tensor has 1 to 4 dimensions; got {count}")
        return (tuple(reversed(self.take(f"{count}Q"))),)

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.take("IQ")
            if inner not in SCALARS:
                return [self.value(inner) for _ in range(count)]
            raw = self.bytes(count * struct.calcsize(f"<{SCALARS[inner]}"))
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", raw))
        if kind not in SCALARS:
            raise ValueError(f"a value's type is 0 to 12; got {kind}")
        return self.take(SCALARS[kind])[0]


def _half(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _halves(packed: np.ndarray) -> np.ndarray:
    """The low halves of a row's bytes, then their high halves, as float32."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
