"""Zeros that are not stored: 2:4 packed, CSR and bitmap weights, and linear layers that multiply by the first.

2:4 packed, fp32: rows in blocks of 8, columns in spans of 32. Of every 4 columns a row keeps 2 weights, so a span holds
16 a row, each with its place in the four as 2 bits: one 32-bit word a row and span. A weight so costs 32 + 2 bits where
the dense row spends 64: 8.5 of 16 bytes. (In fp16: 36 of 64 bits for four weights.)
CSR: each weight with its 32-bit column, so half of the weights must go before a byte is saved.
Bitmap: one bit for every place, and the kept weights after one another: bytes are saved from 1/32 of zeros on.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.lab.layers.compile import build_c
from labutils.lab.layers.linears import Linear, linear_layers, replace_module_, weight_of

ROWS, COLUMNS = 8, 32
SOURCE = Path(__file__).with_name("sparse_matvec.c")


@dataclass(frozen=True)
class Packed24:
    """A 2:4 sparse matrix: places (blocks, spans, 8), weights (blocks, spans, 16, 8), in the order of reading."""

    places: Int[Tensor, "blocks spans 8"]
    weights: Float[Tensor, "blocks spans 16 8"]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return self.places.nbytes + self.weights.nbytes


def pack_2_4(weight: Float[Tensor, "out n"]) -> Packed24:
    """Packs a matrix with at most 2 nonzero of every 4 neighbours in a row.

    Raises:
        ValueError: when a group of four holds more than 2 nonzeros, or the shape is no multiple of (8, 32).
    """
    rows, columns = weight.shape
    if rows % ROWS or columns % COLUMNS:
        raise ValueError(f"a 2:4 packed weight has a shape of multiples of ({ROWS}, {COLUMNS}); got {rows, columns}")
    fours = weight.float().view(rows, columns // 4, 4)
    if ((fours != 0).sum(dim=-1) > 2).any():
        raise ValueError("a 2:4 weight has at most 2 nonzero of every 4 neighbours; got a group with more")
    places = (fours != 0).int().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(dim=-1).values
    kept = fours.gather(-1, places).view(rows // ROWS, ROWS, columns // COLUMNS, 16).permute(0, 2, 3, 1)
    shifted = places.reshape(rows, columns // COLUMNS, 16) << (2 * torch.arange(16))
    words = shifted.sum(dim=-1).to(torch.uint32).view(torch.int32).view(rows // ROWS, ROWS, -1).permute(0, 2, 1)
    return Packed24(words.contiguous(), kept.contiguous(), (rows, columns))


def unpack_2_4(packed: Packed24) -> Float[Tensor, "out n"]:
    """The dense matrix again."""
    rows, columns = packed.shape
    words = packed.places.permute(0, 2, 1).reshape(rows, -1, 1)
    places = (words >> (2 * torch.arange(16)) & 3).reshape(rows, columns // 4, 2).long()
    kept = packed.weights.permute(0, 3, 1, 2).reshape(rows, columns // 4, 2)
    return kept.new_zeros(rows, columns // 4, 4).scatter_(-1, places, kept).view(rows, columns)


# Lets a sum be reordered into vectors. Never -ffast-math: a library linked with it rounds subnormal numbers to zero
# in the whole process that loads it.
REORDER_SUMS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


@functools.cache
def kernels(flags: tuple[str, ...] = REORDER_SUMS) -> ctypes.CDLL:
    """The compiled C of sparse_matvec.c; sums may be reordered.

    Raises:
        KernelError: when it cannot be built here.
    """
    return build_c(SOURCE.read_text(encoding="utf-8"), flags=flags)


def _call(function: Callable, tensors: Sequence[Tensor], *counts: int) -> None:
    """Calls a kernel with addresses, counts, and as many threads as PyTorch has."""
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function(*addresses, *map(ctypes.c_int64, (*counts, torch.get_num_threads())))


def matvec_2_4(packed: Packed24, x: Float[Tensor, " n"]) -> Float[Tensor, " out"]:
    """W x by the C kernel.

    Raises:
        ValueError: when x is not a contiguous fp32 vector of the right length.
        KernelError: when the kernel cannot be built here.
    """
    rows, columns = packed.shape
    _check_vector(x, columns)
    y = torch.empty(rows)
    _call(kernels().matvec_2_4, (packed.places, packed.weights, x, y), rows // ROWS, columns // COLUMNS)
    return y


@dataclass(frozen=True)
class Csr:
    """Compressed sparse rows: row r owns entries starts[r] … starts[r + 1] − 1 of columns and weights."""

    starts: Int[Tensor, " boundaries"]
    columns: Int[Tensor, " nonzeros"]
    weights: Float[Tensor, " nonzeros"]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return self.starts.nbytes + self.columns.nbytes + self.weights.nbytes


def to_csr(weight: Float[Tensor, "out n"]) -> Csr:
    """Keeps the nonzero weights with their columns, both in 32 bits."""
    rows, columns = weight.nonzero(as_tuple=True)
    return Csr(_row_starts(weight), columns.int(), weight[rows, columns].float(), tuple(weight.shape))


def _row_starts(weight: Float[Tensor, "out n"]) -> Int[Tensor, " boundaries"]:
    """Before which kept weight each row begins, and how many there are."""
    return nn.functional.pad((weight != 0).sum(dim=1).cumsum(0), (1, 0)).int()


def matvec_csr(csr: Csr, x: Float[Tensor, " n"]) -> Float[Tensor, " out"]:
    """W x by the C kernel.

    Raises:
        ValueError: when x is not a contiguous fp32 vector of the right length.
        KernelError: when the kernel cannot be built here.
    """
    _check_vector(x, csr.shape[1])
    y = torch.empty(csr.shape[0])
    _call(kernels().matvec_csr, (csr.starts, csr.columns, csr.weights, x, y), csr.shape[0])
    return y


@dataclass(frozen=True)
class Bitmap:
    """Bit j of a row's word i says whether column 32 i + j is kept; the kept weights follow one another, row by row."""

    starts: Int[Tensor, " boundaries"]
    words: Int[Tensor, "out spans"]
    weights: Float[Tensor, " nonzeros"]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return self.starts.nbytes + self.words.nbytes + self.weights.nbytes


def to_bitmap(weight: Float[Tensor, "out n"]) -> Bitmap:
    """Keeps the nonzero weights, and one bit for every place.

    Raises:
        ValueError: when in_features is no multiple of 32.
    """
    rows, columns = weight.shape
    if columns % COLUMNS:
        raise ValueError(f"a bitmap's in_features is a multiple of {COLUMNS}; got {columns}")
    kept = weight != 0
    bits = (kept.view(rows, -1, COLUMNS).long() << torch.arange(COLUMNS)).sum(dim=-1)
    return Bitmap(_row_starts(weight), bits.to(torch.uint32).view(torch.int32), weight[kept].float(), (rows, columns))


def matvec_bitmap(bitmap: Bitmap, x: Float[Tensor, " n"]) -> Float[Tensor, " out"]:
    """W x by the C kernel.

    Raises:
        ValueError: when x is not a contiguous fp32 vector of the right length.
        KernelError: when the kernel cannot be built here.
    """
    rows, columns = bitmap.shape
    _check_vector(x, columns)
    y = torch.empty(rows)
    _call(kernels().matvec_bitmap, (bitmap.starts, bitmap.words, bitmap.weights, x, y), rows, columns // COLUMNS)
    return y


def _check_vector(x: Tensor, length: int) -> None:
    if x.dtype != torch.float32 or x.shape != (length,) or not x.is_contiguous():
        raise ValueError(f"x must be a contiguous float32 vector of {length}; got {x.dtype} {tuple(x.shape)}")


class Linear24(nn.Module):
    """A linear layer whose weight is stored 2:4: one position goes through the kernel, several through a dense copy."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        packed, self.bias = pack_2_4(weight_of(layer)), layer.bias
        self.shape = packed.shape
        self.register_buffer("places", packed.places)
        self.register_buffer("weights", packed.weights)

    @property
    def packed(self) -> Packed24:
        """The weight as it is stored."""
        return Packed24(self.places, self.weights, self.shape)

    def dequantize(self) -> Float[Tensor, "out n"]:
        """The dense weight, zeros and all."""
        return unpack_2_4(self.packed)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        """As the linear layer it replaces."""
        if x.numel() > x.shape[-1]:
            return nn.functional.linear(x, self.dequantize(), self.bias)
        y = matvec_2_4(self.packed, x.detach().flatten().contiguous()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def pack_linears_(model: nn.Module) -> None:
    """Replaces every linear layer of the body by its 2:4 packed twin; the head stays dense.

    Raises:
        ValueError: when a weight is not 2:4, or a layer is no `nn.Linear`; the model is then as it was.
    """
    layers = dict(linear_layers(model))
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"packing takes nn.Linear; got {type(layer).__name__} in {name}")
    for name, layer in {name: Linear24(layer) for name, layer in layers.items()}.items():
        replace_module_(model, name, layer)
