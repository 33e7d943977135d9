"""Linear layers for a GPU whose weights are read in 8 or 4 bits, or in fp8; and layers fused into one.

Each computes the same sums as `dequantize()` followed by a plain product. With one row of inputs on a GPU the Triton
kernels do it, under `torch.compile` too: by default, Inductor hands a product to a library, which wants its weights in
16 bits, and so writes and reads a whole copy of them for each token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int, Int8
from torch import Tensor, nn
from torch.nn.functional import linear

from labutils.acceleration.interpreter import missing_triton
from labutils.acceleration.triton_ops import int4_gemv_operator, int8_gemv_operator

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read the same input


def takes_kernel(x: Tensor, *, has_triton: bool) -> bool:
    """Whether a GEMV kernel runs: one row, on a GPU, with Triton (asked once a layer, not inside a compiled step)."""
    return has_triton and x.is_cuda and x.numel() == x.shape[-1]


class Int8Linear(nn.Module):
    """y = (x q^T) s + b: int8 codes, one scale a row. The scale leaves the sum, so only bytes are read."""

    def __init__(self, codes: Int8[Tensor, "out n"], scales: Float[Tensor, " out"], bias: Tensor | None) -> None:
        super().__init__()
        self.has_triton = not missing_triton()
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales.float())
        self.register_buffer("bias", bias)

    def dequantize(self) -> Float32[Tensor, "out n"]:
        """The weight that it stands for."""
        return self.codes.float() * self.scales[:, None]

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        """One row through the kernel, more through the formula."""
        if takes_kernel(x, has_triton=self.has_triton):
            y = int8_gemv_operator(self.codes, self.scales, x.flatten()).to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int4Linear(nn.Module):
    """y_r = sum_k s_rg(k) (q_rk − 8) x_k + b: two codes a byte, one scale a group."""

    def __init__(self, codes: Int[Tensor, "out n"], scales: Float[Tensor, "out groups"], bias: Tensor | None) -> None:
        super().__init__()
        if codes.numel() and not -8 <= codes.min() <= codes.max() <= 7:
            raise ValueError(f"codes of 4 bits lie in -8 … 7; got {codes.min()} … {codes.max()}")
        self.has_triton = not missing_triton()
        unsigned = (codes.int() + 8).to(torch.uint8)
        self.register_buffer("codes", (unsigned[:, ::2] | unsigned[:, 1::2] << 4).contiguous())
        self.register_buffer("scales", scales.float().contiguous())
        self.register_buffer("bias", bias)

    def dequantize(self) -> Float32[Tensor, "out n"]:
        """The weight that it stands for."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1).float() - 8
        return (codes.unflatten(1, (self.scales.shape[1], -1)) * self.scales[:, :, None]).flatten(1)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        """One row through the kernel, more through the dequantized weight."""
        if takes_kernel(x, has_triton=self.has_triton):
            y = int4_gemv_operator(self.codes, self.scales, x.flatten()).to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = linear(x, self.dequantize().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Fp8Linear(nn.Module):
    """Weights and inputs in fp8 (e4m3), a scale for each row and each token, multiplied by `torch._scaled_mm`.

    On a GPU it needs compute capability 8.9 (Ada) or 9.0 (Hopper). A CPU runs the same call, slowly.
    """

    def __init__(self, weight: Float[Tensor, "out n"], bias: Tensor | None) -> None:
        super().__init__()
        if not fits_fp8(weight):
            raise ValueError(f"torch._scaled_mm takes sizes that are multiples of 16; got {tuple(weight.shape)}")
        if not weight.isfinite().all():
            raise ValueError("a weight must be finite to become fp8; got inf or nan")
        self.register_buffer("scales", fp8_scales(weight))
        self.register_buffer("codes", (weight.float() / self.scales).to(FP8))
        self.register_buffer("bias", bias)

    def dequantize(self) -> Float32[Tensor, "out n"]:
        """The weight that it stands for."""
        return self.codes.float() * self.scales

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        """Rounds each token to fp8, then multiplies."""
        flat = x.flatten(0, -2)
        scales = fp8_scales(flat)
        codes = (flat.float() / scales).to(FP8)
        y = torch._scaled_mm(codes, self.codes.T, scale_a=scales, scale_b=self.scales.T, out_dtype=torch.bfloat16)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def fits_fp8(weight: Float[Tensor, "out n"]) -> bool:
    """Whether `torch._scaled_mm` takes a weight of this shape; other layers stay as they are."""
    return not any(size % 16 for size in weight.shape)


def fits_sparse(weight: Float[Tensor, "out n"]) -> bool:
    """Whether PyTorch stores a 16-bit weight of this shape as 2:4; other layers keep their zeros as numbers.

    >>> fits_sparse(torch.zeros(32, 64)), fits_sparse(torch.zeros(16, 64))
    (True, False)
    """
    return not (weight.shape[0] % 32 or weight.shape[1] % 64)


def fp8_scales(x: Float[Tensor, "rows n"]) -> Float32[Tensor, "rows 1"]:
    """The scales: max |x| / 448 of each row, 448 being the largest e4m3 number.

    >>> fp8_scales(torch.tensor([[-448.0, 1.0], [0.0, 0.0]])).tolist()
    [[1.0], [9.999999960041972e-13]]
    """
    return (x.float().abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=1e-12)


class _First(nn.Module):
    """Computes a fused layer and hands out the first part; the others fetch theirs from it, once each.

    A part that is fetched is let go. So a layer keeps no activations when it is done, and a compiler finds nothing that
    outlives the step, which it would have to write to memory.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        first = layers[0]
        self.sizes = [layer.out_features for layer in layers]
        has_bias = first.bias is not None
        self.fused = nn.Linear(first.in_features, sum(self.sizes), bias=has_bias, dtype=first.weight.dtype)
        self.fused.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        if has_bias:
            self.fused.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
        self.parts: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.parts = dict(enumerate(self.fused(x).split(self.sizes, dim=-1)))
        return self.parts.pop(0)


class _Other(nn.Module):
    def __init__(self, first: _First, index: int) -> None:
        super().__init__()
        self.source = [first]  # in a list: it is no submodule, its weight is counted where it lies
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.source[0].parts.pop(self.index)


def fuse_(model: nn.Module) -> nn.Module:
    """Makes one product of q, k, v and one of gate and up, in place, in every layer that has them.

    Fewer and larger products: 7 become 4 a layer. It relies on the order in which a layer asks: q before k and v, gate
    before up, as Llama and Qwen2 do.

    Raises:
        ValueError: when the model has no such layers.
    """
    found = 0
    for module in list(model.modules()):
        for names in TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                first = _First(layers)
                setattr(module, names[0], first)
                for index, name in enumerate(names[1:], start=1):
                    setattr(module, name, _Other(first, index))
                found += 1
    if not found:
        raise ValueError("a model to fuse must have q_proj, k_proj, v_proj or gate_proj, up_proj; got none")
    return model
