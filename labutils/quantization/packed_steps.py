"""One token through packed layers without PyTorch between them: fused matrices and C steps, for `FastLlama`.

An operator of PyTorch costs ten microseconds before it computes; a decoding step has a dozen a layer. Here NumPy arrays
go to the C kernels by address.
"""

import ctypes
import mmap

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from labutils.quantization.kernels import Weight, call_packed_linear
from labutils.quantization.packed import ROWS, PackedLinear, PackedWeight

HUGE_PAGE_BYTES = 2**21


class Arena:
    """One piece of memory for many arrays, in huge pages where the system (Linux) has them.

    A CPU looks up where each page of memory lies. Weights are read once a token, front to back: with pages of 2 MiB
    instead of 4 KiB there are 512 times fewer look-ups, and fetching ahead does not stop at every page's end.
    """

    def __init__(self, nbytes: int) -> None:
        memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = torch.frombuffer(memory, dtype=torch.uint8)

    def put(self, tensors: list[Tensor]) -> Tensor:
        """Copies tensors one behind the other along their first axis; returns them as one.

        Raises:
            ValueError: when the arena is full.
        """
        nbytes = sum(t.nbytes for t in tensors)
        if nbytes > len(self.free):
            raise ValueError(f"an arena must have room; got {nbytes} bytes for {len(self.free)}")
        taken, self.free = self.free[:nbytes], self.free[nbytes + -nbytes % 64 :]
        rows = sum(len(t) for t in tensors)
        return torch.cat(tensors, out=taken.view(tensors[0].dtype).view(rows, *tensors[0].shape[1:]))


class FusedPacked:
    """Packed layers that read the same input, as one matrix where their schemes agree.

    Takes the place of `fast_llama.Linear`. The layers' own buffers become views of the fused ones: nothing is doubled.
    """

    def __init__(self, library: ctypes.CDLL, arena: Arena, *layers: PackedLinear) -> None:
        self.library, self.layers = library, layers
        alike = len({_scheme(layer) for layer in layers}) == 1 and all(
            layer.packed.out_features % ROWS == 0 for layer in layers[:-1]
        )
        groups = [layers] if alike else [(layer,) for layer in layers]
        self.parts = [_fuse(arena, group) for group in groups]
        self.widths = [weight.out_features for weight, _ in self.parts]
        self.out = np.empty((1, sum(self.widths)), np.float32)
        first = self.out.ctypes.data
        self.addresses = [first + 4 * sum(self.widths[:i]) for i in range(len(self.widths))]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and biases."""
        biases = sum(layer.bias.nbytes for layer in self.layers if layer.bias is not None)
        return biases + sum(layer.packed.nbytes for layer in self.layers)

    def __call__(self, x: Float[np.ndarray, "tokens n"], matvec: str) -> Float[np.ndarray, "tokens out"]:
        """Returns x W^T + b; one token's result lies in this layer's buffer, which the next call overwrites."""
        if len(x) == 1:
            source = x.ctypes.data
            for (weight, _), address in zip(self.parts, self.addresses, strict=True):
                call_packed_linear(self.library, weight, source, address, 1)
            return self.out
        x = np.ascontiguousarray(x)
        made = [np.empty((len(x), width), np.float32) for width in self.widths]
        for (weight, _), y in zip(self.parts, made, strict=True):
            call_packed_linear(self.library, weight, x.ctypes.data, y.ctypes.data, len(x))
        return made[0] if len(made) == 1 else np.concatenate(made, axis=1)


def arena_bytes(layers: list[PackedLinear]) -> int:
    """What an arena for these layers must hold, each array's rounding up to 64 bytes included."""
    return sum(layer.packed.nbytes + 4 * layer.packed.out_features + 4 * 64 for layer in layers)


class PackedSteps:
    """`rms_norm`, `attend` and `swiglu` of one token in C; those of `many` for several tokens at once."""

    def __init__(self, library: ctypes.CDLL, many: object, *, max_length: int) -> None:
        self.library, self.many = library, many
        self.scores = np.empty(max_length, np.float32)

    def rms_norm(self, x: np.ndarray, gain: np.ndarray, eps: np.float32) -> np.ndarray:
        """Returns x / sqrt(mean(x^2) + eps) * gain."""
        if len(x) > 1:
            return self.many.rms_norm(x, gain, eps)
        y = np.empty_like(x)
        self.library.rms_norm(x.ctypes.data, gain.ctypes.data, y.ctypes.data, x.shape[1], eps)
        return y

    def swiglu(self, gate_up: np.ndarray) -> np.ndarray:
        """Returns silu(gate) * up."""
        if len(gate_up) > 1:
            return self.many.swiglu(gate_up)
        y = np.empty((1, gate_up.shape[1] // 2), np.float32)
        self.library.swiglu(gate_up.ctypes.data, y.ctypes.data, y.shape[1])
        return y

    def attend(
        self, qkv: np.ndarray, keys: np.ndarray, values: np.ndarray, cos: np.ndarray, sin: np.ndarray, start: int
    ) -> np.ndarray:
        """Rotates, stores and attends; overwrites qkv."""
        kv_heads, max_length, dim = keys.shape
        if len(qkv) > 1 or dim % 8:
            return self.many.attend(qkv, keys, values, cos, sin, start)
        heads = qkv.shape[1] // dim - 2 * kv_heads
        out = np.empty((1, heads * dim), np.float32)
        arrays = (qkv, cos, sin, keys, values, out, self.scores)
        self.library.attend(*(a.ctypes.data for a in arrays), heads, kv_heads, dim, max_length, start)
        return out


def _scheme(layer: PackedLinear) -> tuple:
    w = layer.packed
    return w.bits, w.group_size, w.zeros is None, layer.bias is None


def _fuse(arena: Arena, layers: tuple[PackedLinear, ...]) -> tuple[Weight, list[Tensor]]:
    """The layers' arrays as one, what keeps them alive, and the layers' buffers set to views of them."""
    weights = [layer.packed for layer in layers]
    codes, scales, zeros = (_fuse_buffer(arena, weights, name) for name in ("codes", "scales", "zeros"))
    bias = None if layers[0].bias is None else arena.put([layer.bias for layer in layers])
    addresses = [t if t is None else t.data_ptr() for t in (codes, scales, zeros, bias)]
    w, out = weights[0], sum(weight.out_features for weight in weights)
    return Weight(*addresses, w.in_features, out, w.padded, w.group, w.block, w.bits), [codes, scales, zeros, bias]


def _fuse_buffer(arena: Arena, weights: list[PackedWeight], name: str) -> Shaped[Tensor, "..."] | None:
    parts = [getattr(w, name) for w in weights]
    if parts[0] is None:
        return None
    fused = arena.put(parts)
    for weight, view in zip(weights, fused.split([len(part) for part in parts]), strict=True):
        setattr(weight, name, view)
    return fused
