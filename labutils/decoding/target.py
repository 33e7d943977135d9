"""What decides: one stream of a model with a cache that can be rewound."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.generation.cache import Cache, KVCache
from labutils.generation.decode import prefill


class Target(Protocol):
    """One stream with a cache: `FastLlama` as it stands, or a `ModelTarget`."""

    length: int
    max_length: int | None  # None: as long as there is memory

    def prefill(self, token_ids: Int[Tensor, "1 positions"]) -> Float[Tensor, "1 vocab"]:
        """Reads tokens behind what is cached and returns the logits after the last."""

    def extend(self, token_ids: list[int]) -> Float[Tensor, "new vocab"]:
        """Reads tokens behind what is cached and returns the logits after each."""

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions."""


class ModelTarget:
    """Any Hugging Face causal LM with one of our caches, as a `Target`."""

    def __init__(self, model: nn.Module, cache: Cache | None = None) -> None:
        self.model, self.cache = model, cache or KVCache()
        self.max_length = getattr(self.cache, "max_length", None)

    @property
    def length(self) -> int:
        """Positions cached."""
        return int(self.cache.get_seq_length())

    def prefill(self, token_ids: Int[Tensor, "1 positions"]) -> Float[Tensor, "1 vocab"]:
        """Reads tokens behind what is cached and returns the logits after the last."""
        return prefill(self.model, token_ids, self.cache)

    def extend(self, token_ids: list[int]) -> Float[Tensor, "new vocab"]:
        """Reads tokens behind what is cached and returns the logits after each."""
        with torch.no_grad():
            ids = torch.tensor([token_ids], device=self.model.device)
            return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0]

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions."""
        self.cache.rewind(count)
