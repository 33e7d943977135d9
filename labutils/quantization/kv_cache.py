"""A KV cache in few bits: keys by channel, values by token, the recent tokens in full precision.

KIVI (Liu et al. 2024, arXiv:2402.02750). A few channels of the keys are large for every token, so that a scale must not
be shared across channels; values have no such channels, and every token's are used as a whole.

A group's range is its own minimum to its maximum (section 3.1 there): scale = (max − min) / (2^bits − 1), and the
minimum takes the place of the zero point. Zero need not lie in the range: keys with a bias (Qwen2) lie far from it, and
a range stretched to zero would spend its codes on numbers that never occur.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from labutils.quantization.packing import pack, unpack

KeyOrValue = Float[Tensor, "batch kv_heads positions head_dim"]
Axis = Literal["channel", "token"]


class PackedBlock:
    """Keys or values of some positions: packed codes, a scale and a minimum in float16 for each group.

    Along "channel", a group is `group_size` positions of one channel; along "token", as many channels of one position.

    >>> x = torch.tensor([5.0, 6.0, 7.0, 8.0]).view(1, 1, 1, 4)
    >>> PackedBlock(x, bits=2, group_size=4, along="token").unpack().flatten().tolist()
    [5.0, 6.0, 7.0, 8.0]

    Raises:
        ValueError: when group_size does not divide the axis, bits are not 2 to 8, or float16 cannot hold the range.
    """

    def __init__(self, x: KeyOrValue, *, bits: int, group_size: int, along: Axis) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"a packed cache takes 2 to 8 bits; got {bits}")
        self.dtype, self.along, self.positions, self.bits = x.dtype, along, x.shape[2], bits
        x = x.transpose(-1, -2) if along == "channel" else x
        self.count = x.shape[-1]
        if group_size < 1 or self.count % group_size:
            raise ValueError(f"group_size must divide the {self.count} numbers along the {along}; got {group_size}")
        groups = x.float().unflatten(-1, (-1, group_size))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        self.minimum = half_below(low)
        self.scale = ((high - self.minimum.float()) / (2**bits - 1)).half()
        if not (self.minimum.isfinite() & self.scale.isfinite()).all():
            raise ValueError(f"keys and values must lie in float16's range; got {low.min()} to {high.max()}")
        steps = torch.where(self.scale > 0, self.scale.float(), 1.0)
        codes = ((groups - self.minimum.float()) / steps).round().clamp(0, 2**bits - 1)
        self.packed = pack(codes.flatten(-2).int(), bits)

    def unpack(self) -> KeyOrValue:
        """The numbers that the codes stand for: minimum + code · scale."""
        codes = unpack(self.packed, self.bits, self.count).unflatten(-1, (self.scale.shape[-2], -1))
        x = (codes * self.scale.float() + self.minimum.float()).flatten(-2).to(self.dtype)
        return x.transpose(-1, -2) if self.along == "channel" else x

    @property
    def resident_bytes(self) -> int:
        """Codes, scales and minima."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scale, self.minimum))


def half_below(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The largest float16 that is not above x: a minimum rounded up would cut the numbers below it off.

    >>> half_below(torch.tensor([600.3, 2.0])).tolist()
    [600.0, 2.0]
    """
    rounded = x.half()
    return torch.where(rounded.float() > x, torch.nextafter(rounded, rounded.new_tensor(-torch.inf)), rounded)


class QuantizedLayer(DynamicLayer):
    """One layer's cache: packed blocks of old positions, then `keys` and `values` of the recent ones in full."""

    is_croppable = False

    def __init__(self, *, bits: int, group_size: int, recent: int, keys_along: Axis, values_along: Axis) -> None:
        super().__init__()
        self.bits, self.group_size, self.recent = bits, group_size, recent
        self.along = (keys_along, values_along)
        self.blocks: tuple[list[PackedBlock], list[PackedBlock]] = ([], [])

    def update(self, key_states: KeyOrValue, value_states: KeyOrValue, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores new positions and returns all of them; what leaves the recent window is rounded after this call."""
        super().update(key_states, value_states)
        everything = tuple(
            torch.cat([*(block.unpack() for block in blocks), recent], dim=2)
            for blocks, recent in zip(self.blocks, (self.keys, self.values), strict=True)
        )
        old = max(self.keys.shape[2] - self.recent, 0) // self.group_size * self.group_size
        if old:
            for blocks, x, along in zip(self.blocks, (self.keys, self.values), self.along, strict=True):
                blocks.append(PackedBlock(x[:, :, :old], bits=self.bits, group_size=self.group_size, along=along))
            self.keys, self.values = self.keys[:, :, old:].clone(), self.values[:, :, old:].clone()
        return everything

    def get_seq_length(self) -> int:
        """Positions stored, packed or not."""
        recent = self.keys.shape[2] if self.is_initialized else 0
        return recent + sum(block.positions for block in self.blocks[1])

    @property
    def resident_bytes(self) -> int:
        """Bytes of the packed blocks and the recent window."""
        recent = sum(t.numel() * t.element_size() for t in (self.keys, self.values))
        return recent + sum(block.resident_bytes for blocks in self.blocks for block in blocks)

    def _refuse(self, *args, **kwargs) -> None:
        raise ValueError("packed positions can neither be cut off nor reordered: use another cache for that")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


class QuantizedKVCache(Cache):
    """A cache for any Hugging Face causal LM whose layers all attend to the whole text.

    Args:
        config: the model's, for the number of layers.
        bits: of each stored number, 2 to 8.
        group_size: numbers that share a scale; it must divide head_dim where a group lies along a token.
        recent: how many of the newest positions stay in full precision at least.
        keys_along: "channel" as in KIVI, or "token".
        values_along: "token" as in KIVI, or "channel".
    """

    def __init__(
        self,
        config,
        *,
        bits: int,
        group_size: int = 32,
        recent: int = 128,
        keys_along: Axis = "channel",
        values_along: Axis = "token",
    ) -> None:
        settings = {"bits": bits, "group_size": group_size, "recent": recent}
        settings |= {"keys_along": keys_along, "values_along": values_along}
        super().__init__(layers=[QuantizedLayer(**settings) for _ in range(config.num_hidden_layers)])

    @property
    def resident_bytes(self) -> int:
        """Bytes that the stored keys and values occupy."""
        return sum(layer.resident_bytes for layer in self.layers)
