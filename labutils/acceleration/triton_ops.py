"""The Triton kernels as functions of tensors: compiled for a CUDA tensor, interpreted for one on the CPU.

Grids and block sizes are chosen here. What ran on a CPU was Triton's interpreter: it shows that a kernel is right, and
says nothing about its speed. Nothing here was run on a GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

from labutils.acceleration import kernels
from labutils.acceleration.interpreter import interpret, missing_triton

# 4 rows of 512 int8 codes, or of 1024 int4 codes, are 16 bytes for each of a program's 128 threads: the widest load.
GEMV_ROWS, INT8_BLOCK, INT4_BLOCK, ATTENTION_BLOCK = 4, 512, 1024, 32


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: a block's size.

    >>> next_power_of_two(5), next_power_of_two(8)
    (8, 8)
    """
    return 1 << (n - 1).bit_length()


def launch(kernel: Callable, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Runs a kernel on the device of its tensors.

    Raises:
        ModuleNotFoundError: without Triton, saying how to install it.
    """
    if any(isinstance(a, Tensor) and a.is_cuda for a in arguments):
        compiled(kernel)[grid](*arguments, **constants)
    else:
        interpret(kernel, grid, *arguments, **constants)


@functools.cache
def compiled(kernel: Callable):
    """The kernel under `triton.jit`, `tl` among its globals; compiled at the first launch on a GPU (never run)."""
    if reason := missing_triton():
        raise ModuleNotFoundError(reason)
    import triton
    from triton import language

    kernel = inspect.unwrap(kernel)
    kernel.__globals__["tl"] = language
    return triton.jit(kernel)


def machine_code(kernel: Callable, signature: dict[str, str], constants: dict, *, capability: int) -> str:
    """Compiles a kernel for a GPU that need not be there, to the end, and returns its PTX assembly.

    Args:
        kernel: one of `kernels`.
        signature: Triton's types of the arguments, such as {"x": "*fp16", "n": "i32"}.
        constants: those annotated `tl.constexpr`.
        capability: 75 (T4), 80 (A100), 89 (L4), 90 (H100, H200).

    Pointers and whole numbers are taken for multiples of 16, as a launch finds out by looking: wide loads depend on it.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    types = signature | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, kind in enumerate(signature.values()) if kind[0] in "*iu"]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = triton.compiler.ASTSource(fn=compiled(kernel), signature=types, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


def add(x: Float[Tensor, " n"], y: Float[Tensor, " n"], *, block: int = 1024) -> Float[Tensor, " n"]:
    """Returns x + y."""
    out = torch.empty_like(x)
    launch(kernels.add_kernel, (-(-len(x) // block),), x, y, out, len(x), BLOCK=block)
    return out


def softmax(x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Softmax over the last axis; a whole row must fit into one program."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(kernels.softmax_kernel, (len(x),), x, out, x.shape[1], BLOCK=next_power_of_two(x.shape[1]))
    return out


def rms_norm(x: Float[Tensor, "rows n"], gain: Float[Tensor, " n"], *, eps: float = 1e-6) -> Float[Tensor, "rows n"]:
    """Returns x / sqrt(mean(x^2) + eps) * gain over the last axis."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(kernels.rms_norm_kernel, (len(x),), x, gain, out, x.shape[1], eps, BLOCK=next_power_of_two(x.shape[1]))
    return out


def int8_gemv(
    codes: Int8[Tensor, "rows n"], scales: Float32[Tensor, " rows"], x: Float[Tensor, " n"]
) -> Float32[Tensor, " rows"]:
    """Returns diag(scales) codes x: the weights travel as bytes and become floats inside the kernel."""
    rows, n = codes.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    grid = (-(-rows // GEMV_ROWS),)
    launch(kernels.int8_gemv_kernel, grid, codes, scales, x, out, rows, n, ROWS=GEMV_ROWS, BLOCK=INT8_BLOCK)
    return out


def int4_gemv(
    codes: UInt8[Tensor, "rows half"], scales: Float32[Tensor, "rows groups"], x: Float[Tensor, " n"]
) -> Float32[Tensor, " rows"]:
    """y_r = sum_k s_rg(k) (q_rk - 8) x_k; a byte of `codes` holds inputs 2i (low half) and 2i + 1 (high half).

    Raises:
        ValueError: when the group, n divided by the scales' columns, is no power of two of at least 2.
    """
    rows, n = len(codes), 2 * codes.shape[1]
    group = n // scales.shape[1]
    if group < 2 or group & (group - 1) or group * scales.shape[1] != n:
        raise ValueError(f"a group must be a power of two that divides n={n}; got {scales.shape[1]} groups")
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    grid, blocks = (-(-rows // GEMV_ROWS),), {"GROUP": group, "GROUPS": max(1, INT4_BLOCK // group), "ROWS": GEMV_ROWS}
    launch(kernels.int4_gemv_kernel, grid, codes, scales, x, out, rows, n, **blocks)
    return out


def as_operator(gemv: Callable) -> Callable:
    """A GEMV as one operator of PyTorch: `torch.compile` calls it as it is, and a CUDA graph records its launch."""
    schema = "(Tensor codes, Tensor scales, Tensor x) -> Tensor"
    operator = torch.library.custom_op(f"labutils::{gemv.__name__}", gemv, mutates_args=(), schema=schema)
    operator.register_fake(lambda codes, scales, x: x.new_empty(codes.shape[0], dtype=torch.float32))
    return operator


int8_gemv_operator, int4_gemv_operator = as_operator(int8_gemv), as_operator(int4_gemv)


def flash_attention(
    query: Float[Tensor, "heads positions dim"],
    key: Float[Tensor, "heads positions dim"],
    value: Float[Tensor, "heads positions dim"],
    *,
    causal: bool = True,
) -> Float[Tensor, "heads positions dim"]:
    """softmax(q k^T / sqrt(d)) v, head by head, in memory that grows with the text and not with its square.

    Raises:
        ValueError: when the head size is no power of two of at least 16, which `tl.dot` asks for.
    """
    heads, positions, dim = query.shape
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"head_dim must be a power of two of at least 16; got {dim}")
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    blocks = {"QUERIES": ATTENTION_BLOCK, "KEYS": ATTENTION_BLOCK}
    grid = (-(-positions // ATTENTION_BLOCK), heads)
    arguments = (query, key, value, out, positions, dim**-0.5)
    launch(kernels.flash_attention_kernel, grid, *arguments, CAUSAL=causal, DIM=dim, **blocks)
    return out


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64: a rounding's size, whatever the numbers' scale.

    >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    exact = exact.double()
    return ((actual.double() - exact).norm() / exact.norm()).item()
