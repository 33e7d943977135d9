"""Linear layers on packed weights: 8 or 4 bits a weight in memory, multiplied as they lie by the C kernels.

    y = Σ_b (S·s_b) · (Σ_k q·p − Z·Σ_k p),    x ≈ s_b · p

q are the weight's codes with scale S and zero point Z; p are the input's codes, rounded to int8 as they arrive, one
scale s_b = max|x| / 127 for a token's every 64 inputs (32 where the weight's groups are no multiple of 64). The sums
over k are of integers, hence exact; the sum over blocks b runs in their order. So C and PyTorch, one token and many,
one thread and more all give the same bits.

Rounding an input moves it by at most s_b / 2, so |y − y_exact| ≤ ½ Σ_b s_b Σ_k |ŵ_k|; on Gaussian inputs it is about
half a percent of the output's norm.

A token with infinity or NaN in it gets NaN in every output.
"""

import ctypes
import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad

from labutils.lab.layers.architecture import require_token_ids
from labutils.lab.layers.linears import Linear, linear_layers, output_head, replace_module_, weight_of
from labutils.quantization.affine import QParams, Scheme, choose_qparams, quantize
from labutils.quantization.packed_ops import CHUNK, MAX_BLOCK, ROWS, packed_linear, unpack_codes

SMALLEST_HALF = 2.0**-24  # the smallest number that float16 holds
PIECE = 16 * ROWS  # rows that are packed at once: a large matrix has no second copy meanwhile


def pack_codes(codes: UInt8[Tensor, "out n"], *, bits: int) -> UInt8[Tensor, " bytes"]:
    """Lays out unsigned codes as kernels.c reads them; both sizes must be padded already.

    Eight rows travel together, and of each row 4 neighbouring codes: [row 0: k 0 1 2 3][row 1: k 0 1 2 3] … With 4 bits
    a byte holds input k in its low and k + 16 in its high half.

    >>> pack_codes(torch.arange(32).expand(8, 32).to(torch.uint8) % 16, bits=4)[:5].tolist()
    [0, 17, 34, 51, 0]
    """
    tiles = codes.reshape(-1, ROWS, codes.shape[1] // CHUNK, CHUNK // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        tiles = tiles[:, :, :4] | (tiles[:, :, 4:] << 4)
    return tiles.flatten()


class PackedWeight(nn.Module):
    """A weight (out_features, in_features) in 8 or 4 bits, with its scales; what layers share when they are tied.

    Attributes:
        codes: the packed codes, as bytes.
        scales: float32, (tiles, groups, 8).
        zeros: float32 of the same shape, or None: 128 or 8, the middle of the unsigned codes.
    """

    zeros: Tensor | None

    def __init__(
        self, *, in_features: int, out_features: int, bits: int, group_size: int | None = None, with_zeros: bool = False
    ) -> None:
        super().__init__()
        check_layout(bits=bits, group_size=group_size, in_features=in_features)
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.block = CHUNK if group_size is not None and group_size % MAX_BLOCK else MAX_BLOCK
        self.padded = in_features + -in_features % self.block
        self.group = group_size or self.padded
        tiles = math.ceil(out_features / ROWS)
        shape = (tiles, self.padded // self.group, ROWS)
        self.register_buffer("codes", torch.zeros(tiles * ROWS * self.padded * bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(shape))
        self.register_buffer("zeros", torch.zeros(shape) if with_zeros else None)

    @classmethod
    def from_codes(cls, codes: Int8[Tensor, "out n"], qparams: QParams) -> "PackedWeight":
        """Packs what `quantize` returns, or what any other method ends in: codes, scales and zero points.

        Codes that fit −8 … 7 take 4 bits, others 8.

        Raises:
            ValueError: for a group that is no multiple of 32, parameters of another shape, scales that are not finite,
                or codes outside qmin … qmax.
        """
        out, n = codes.shape
        bits = 4 if qparams.qmin >= -8 and qparams.qmax <= 7 else 8
        if codes.numel() and not qparams.qmin <= codes.min() <= codes.max() <= qparams.qmax:
            raise ValueError(f"codes must lie in {qparams.qmin} … {qparams.qmax}; got {codes.min()} … {codes.max()}")
        with_zeros = bool((qparams.zero_point != 0).any())
        made = cls(in_features=n, out_features=out, bits=bits, group_size=qparams.group_size, with_zeros=with_zeros).to(
            codes.device
        )
        middle = 2 ** (bits - 1)
        for rows, place in zip(codes.split(PIECE), made.codes.split(PIECE * made.padded * bits // 8), strict=True):
            unsigned = pad(rows.to(torch.int16) + middle, (0, made.padded - n, 0, -len(rows) % ROWS)).to(torch.uint8)
            place.copy_(pack_codes(unsigned, bits=bits))
        made.scales.copy_(made._tiles(qparams.scale.float()))
        if not made.scales.isfinite().all():
            raise ValueError("scales must be finite; got inf or nan")
        if with_zeros:
            made.zeros.copy_(made._tiles(qparams.zero_point.float() + middle))
        return_freed_memory()  # of what rounding took for a moment, and of floats that were packed before
        return made

    @classmethod
    def from_float(cls, weight: Float[Tensor, "out n"], scheme: Scheme, *, half_scales: bool = False) -> "PackedWeight":
        """Rounds to nearest, then packs; with `half_scales` on scales that float16 holds, as GGUF stores them."""
        qparams = choose_qparams(weight, scheme)
        if half_scales:
            half = qparams.scale.half().clamp(min=SMALLEST_HALF)
            qparams = replace(qparams, scale=half.float())
        return cls.from_codes(quantize(weight, qparams), qparams)

    def unpack(self, rows: Int[Tensor, " rows"] | None = None) -> tuple[Int[Tensor, "rows n"], Tensor, Tensor]:
        """Signed codes (rows, in_features) of some rows or all, with scales and zero points (rows, groups)."""
        rows = torch.arange(self.out_features, device=self.codes.device) if rows is None else rows
        middle, tile, lane = 2 ** (self.bits - 1), rows // ROWS, rows % ROWS
        packed = self.tiles()[tile, :, :, lane][:, :, :, None]  # each row a tile of one
        codes = unpack_codes(packed, bits=self.bits)[:, : self.in_features].int() - middle
        scales = self.scales[tile, :, lane]
        return codes, scales, torch.zeros_like(scales) if self.zeros is None else self.zeros[tile, :, lane] - middle

    def dequantize(self, rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "rows n"]:
        """S · (q − Z) of some rows or all: for an embedding's few rows, for tests and for export."""
        codes, scales, zeros = self.unpack(rows)
        of_input = torch.arange(self.in_features, device=codes.device) // self.group
        return scales[:, of_input] * (codes - zeros[:, of_input])

    def tiles(self) -> UInt8[Tensor, "tiles chunks vectors 8 4"]:
        """The codes' bytes as they are ordered."""
        return self.codes.view(-1, self.padded // CHUNK, self.bits, ROWS, 4)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales and zero points."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _tiles(self, parameter: Tensor) -> Float[Tensor, "tiles groups 8"]:
        groups = self.scales.shape[1]
        by_group = parameter.squeeze(-1) if self.group_size is not None else parameter
        by_row = by_group.expand(self.out_features, groups)
        return pad(by_row, (0, 0, 0, -self.out_features % ROWS)).view(-1, ROWS, groups).mT

    def extra_repr(self) -> str:
        """Sizes and scheme, for `print(model)`."""
        group = "row" if self.group_size is None else self.group_size
        return f"{self.in_features} to {self.out_features}, {self.bits} bits, group {group}"


def return_freed_memory() -> None:
    """Makes the C library return to the system what was freed; glibc keeps pieces below 32 MiB for later.

    That costs a tenth of a millisecond, and some more where there is much to return.
    """
    getattr(ctypes.pythonapi, "malloc_trim", int)(0)  # where there is no such function, nothing is done


def check_layout(*, bits: int, group_size: int | None, in_features: int) -> None:
    """Refuses what the kernels cannot read.

    Raises:
        ValueError: for other bits, an empty row, or a group that is no multiple of 32 or does not divide the row.
    """
    if bits not in (4, 8):
        raise ValueError(f"packed weights take 4 or 8 bits; got {bits}")
    if in_features < 1:
        raise ValueError(f"in_features must be at least 1; got {in_features}")
    if group_size is not None and (group_size < 1 or group_size % CHUNK or in_features % group_size):
        rule = f"group_size must be a multiple of {CHUNK} that divides in_features={in_features}"
        raise ValueError(f"{rule}; got {group_size}")


class PackedLinear(nn.Module):
    """y = x W^T + b on a packed weight, in place of `nn.Linear` or GPT-2's `Conv1D`; float32 inside."""

    def __init__(self, weight: PackedWeight, bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.packed = weight
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def from_layer(cls, layer: Linear, scheme: Scheme, *, half_scales: bool = False) -> "PackedLinear":
        """Rounds a layer's weight to nearest and packs it."""
        return cls(PackedWeight.from_float(weight_of(layer), scheme, half_scales=half_scales), layer.bias)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        """Runs the C kernels on a CPU, PyTorch's operators elsewhere and where there is no compiler.

        Raises:
            ValueError: for inputs of another width.
        """
        w = self.packed
        if x.shape[-1] != w.in_features:
            raise ValueError(f"inputs must have in_features={w.in_features}; got shape {tuple(x.shape)}")
        y = packed_linear(
            x.float(), w.codes, w.scales, w.zeros, self.bias, w.out_features, w.bits, w.padded, w.group, w.block
        )
        return y.to(x.dtype)


class PackedEmbedding(nn.Module):
    """An embedding table that stays packed: only the rows asked for are dequantized."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, token_ids: Int[Tensor, "..."]) -> Float[Tensor, "... n"]:
        """Returns the tokens' rows.

        Raises:
            IndexError: on a CPU, for an id that is no row's, as `nn.Embedding` does; compiled code does not look.
        """
        ids = token_ids.flatten()
        if ids.is_cpu and not torch.compiler.is_compiling():
            require_token_ids(ids.tolist(), self.packed.out_features)  # behind them, zeros may fill the last tile
        return self.packed.dequantize(ids).view(*token_ids.shape, self.packed.in_features)


def pack_model_(model: nn.Module, scheme: Scheme, *, half_scales: bool = False) -> nn.Module:
    """Replaces every linear layer of a Hugging Face model, the head included, by a packed one, rounded to nearest.

    A head that shares its weight with the embedding goes on sharing it, packed. An embedding of its own stays as it
    is: a step reads one row of it.

    Raises:
        ValueError: naming the layer that the scheme does not fit.
    """
    layers = dict(linear_layers(model, with_head=True))
    for layer in layers.values():
        check_replaceable(model, layer)
    packed = {}
    for name, layer in layers.items():
        try:
            packed[name] = PackedLinear.from_layer(layer, scheme, half_scales=half_scales)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, layer in packed.items():
        replace_packed_(model, name, layer)
    return model


def check_replaceable(model: nn.Module, layer: Linear) -> nn.Embedding | None:
    """The embedding that shares a head's weight and must be replaced with it, None for any other layer.

    Raises:
        ValueError: where that embedding does more than look rows up.
    """
    embedding = model.get_input_embeddings() if layer is output_head(model) else None
    if embedding is None or embedding.weight is not layer.weight:
        return None
    if type(embedding) is not nn.Embedding:
        raise ValueError(f"a tied embedding must be a plain nn.Embedding; got {type(embedding).__name__}")
    return embedding


def replace_packed_(model: nn.Module, name: str, packed: PackedLinear) -> None:
    """Puts a packed layer in the place of the one called `name`, and of the embedding that shares its weight."""
    embedding = check_replaceable(model, model.get_submodule(name))
    if embedding is not None:
        where = next(n for n, module in model.named_modules() if module is embedding)
        replace_module_(model, where, PackedEmbedding(packed.packed))
    replace_module_(model, name, packed)
