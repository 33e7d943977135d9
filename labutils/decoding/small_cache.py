"""A KV cache that stays small: a policy says which positions stay, or which of them a query reads.

| policy | what it looks at | source |
| --- | --- | --- |
| `newest` | nothing: the first positions (attention sinks) and the newest | StreamingLLM, arXiv:2309.17453 |
| `heavy_hitters` | the attention that each position got so far | H2O, arXiv:2306.14048 |
| `observed` | the attention that the prompt's last queries paid | SnapKV, arXiv:2404.14469 |
| `page_bounds` | an upper bound of q·k for each page of keys | Quest, arXiv:2406.10774 |
| `index_scores` | a cheap score in few dimensions, summed over heads | after DSA, DeepSeek-V3.2, arXiv:2512.02556 |

The first three *evict*: memory stays small, and what is gone is gone. The last two only *select*: all keys stay in
memory, and each query reads a few. Keys are cached with their rotary angle, so every position keeps the number it had
in the text. StreamingLLM numbers the positions anew inside the cache, which lets it run beyond the trained context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

KeyOrValue = Float[Tensor, "batch kv_heads positions head_dim"]
Query = Float[Tensor, "batch kv_heads group head_dim"]  # the newest token's, a group for each key-value head
Priority = Float[Tensor, "batch kv_heads positions"]
TokenIds = Int[Tensor, "batch new"]


@dataclass
class Held:
    """What one layer has in its cache; positions ascend, the newest is last.

    Attributes:
        positions: The number that each had in the text.
        weight: Attention that each got so far, summed over queries and over the heads that share it.
        watched: The same from the last queries of the prompt alone; 0 for later positions.
    """

    keys: KeyOrValue
    values: KeyOrValue
    positions: Int[Tensor, "batch kv_heads positions"]
    weight: Priority
    watched: Priority

    def age(self) -> Int[Tensor, "batch kv_heads positions"]:
        """How far each lies behind the newest."""
        return self.positions[..., -1:] - self.positions

    def at(self, index: Int[Tensor, "batch kv_heads kept"]) -> Held:
        """Only these."""
        wide = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        flat = (x.gather(2, index) for x in (self.positions, self.weight, self.watched))
        return Held(self.keys.gather(2, wide), self.values.gather(2, wide), *flat)


Keep = Callable[[Held], Priority]
Read = Callable[[Held, Query], Priority]


def newest(*, sinks: int = 4) -> Keep:
    """The first `sinks` positions and the newest: a sliding window with attention sinks."""
    return lambda held: first(-held.age().float(), held.positions < sinks)


def heavy_hitters(*, recent: int) -> Keep:
    """The newest `recent` positions and those that got most attention so far (H2O's algorithm 1)."""
    return lambda held: first(held.weight, held.age() < recent)


def observed(*, prompt: int, window: int, pool: int = 5) -> Keep:
    """Of the prompt what its last `window` queries looked at, smoothed over neighbours; everything after the prompt."""

    def keep(held: Held) -> Priority:
        smooth = torch.nn.functional.max_pool1d(held.watched, pool, stride=1, padding=pool // 2)
        return first(smooth, held.positions >= prompt - window)

    return keep


def at_random(*, recent: int, generator: torch.Generator) -> Keep:
    """The control: the newest `recent` positions and any others."""
    return lambda held: first(torch.rand(held.weight.shape, generator=generator), held.age() < recent)


def page_bounds(*, page: int = 16) -> Read:
    """Σ_d max(q_d · min_d, q_d · max_d) over each page of keys, the largest of a group's heads; the newest page first.

    No key of the page scores higher, since each q_d k_d lies between q_d min_d and q_d max_d (Quest, algorithm 1).
    """

    def read(held: Held, query: Query) -> Priority:
        count = held.keys.shape[2]
        pages = held.keys.split(page, dim=2)
        low, high = (torch.stack([function(p, dim=2) for p in pages], dim=2) for function in (torch.amin, torch.amax))
        bounds = upper_bound(query[:, :, :, None], low[:, :, None], high[:, :, None]).amax(dim=2)
        page_of = torch.arange(count) // page
        return first(bounds[..., page_of], page_of == page_of[-1])

    return read


def upper_bound(
    query: Float[Tensor, "*q d"], low: Float[Tensor, "*k d"], high: Float[Tensor, "*k d"]
) -> Float[Tensor, "..."]:
    """The highest q·k that any key between `low` and `high` in every dimension can reach.

    >>> upper_bound(torch.tensor([1.0, -2.0]), torch.tensor([0.0, -1.0]), torch.tensor([3.0, 4.0]))
    tensor(5.)
    """
    return torch.maximum(query * low, query * high).sum(-1)


def index_scores(*, dims: int, recent: int = 1) -> Read:
    """Σ_heads relu(q·k) in the `dims` slowest rotary dimensions, one score for all heads: DSA's lightning indexer.

    DeepSeek trains an indexer of its own to follow the attention; ours is untrained and borrows the model's keys. Slow
    dimensions hardly turn with distance: they compare content and miss what is near, so the newest `recent` positions
    come first.
    """

    def read(held: Held, query: Query) -> Priority:
        half = held.keys.shape[-1] // 2
        slow = torch.tensor([i for end in (half, 2 * half) for i in range(end - dims // 2, end)])
        scores = (query[..., slow] @ held.keys[..., slow].mT).relu().sum(dim=(1, 2))
        return first(scores[:, None].expand(held.weight.shape), held.age() < recent)

    return read


def exact_scores(held: Held, query: Query) -> Priority:
    """The true q·k, the largest of a group's heads: what a selection would do at best, at the full price."""
    return first((query @ held.keys.mT).amax(dim=2), held.age() == 0)


def first(priority: Priority, these: Bool[Tensor, "..."]) -> Priority:
    """These before all others, and the newest of them first.

    >>> first(torch.tensor([[[9.0, 0.0, 5.0, 0.0]]]), torch.tensor([False, True, False, True])).tolist()
    [[[9.0, 11.0, 5.0, 13.0]]]
    """
    order = torch.arange(priority.shape[-1], device=priority.device)
    return torch.where(these, priority.amax(dim=-1, keepdim=True) + 1 + order, priority)


class SmallCache:
    """A cache for `decode`: holds at most `budget` positions a key-value head, or lets each query read so many.

    Args:
        budget: Positions; None is no limit.
        keep: Priority by which positions stay; None keeps all.
        read: Priority by which a single new token reads; None reads all that is held.
        watch: How many of the prompt's last queries count for `Held.watched`.

    Raises:
        ValueError: If the budget or the window is below 1.
    """

    is_compileable = False

    def __init__(
        self, *, budget: int | None = None, keep: Keep | None = None, read: Read | None = None, watch: int = 16
    ) -> None:
        if watch < 1 or (budget is not None and budget < 1):
            raise ValueError(f"budget and watch must be at least 1; got {budget} and {watch}")
        self.budget, self.keep, self.read, self.watch = budget, keep, read, watch
        self.layers: list[Held] = []
        self.length, self.reads, self.readable = 0, 0, 0

    def fork(self, *, budget: int | None, keep: Keep | None = None, read: Read | None = None) -> SmallCache:
        """A cache with the same content under another policy, which evicts at once; this one stays as it is."""
        other = SmallCache(budget=budget, keep=keep, read=read, watch=self.watch)
        other.layers, other.length = list(self.layers), self.length
        for layer in range(len(other.layers)):
            other._evict(layer)
        return other

    @property
    def share(self) -> float:
        """Positions read ÷ positions there were, over all single tokens so far."""
        return self.reads / self.readable

    @property
    def resident_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(2 * held.keys.numel() * held.keys.element_size() for held in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, kept or not: the number that the next token gets."""
        return self.length

    def update(self, keys: KeyOrValue, values: KeyOrValue, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values and returns all that are held."""
        nothing = keys.new_zeros(keys.shape[:3])
        start = self.length - (keys.shape[2] if layer_idx else 0)
        positions = (torch.arange(keys.shape[2]) + start).expand(keys.shape[:3])
        new = Held(keys, values, positions, nothing, nothing)
        if layer_idx == len(self.layers):
            self.layers.append(new)
        else:
            self.layers[layer_idx] = _joined(self.layers[layer_idx], new)
        if layer_idx == 0:
            self.length += keys.shape[2]
        return self.layers[layer_idx].keys, self.layers[layer_idx].values

    def attend(self, layer_idx: int, query: Float[Tensor, "batch heads new head_dim"], scaling: float) -> Tensor:
        """softmax(q·k · scaling) v over what may be read; notes who got how much of it, then evicts."""
        held = self.layers[layer_idx]
        new, count = query.shape[2], held.keys.shape[2]
        grouped = query.unflatten(1, (held.keys.shape[1], -1))  # batch, kv_heads, group, new, head_dim
        scores = (grouped.flatten(2, 3) @ held.keys.mT * scaling).unflatten(2, (-1, new))
        if new > 1:  # a query sees all that was cached before, and of the new ones those up to itself
            scores = scores.masked_fill(~causal(new, count - new), float("-inf"))
        elif self.read is not None and self.budget is not None and self.budget < count:
            chosen = self.read(held, grouped[:, :, :, 0]).topk(self.budget, dim=-1).indices
            hidden = torch.ones(held.weight.shape, dtype=torch.bool).scatter(2, chosen, False)
            scores = scores.masked_fill(hidden[:, :, None, None], float("-inf"))
        weights = scores.softmax(dim=-1)
        self._note(layer_idx, weights)
        return (weights.flatten(2, 3) @ held.values).unflatten(2, (-1, new)).flatten(1, 2)

    def _note(self, layer_idx: int, weights: Float[Tensor, "batch kv_heads group new positions"]) -> None:
        held, new = self.layers[layer_idx], weights.shape[3]
        held.weight = held.weight + weights.sum(dim=(2, 3))
        if new > 1:
            held.watched = weights[:, :, :, -self.watch :].sum(dim=(2, 3))
        elif layer_idx == 0:
            count = held.keys.shape[2]
            self.reads += count if self.read is None or self.budget is None else min(self.budget, count)
            self.readable += self.length
        self._evict(layer_idx)

    def _evict(self, layer_idx: int) -> None:
        held = self.layers[layer_idx]
        if self.keep is not None and self.budget is not None and self.budget < held.keys.shape[2]:
            kept = self.keep(held).topk(self.budget, dim=-1).indices
            self.layers[layer_idx] = held.at(kept.sort(dim=-1).values)


def causal(new: int, cached: int) -> Bool[Tensor, "new cached_plus_new"]:
    """Which keys each of `new` queries sees behind `cached` positions.

    >>> causal(2, 1).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(new, cached + new, dtype=torch.bool).tril(cached)


def _joined(held: Held, new: Held) -> Held:
    parts = ("keys", "values", "positions", "weight", "watched")
    return Held(*(torch.cat([getattr(held, part), getattr(new, part)], dim=2) for part in parts))


def _attention(module: nn.Module, query, key, value, attention_mask, scaling, *, small_cache: SmallCache, **_):
    return small_cache.attend(module.layer_idx, query, scaling).transpose(1, 2), None


AttentionInterface.register("small_cache", _attention)


@torch.no_grad()
def decode(model: nn.Module, token_ids: TokenIds, cache: SmallCache) -> Float[Tensor, "batch rows vocab"]:
    """Logits after each token of a known text that follows what is cached, read token by token.

    A first call on an empty cache reads its text, the prompt, in one pass; logits follow its last token alone.
    All rows are texts of one length, without padding; any Hugging Face model will do whose attention can be exchanged.
    """
    passes = token_ids.split(token_ids.shape[1] if cache.length == 0 else 1, dim=1)
    before = model.config._attn_implementation
    model.set_attn_implementation("small_cache")
    settings = {"past_key_values": cache, "small_cache": cache, "logits_to_keep": 1}
    try:
        return torch.cat([model(input_ids=ids, **settings).logits for ids in passes], dim=1)
    finally:
        model.set_attn_implementation(before)


def crossover_positions(*, weight_bytes: float, kv_bytes_per_position: float) -> float:
    """Cached positions at which a step reads as many bytes of keys and values as of weights.

    >>> crossover_positions(weight_bytes=11.5e6, kv_bytes_per_position=3072.0) // 1
    3743.0
    """
    return weight_bytes / kv_bytes_per_position
