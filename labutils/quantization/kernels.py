"""Loading the C kernels of quantized layers, built by `labutils.lab.layers.compile`."""

import ctypes
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from labutils.lab.layers.compile import KernelError, build_c

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "steps.c", "cache.c", "token.c"))


class Weight(ctypes.Structure):
    """`Weight` of kernels.c: where a packed weight's arrays lie, and its sizes."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")] + [
        (name, ctypes.c_int64) for name in ("in_features", "out_features", "padded", "group", "block", "bits")
    ]


class Layer(ctypes.Structure):
    """`Layer` of steps.c: a decoder layer's gains, its part of the cache, and its matrices."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_gain", "mlp_gain", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales")),
        *((name, Weight) for name in ("qkv", "output", "gate_up", "down")),
    ]


class Shape(ctypes.Structure):
    """`Shape` of steps.c: a decoder's sizes and its scratch memory, each for so many rows."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "heads", "kv_heads", "dim", "max_length", "block")),
        *((name, ctypes.c_void_p) for name in ("narrow", "wide", "inner", "scores")),
        ("eps", ctypes.c_float),
    ]


class Model(ctypes.Structure):
    """`Model` of token.c: everything that a token passes, and room for it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "shape")),
        *((name, Weight) for name in ("embedding", "head")),
        *((name, ctypes.c_void_p) for name in ("final_gain", "cosine", "sine", "hidden", "normed", "logits")),
    ]


class Sampling(ctypes.Structure):
    """`Sampling` of token.c: how a token is drawn, and a number of [0, 1) for each."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("temperature", "top_p")),
        *(("top_k", ctypes.c_int64), ("uniforms", ctypes.c_void_p)),
    ]


def float_weight(matrix: Float32[np.ndarray, "out n"], bias: Float32[np.ndarray, " out"] | None = None) -> Weight:
    """A matrix that stays in float32, as the kernels take it; who calls keeps the arrays alive."""
    out, n = matrix.shape
    return Weight(matrix.ctypes.data, None, None, None if bias is None else bias.ctypes.data, n, out, n, n, n, 32)


def read_sources() -> str:
    """The C text of all kernels."""
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


def load_library(path: Path) -> ctypes.CDLL:
    """Loads a build of `read_sources()` and declares its functions."""
    return _declared(ctypes.CDLL(str(path)))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.packed_linear.argtypes = (ctypes.POINTER(Weight), pointer, pointer, count, count)
    library.decode_layers.argtypes = (pointer, ctypes.POINTER(Shape), *[pointer] * 4, *[count] * 2)
    library.head_of.argtypes = (ctypes.POINTER(Model), count, count, pointer, count)
    library.embed.argtypes = (ctypes.POINTER(Model), pointer, count, pointer)
    library.read_tokens.argtypes = (ctypes.POINTER(Model), pointer, count, pointer, count, pointer, count)
    library.decode_tokens.argtypes = (ctypes.POINTER(Model), pointer, count, pointer, pointer, count, pointer, count)
    for name in ("packed_linear", "decode_layers", "head_of", "read_tokens", "decode_tokens"):
        getattr(library, name).restype, getattr(library, name).errcheck = count, _require_memory
    return library


def _require_memory(result: int, function, arguments: tuple) -> int:
    if result < 0:
        raise MemoryError(f"{function.__name__} must have room for the codes of its tokens; got none")
    return result


def instruction_set(library: ctypes.CDLL) -> str:
    """What a build uses: "AVX2", "AVX2 with VNNI", "AVX-512 with VNNI", "NEON with dot products", "plain C"."""
    return ctypes.c_char_p.in_dll(library, "instruction_set").value.decode()


@functools.cache
def find_kernels() -> tuple[ctypes.CDLL | None, str]:
    """The kernels for this machine and "", or None and the sentence that says why there are none.

    Without OpenMP (Apple's compiler has none) they run in one thread.
    """
    try:
        return _declared(build_c(read_sources())), ""
    except KernelError as error:
        return None, str(error)
