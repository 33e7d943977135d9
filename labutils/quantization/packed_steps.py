"""Tokens through a packed or float model without Python between them: fused matrices and C steps, for `FastLlama`.

An operator of PyTorch costs ten microseconds before it computes; a decoding step has a dozen a layer. Here NumPy arrays
go to the C kernels by address, and one token, or the few that speculative decoding checks, go from their ids to logits
in one call; a prompt takes a call for each 64. Greedy decoding stays in C for many tokens.
"""

import ctypes
import mmap
from collections.abc import Collection, Sequence
from itertools import pairwise
from weakref import WeakValueDictionary

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from labutils.lab.layers.architecture import require_token_ids
from labutils.quantization.kernels import Layer, Model, Sampling, Shape, Weight, float_weight
from labutils.quantization.packed import CHUNK, MAX_BLOCK, ROWS, PackedLinear, PackedWeight, return_freed_memory

TOKENS_A_CALL = 64


class Arena:
    """One piece of memory for many arrays, in huge pages where the system (Linux) has them.

    A CPU looks up where each page of memory lies. Weights are read once a token, front to back: with pages of 2 MiB
    instead of 4 KiB there are 512 times fewer look-ups, and fetching ahead does not stop at every page's end.
    Memory is taken where something is put, not before.
    """

    _all: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address, as long as a tensor lies there

    def __init__(self, nbytes: int) -> None:
        huge = hasattr(mmap, "MADV_HUGEPAGE")  # Python's default is memory to share, whose huge pages Linux turns off
        memory = mmap.mmap(-1, max(nbytes, 1), **({"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if huge else {}))
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = torch.frombuffer(memory, dtype=torch.uint8)
        self._all[self.free.data_ptr()] = memory

    def put(self, tensors: list[Tensor]) -> Tensor:
        """Copies tensors one behind the other along their first axis; returns them as one. Raises what `take` raises.

        Those that lie so in an arena already stay there: a model's second decoder shares the matrices of the first.
        """
        return_freed_memory()  # of what was put before, among others
        like = tensors[0].new_empty((sum(len(t) for t in tensors), *tensors[0].shape[1:]), device="meta")
        if tensors[0].untyped_storage().data_ptr() in self._all and all(
            a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(tensors)
        ):
            return tensors[0].as_strided(like.shape, like.stride())
        return torch.cat(tensors, out=self.take(like))

    def take(self, like: Tensor) -> Tensor:
        """Room for a tensor of this shape and type, not yet written to; ValueError when there is none."""
        if like.nbytes > len(self.free):
            raise ValueError(f"an arena must have room; got {like.nbytes} bytes for {len(self.free)}")
        taken, self.free = self.free[: like.nbytes], self.free[like.nbytes + -like.nbytes % 64 :]
        return taken.view(like.dtype).view(like.shape)


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
                self.library.packed_linear(weight, source, address, 1, torch.get_num_threads())
            return self.out
        x = np.ascontiguousarray(x)
        made = [np.empty((len(x), width), np.float32) for width in self.widths]
        for (weight, _), y in zip(self.parts, made, strict=True):
            self.library.packed_linear(weight, x.ctypes.data, y.ctypes.data, len(x), torch.get_num_threads())
        return made[0] if len(made) == 1 else np.concatenate(made, axis=1)


def arena_bytes(layers: list[PackedLinear]) -> int:
    """What an arena for these layers must hold, each array's rounding up to 64 bytes included."""
    return sum(layer.packed.nbytes + 4 * layer.packed.out_features + 4 * 64 for layer in layers)


class FewTokens:
    """A `FastLlama` in C: one call for each `TOKENS_A_CALL` tokens.

    Args:
        library: the kernels.
        decoder: a `FastLlama` whose matrices are `FusedPacked` or `FloatMatrix`.
        int8_cache: keys and values rounded to int8, a scale for each 64 numbers (32 where that does not divide a head),
            in place of the decoder's own, for one stream.

    Raises:
        ValueError: where layers differ in their schemes or heads are no multiple of 8 numbers (int8 cache: 32).
    """

    def __init__(self, library: ctypes.CDLL, decoder: object, *, int8_cache: bool = False) -> None:
        if not self.fits(decoder):
            raise ValueError("steps in C need heads of a multiple of 8 numbers and fused matrices of one scheme each")
        self.library, self.decoder = library, decoder
        self.chunk = min(TOKENS_A_CALL, decoder.max_length)
        self.caches = _rounded_caches(*decoder.keys.shape) if int8_cache else (decoder.keys, decoder.values)
        made = [_layer(layer, [cache[i] for cache in self.caches]) for i, layer in enumerate(decoder.layers)]
        self.layers = (Layer * len(made))(*made)
        first, (_, kv_heads, max_length, dim) = made[0], decoder.keys.shape
        max_length += -max_length % MAX_BLOCK if int8_cache else 0
        heads = first.qkv.out_features // dim - 2 * kv_heads
        sizes = {
            "narrow": first.qkv.in_features,
            "wide": max(first.qkv.out_features, first.gate_up.out_features),
            "inner": max(first.output.in_features, first.down.in_features),
            "scores": 4 * (max_length + -max_length % MAX_BLOCK),
        }
        self.scratch = {name: torch.empty(self.chunk * size) for name, size in sizes.items()}  # aligned to 64 bytes
        self.one_block, self.count = np.zeros(1, np.int64), np.arange(self.chunk)
        self.rows = np.full((self.chunk, 2), self.one_block.ctypes.data, np.int64)  # (block table, position) each
        rooms = (tensor.data_ptr() for tensor in self.scratch.values())
        self.shape = Shape(len(made), heads, kv_heads, dim, max_length, max_length, *rooms, decoder.eps)
        head = embedding = decoder.head.parts[0][0]
        if not decoder.tied:
            self.table = decoder.embedding.weight.detach().float().numpy()  # kept: C knows its address only
            embedding = float_weight(self.table)
        self.vocab = embedding.out_features  # of the input: a trimmed head scores fewer tokens than it may read
        self.tokens, self.logits = np.zeros(self.chunk, np.int64), torch.empty(1, head.out_features)
        self.hidden, self.normed = np.zeros((2, self.chunk, head.in_features), np.float32)
        arrays = (decoder.final_gain, decoder.cos, decoder.sin, self.hidden, self.normed)
        addresses = [ctypes.addressof(self.layers), ctypes.addressof(self.shape), embedding, head]
        self.model = Model(*addresses, *(array.ctypes.data for array in arrays), self.logits.data_ptr())

    @staticmethod
    def fits(decoder: object) -> bool:
        """Whether each layer's fused matrices have one scheme, and heads a multiple of 8 numbers."""
        fused = (m for layer in decoder.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down))
        return decoder.keys.shape[-1] % 8 == 0 and all(len(matrix.parts) == 1 for matrix in fused)

    def read(self, token_ids: list[int], position: int, rows: int) -> tuple[np.ndarray, Float[Tensor, "rows vocab"]]:
        """Takes in tokens at `position` and behind it; returns what the head read for the last `rows`, and its logits.

        A token's bits are the same alone and among others. One row's logits lie in a buffer that the next call
        overwrites.

        Raises:
            IndexError: for an id that is no token's.
            MemoryError: when there is no room for the tokens' codes.
        """
        if len(token_ids) > self.chunk:
            # A full call comes last: only an earlier one may have one row.
            first = len(token_ids) % self.chunk or self.chunk
            ends = range(first, len(token_ids) + 1, self.chunk)
            made = []
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                its_rows = min(max(rows - (len(token_ids) - end), 0), end - start)
                made.append(self.read(token_ids[start:end], position + start, its_rows))
            return np.concatenate([hidden for hidden, _ in made]), torch.cat([logits for _, logits in made])
        require_token_ids(token_ids, self.vocab)
        self.tokens[: len(token_ids)] = token_ids
        self._place(len(token_ids), position)
        logits = self.logits if rows == 1 else torch.empty(rows, self.logits.shape[1])
        addresses = self.tokens.ctypes.data, len(token_ids), self.rows.ctypes.data, rows, logits.data_ptr()
        self.library.read_tokens(self.model, *addresses, torch.get_num_threads())
        return self.normed[:rows].copy(), logits

    def decode(
        self, token: int, position: int, count: int, stop: Collection[int], sampler: object | None = None
    ) -> tuple[np.ndarray, list[int]]:
        """Feeds `token`, the token chosen after it, and so on, until there are `count` of these or one is in `stop`.

        Without a `Sampler` the likeliest is chosen. Returns what the head read last, and the tokens: those of `read`
        and an argmax, or the sampler, one by one (but for a number that falls on the border of two tokens).

        Raises:
            IndexError: for an id that is no token's.
            MemoryError: when there is no room for the tokens' codes.
            ValueError: for a sampler's impossible settings, or where logits are not finite.
        """
        require_token_ids([token], self.vocab)
        tokens, stops = np.full(count + 1, token), np.array(list(stop), np.int64)
        self._place(1, position)
        addresses = tokens.ctypes.data, count, self.rows.ctypes.data, stops.ctypes.data
        sampling = sampler and self._sampling(sampler, count)
        pointer = sampling and ctypes.addressof(sampling[0])
        made = self.library.decode_tokens(self.model, *addresses, len(stops), pointer, torch.get_num_threads())
        if tokens[made] < 0:
            raise ValueError("a token is drawn from finite logits; got NaN or infinity among them")
        return self.normed[:1].copy(), tokens[1 : made + 1].tolist()

    def embed(self, token_ids: Sequence[int]) -> Float[np.ndarray, "tokens width"]:
        """The embedding's rows of any number of tokens.

        Raises:
            IndexError: for an id that is no token's.
        """
        require_token_ids(token_ids, self.vocab)
        tokens, hidden = np.array(token_ids, np.int64), np.empty((len(token_ids), self.hidden.shape[1]), np.float32)
        self.library.embed(self.model, tokens.ctypes.data, len(tokens), hidden.ctypes.data)
        return hidden

    def head(self, hidden: Float[np.ndarray, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """The last norm and the head, for any number of tokens.

        Raises:
            MemoryError: when there is no room for the tokens' codes.
        """
        logits = torch.empty(len(hidden), self.logits.shape[1])
        for start in range(0, len(hidden), self.chunk):
            part = hidden[start : start + self.chunk]
            self.hidden[: len(part)] = part
            self.library.head_of(self.model, 0, len(part), logits[start:].data_ptr(), torch.get_num_threads())
        return logits

    def paged(
        self,
        hidden: Float[np.ndarray, "tokens width"],
        positions: Int64[np.ndarray, " tokens"],
        tables: Sequence[Int64[np.ndarray, "..."]],
        block_size: int,
    ) -> None:
        """Sends any number of tokens of many sequences through all layers, in place, and into the cache.

        Their cache lies in blocks; each token has its sequence's table. A token's bits are the same alone and among
        others.

        Raises:
            MemoryError: when there is no room for the tokens' codes.
            ValueError: for an int8 cache.
        """
        if len(self.caches) > 2:
            raise ValueError("a cache in blocks must be float32; got int8")
        self.shape.block = block_size
        rows = np.stack([np.array([table.ctypes.data for table in tables], np.int64), positions], axis=1)
        cos, sin = self.decoder.cos[positions], self.decoder.sin[positions]
        for start in range(0, len(hidden), self.chunk):  # a sequence's tokens ascend: earlier ones are stored
            part = slice(start, start + self.chunk)
            self._run(hidden[part], cos[part], sin[part], rows[part])

    def _sampling(self, sampler: object, count: int) -> tuple[Sampling, Tensor]:
        """The sampler for C, and the numbers that it points to."""
        sampler.probs(torch.zeros(1, 1))  # refuses what it cannot do
        uniforms = sampler.uniforms(count).cpu()
        top_k, top_p = sampler.top_k or self.logits.shape[1], sampler.top_p or 1.0
        return Sampling(sampler.temperature, top_p, top_k, uniforms.data_ptr()), uniforms

    def _place(self, count: int, position: int) -> None:
        """One stream: a single block, and tokens side by side."""
        self.shape.block = self.shape.max_length
        np.add(self.count[:count], position, out=self.rows[:count, 1])

    def _run(self, hidden: np.ndarray, cos: np.ndarray, sin: np.ndarray, rows: np.ndarray) -> None:
        addresses = (array.ctypes.data for array in (hidden, cos, sin, rows))
        self.library.decode_layers(self.layers, self.shape, *addresses, len(hidden), torch.get_num_threads())


def _layer(layer: object, caches: list[np.ndarray]) -> Layer:
    arrays = [array.ctypes.data for array in (layer.attention_gain, layer.mlp_gain, *caches)]
    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return Layer(*arrays, *[None] * (6 - len(arrays)), *(matrix.parts[0][0] for matrix in matrices))


def _rounded_caches(layers: int, kv_heads: int, max_length: int, dim: int) -> tuple[np.ndarray, ...]:
    """Codes of keys and of values and their scales, as cache.c lays them out, for whole blocks of positions."""
    if dim % CHUNK:
        raise ValueError(f"an int8 cache needs heads of a multiple of {CHUNK} numbers; got {dim}")
    positions = max_length + -max_length % MAX_BLOCK
    codes = np.zeros((2, layers, kv_heads, positions * dim), np.uint8)
    scales = np.zeros((2, layers, kv_heads, positions * dim // (CHUNK if dim % MAX_BLOCK else MAX_BLOCK)), np.float32)
    return *codes, *scales


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
