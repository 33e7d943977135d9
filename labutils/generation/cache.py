"""Our own KV caches, accepted by any Hugging Face causal LM that keeps keys and values and no other states.

Attention over a growing text needs the keys and values of every earlier token. They never change, so they are
kept. A model asks its cache three things: how long are you (`get_seq_length`), how long will you be after this
call (`get_mask_sizes`), and please store these and hand me all (`update`, once per layer).

Shapes: keys and values are (batch, kv_heads, positions, head_dim), position on the third axis.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.lab.layers.architecture import layer_caches

Keys = Float[Tensor, "batch kv_heads positions head_dim"]
Values = Float[Tensor, "batch kv_heads positions value_dim"]  # head_dim as well, but for latent attention


@runtime_checkable
class Cache(Protocol):
    """What a model and the decoding verbs need of a cache."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values and returns all of them."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of positions stored."""

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on."""

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions."""


class KVCache:
    """A cache that grows by concatenation: simple, but every step copies all that came before.

    >>> cache = KVCache()
    >>> keys, values = cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer_idx=0)
    >>> keys, values = cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), layer_idx=0)
    >>> tuple(keys.shape), cache.get_seq_length()
    ((1, 2, 4, 4), 4)
    """

    is_compileable = False

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, keys: Keys, values: Values, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values along the position axis and returns all of them."""
        if layer_idx == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[layer_idx] = torch.cat([self.keys[layer_idx], keys], dim=2)
            self.values[layer_idx] = torch.cat([self.values[layer_idx], values], dim=2)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of positions stored for a layer."""
        return self.keys[layer_idx].shape[2] if layer_idx < len(self.keys) else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Returns the position of the next token: where the causal mask starts."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns how many keys the next `update` will hand back, and the position of the first."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on.

        Raises:
            ValueError: If the cache is shorter than `length`, or `length` is negative.
        """
        check_truncation(length, self.get_seq_length())
        self.keys = [keys[:, :, :length] for keys in self.keys]
        self.values = [values[:, :, :length] for values in self.values]

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions, as speculative decoding does with rejected tokens.

        Raises:
            ValueError: If fewer positions are stored, or `count` is negative.
        """
        self.truncate(length_after_rewind(count, self.get_seq_length()))

    @property
    def resident_bytes(self) -> int:
        """Bytes the stored keys and values occupy."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class StaticKVCache:
    """A cache with preallocated buffers: a step writes one position and copies nothing.

    Returns views of the filled part, so attention never sees the empty rest. Layers with a sliding window keep every
    position too; the model's mask hides the old ones.

    Raises:
        ValueError: If a size is below 1, or the model's layers do not all keep keys and values of one size.
    """

    is_compileable = False

    def __init__(
        self, config, *, max_length: int, batch: int = 1, dtype: torch.dtype = torch.float32, device="cpu"
    ) -> None:
        if max_length < 1 or batch < 1:
            raise ValueError(f"max_length and batch must be at least 1; got {max_length} and {batch}")
        layers = layer_caches(config)
        sizes = {(layer.keys, layer.values) for layer in layers}
        if len(sizes) != 1:
            raise ValueError(f"every layer must keep keys and values of one size; got {sorted(sizes)}")
        self.keys, self.values = (  # a tensor for each layer: a compiler would copy all of one that it writes in parts
            [torch.zeros(batch, heads, max_length, dim, dtype=dtype, device=device) for _ in layers]
            for heads, dim in sizes.pop()
        )
        self.max_length = max_length
        self.lengths = [0] * len(layers)

    def update(self, keys: Keys, values: Values, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values in place and returns views of all filled positions.

        Raises:
            ValueError: If the buffers are too short.
        """
        start = self.lengths[layer_idx]
        end = start + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"a static cache holds max_length={self.max_length} positions; got position {end}")
        self.keys[layer_idx][:, :, start:end] = keys
        self.values[layer_idx][:, :, start:end] = values
        self.lengths[layer_idx] = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of positions filled in a layer."""
        return self.lengths[layer_idx]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Returns the position of the next token: where the causal mask starts."""
        return self.lengths[layer_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns how many keys the next `update` will hand back, and the position of the first."""
        return self.lengths[layer_idx] + query_length, 0

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on: only the counters move.

        Raises:
            ValueError: If the cache is shorter than `length`, or `length` is negative.
        """
        check_truncation(length, self.lengths[0])
        self.lengths = [length] * len(self.lengths)

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions, as speculative decoding does with rejected tokens.

        Raises:
            ValueError: If fewer positions are stored, or `count` is negative.
        """
        self.truncate(length_after_rewind(count, int(self.lengths[0])))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the buffers, full or not."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))


class CompiledKVCache(StaticKVCache):
    """A static cache for `torch.compile`: one graph for every position.

    A Python counter would be baked into the graph and recompile it at every token, so the counters are tensors;
    a view's length would change too, so `update` returns the whole buffers and the mask hides the empty rest.
    """

    is_compileable = True

    def __init__(self, config, **settings) -> None:
        super().__init__(config, **settings)
        self.lengths = torch.zeros(len(self.lengths), dtype=torch.long, device=self.keys[0].device)

    def update(self, keys: Keys, values: Values, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes at the positions a tensor names and returns the whole buffers."""
        position = self.lengths[layer_idx] + torch.arange(keys.shape[2], device=keys.device)
        self.keys[layer_idx].index_copy_(2, position, keys)
        self.values[layer_idx].index_copy_(2, position, values)
        self.lengths[layer_idx].add_(keys.shape[2])
        return self.keys[layer_idx], self.values[layer_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the whole buffer's length: empty positions are hidden by the causal mask."""
        return self.max_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """Returns the next position, copied: `update` moves the counter before later layers' masks are used."""
        return self.lengths[layer_idx].clone()

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on.

        Raises:
            ValueError: If the cache is shorter than `length`, or `length` is negative.
        """
        check_truncation(length, int(self.lengths[0]))
        self.restart(length)

    def restart(self, length: int) -> None:
        """Truncates without a check: `truncate` asks the device for its count, and so waits for all queued work."""
        self.lengths.fill_(length)


def check_truncation(length: int, filled: int) -> None:
    """Refuses to roll back to where the cache has never been.

    Raises:
        ValueError: If `length` is outside 0..filled.
    """
    if not 0 <= length <= filled:
        raise ValueError(f"a cache can be truncated to 0..{filled} positions; got {length}")


def length_after_rewind(count: int, filled: int) -> int:
    """What is left of `filled` positions when the last `count` are forgotten.

    >>> length_after_rewind(2, 5)
    3

    Raises:
        ValueError: If `count` is outside 0..filled.
    """
    if not 0 <= count <= filled:
        raise ValueError(f"a cache can be rewound by 0..{filled} positions; got {count}")
    return filled - count
