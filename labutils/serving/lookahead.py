"""Speculation inside the engine: a step reads guesses behind a request's last token, and later steps find them read.

The engine needs no change. It asks for the logits after one token and draws the next from them as always; where that
token is the one that was guessed, the logits after it are known already. So each token comes from the same logits by
the same draw as without guesses, greedy or sampled, and the text is the same but for near-ties: see `PagedLlama`. A
sure guess stands with probability p(guess), which is what chapter 10's verifier reaches too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from labutils.decoding.proposers import PromptLookup, Proposer
from labutils.serving.paged import PagedLlama
from labutils.serving.scheduler import Chunk, Request, Step

Place = tuple[int, int, int]  # preemptions so far, position, token


class Lookahead:
    """A `StepModel` that guesses; a request that others preempt loses its guesses with its memory.

    Args:
        model: Computes the steps.
        draft_tokens: Guesses a step and request, at most; fewer where its last block or its answer ends before.
        proposer: Makes one deterministic proposer for each request.

    Attributes:
        steps: Steps that the model computed.
        drafted: Tokens that were guessed.
        accepted: Of those, the ones that the engine drew as well.

    Raises:
        ValueError: For a negative number of guesses.
    """

    def __init__(
        self, model: PagedLlama, *, draft_tokens: int, proposer: Callable[[], Proposer] = PromptLookup
    ) -> None:
        if draft_tokens < 0:
            raise ValueError(f"draft_tokens must be at least 0; got {draft_tokens}")
        self.model, self.draft_tokens, self.proposer = model, draft_tokens, proposer
        self.blocks, self.block_size = model.blocks, model.block_size
        self.proposers: WeakKeyDictionary[Request, Proposer] = WeakKeyDictionary()
        self.known: WeakKeyDictionary[Request, dict[Place, Tensor]] = WeakKeyDictionary()
        self.steps = self.drafted = self.accepted = 0

    def __call__(self, step: Step) -> Float[Tensor, "sampled vocab"]:
        """The logits after each chunk that samples, computed now or before."""
        rows = {chunk.request: self._found(chunk) for chunk in step.chunks}
        todo = [chunk for chunk in step.chunks if rows[chunk.request] is None]
        if todo:
            rows |= self._compute(step, todo)
        due = [rows[chunk.request] for chunk in step.chunks if chunk.samples]
        return torch.stack(due) if due else torch.zeros(0, 0)

    def _compute(self, step: Step, todo: Sequence[Chunk]) -> dict[Request, Tensor]:
        """Reads chunks and guesses; returns the logits after each chunk that samples, keeps those after guesses."""
        guesses = [self._guesses(chunk) for chunk in todo]
        longer = tuple(map(_with_guesses, todo, guesses))
        hidden = self.model.read(replace(step, chunks=longer))
        self.steps += 1
        self.drafted += sum(map(len, guesses))
        parts = np.split(hidden, np.cumsum([chunk.end - chunk.start for chunk in longer])[:-1])
        due = [(c.request, g, p[-1 - len(g) :]) for c, g, p in zip(todo, guesses, parts, strict=True) if c.samples]
        if not due:
            return {}
        logits = self.model.logits(np.concatenate([part for *_, part in due]))
        first = {}
        for (request, guessed, _), each in zip(due, logits.split([len(part) for *_, part in due]), strict=True):
            first[request], *others = each
            end = len(request.token_ids)
            places = [(request.preemptions, end + i, token) for i, token in enumerate(guessed)]
            self.known[request] = dict(zip(places, others, strict=True))  # what was left was guessed wrongly
        return first

    def _found(self, chunk: Chunk) -> Tensor | None:
        """The logits after a token that was guessed in the step before."""
        row = self.known.get(chunk.request, {}).pop(_place(chunk), None) if chunk.end == chunk.start + 1 else None
        self.accepted += row is not None
        return row

    def _guesses(self, chunk: Chunk) -> list[int]:
        """What may come next, as far as free positions go; behind a token that ends the text nothing is wanted."""
        request = chunk.request
        if not chunk.samples or chunk.end > chunk.start + 1:
            return []
        free = len(request.table) * self.block_size - chunk.end
        count = min(self.draft_tokens, free, request.max_new_tokens - len(request.new_ids) - 1)
        if count < 1:
            return []
        proposer = self.proposers.setdefault(request, self.proposer())
        drafted = proposer.propose(list(request.token_ids), count).token_ids
        return list(takewhile(lambda token: token not in request.stop, drafted))


def _place(chunk: Chunk) -> Place:
    return chunk.request.preemptions, chunk.start, chunk.request.token_ids[chunk.start]


def _with_guesses(chunk: Chunk, guessed: list[int]) -> Chunk:
    """The chunk and its guesses, as part of a copy of the request: the request itself knows nothing of them."""
    if not guessed:
        return chunk
    copy = Request(chunk.request.token_ids + guessed, 1)
    copy.table = chunk.request.table
    return Chunk(copy, chunk.start, len(copy.token_ids))
