"""Quantized models as a whole: fast decoding, and (below) saving and loading."""

from functools import partial

from torch import nn

from labutils.generation.fast_llama import FastLlama
from labutils.generation.llama_steps import Steps
from labutils.quantization.kernels import KernelError, find_kernels
from labutils.quantization.packed import PackedLinear
from labutils.quantization.packed_steps import Arena, FusedPacked, PackedSteps, arena_bytes


def fast_packed_llama(model: nn.Module, *, max_length: int) -> FastLlama:
    """`FastLlama` on a model whose linear layers are packed, all of them: every step of a token in C.

    The model's packed weights move into one piece of memory and are shared, not copied.

    Raises:
        KernelError: without the C kernels; the model's own forward pass still works then.
        ValueError: for an architecture that `FastLlama` does not know.
    """
    library, reason = find_kernels()
    if library is None:
        raise KernelError(reason)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    fuse = partial(FusedPacked, library, Arena(arena_bytes(layers)))
    steps = PackedSteps(library, Steps(), max_length=max_length)
    return FastLlama(model, max_length=max_length, matvec="numpy", fuse=fuse, steps=steps)
