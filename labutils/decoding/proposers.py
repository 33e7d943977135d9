"""Proposers: what guesses the next tokens, from the text alone, from counted text, or with a smaller model.

A proposer never decides. A good one is right often and costs little; a bad one costs time, never quality. The first
three here are deterministic and cost microseconds. `ModelDraft` costs a model's step for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from labutils.decoding.target import Target
from labutils.generation.sampling import Sampler, greedy


@dataclass(frozen=True)
class Proposal:
    """Guessed tokens and, where they were drawn at random, the distribution that each was drawn from."""

    token_ids: list[int]
    probs: Float[Tensor, "drafted vocab"] | None = None


class Proposer(Protocol):
    """Guesses how a text goes on."""

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns at most `count` tokens, perhaps none, after the text so far (prompt and accepted tokens)."""


class NoDraft:
    """Proposes nothing: plain decoding in the same loop, for comparison."""

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns no token."""
        return Proposal([])


class PromptLookup:
    """The text's own past: finds the last tokens again and copies what followed them there.

    Tries the longest suffix first, from `longest` tokens down to `shortest`; among equal matches the most recent one
    wins (Saxena 2023, "prompt lookup decoding"). The copy may run into what it has just drafted, so a text with a
    period goes on with it.

    >>> PromptLookup().propose([7, 8, 9, 5, 7, 8], 2).token_ids
    [9, 5]
    >>> PromptLookup().propose([1, 2, 3], 2).token_ids
    []

    Raises:
        ValueError: If not 1 <= shortest <= longest.
    """

    def __init__(self, *, longest: int = 8, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"match lengths must have 1 <= shortest <= longest; got {shortest} and {longest}")
        self.lengths = range(longest, shortest - 1, -1)
        self.seen: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its most recent occurrence

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns what followed the longest match, at most `count` tokens."""
        self._index(token_ids)
        for length in self.lengths:
            start = self.after.get(tuple(token_ids[-length:])) if length < len(token_ids) else None
            if start is not None:
                return Proposal(copy_from(token_ids, start, count))
        return Proposal([])

    def _index(self, token_ids: list[int]) -> None:
        """Notes the n-grams that end before each new token; those that end with the last have no continuation yet."""
        if token_ids[: len(self.seen)] != self.seen:
            self.seen, self.after = [], {}
        for position in range(max(len(self.seen), 1), len(token_ids)):
            for length in self.lengths:
                if length <= position:
                    self.after[tuple(token_ids[position - length : position])] = position
        self.seen = token_ids.copy()


def copy_from(token_ids: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from position `start` on; past the end it copies what it has just copied.

    >>> copy_from([1, 2, 3], 1, 5)
    [2, 3, 2, 3, 2]
    """
    drafted = token_ids[start : start + count]
    while len(drafted) < count:
        drafted += drafted[: count - len(drafted)]
    return drafted


class CorpusNgram:
    """Counted text: after the last n tokens, the token that most often followed them, token by token.

    Backs off from `order` tokens to fewer where a context was never seen, down to `shortest`; below that it stops.

    Args:
        rows: Texts to count, as token ids.
        vocab_size: Tokens there are.
        order: Longest context.
        shortest: Shortest context.

    >>> CorpusNgram([[1, 2, 3, 4], [9, 2, 3, 5], [8, 2, 3, 5]], vocab_size=10).propose([0, 2], 3).token_ids
    [3, 5]

    Raises:
        ValueError: If not 1 <= shortest <= order, or a context and its next token do not fit into 63 bits.
    """

    def __init__(self, rows: Sequence[Sequence[int]], *, vocab_size: int, order: int = 4, shortest: int = 1) -> None:
        if not 1 <= shortest <= order or vocab_size ** (order + 1) >= 2**63:
            rule = "an n-gram needs 1 <= shortest <= order and vocab_size^(order + 1) < 2^63"
            raise ValueError(f"{rule}; got {shortest}, {order} and {vocab_size}")
        self.orders, self.vocab_size = range(order, shortest - 1, -1), vocab_size
        self.tables = [(vocab_size**n, most_frequent_next(rows, vocab_size, n)) for n in self.orders]

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns up to `count` tokens, each the favourite after those before it."""
        context, drafted = 0, []
        for token in token_ids[-self.orders[0] :]:
            context = context * self.vocab_size + token
        while len(drafted) < count:
            token = self._favourite(context, known=len(token_ids) + len(drafted))
            if token is None:
                break
            drafted.append(token)
            context = (context * self.vocab_size + token) % self.tables[0][0]
        return Proposal(drafted)

    def _favourite(self, context: int, *, known: int) -> int | None:
        for n, (size, table) in zip(self.orders, self.tables, strict=True):
            if n <= known and (token := table.get(context % size)) is not None:
                return token
        return None


def most_frequent_next(rows: Sequence[Sequence[int]], vocab_size: int, n: int) -> dict[int, int]:
    """Each context of n tokens that occurs, as a number in base `vocab_size`, and the token that most often follows it.

    On a tie the smallest token wins.

    >>> most_frequent_next([[1, 2, 1, 3, 1, 3]], vocab_size=10, n=1)
    {1: 3, 2: 1, 3: 1}
    """
    powers = vocab_size ** np.arange(n, -1, -1)
    rows = [np.asarray(row) for row in rows if len(row) > n]
    codes = [np.lib.stride_tricks.sliding_window_view(row, n + 1) @ powers for row in rows]
    grams, counts = np.unique(np.concatenate([np.empty(0, np.int64), *codes]), return_counts=True)
    contexts, following = np.divmod(grams, vocab_size)
    order = np.lexsort((following, -counts, contexts))
    firsts = order[np.diff(contexts[order], prepend=-1) > 0]
    return dict(zip(contexts[firsts].tolist(), following[firsts].tolist(), strict=True))


class SuffixAutomaton:
    """The longest suffix of the text that occurred before, of any length, in constant time a token.

    A suffix automaton (Blumer et al. 1985) has a state for each set of end positions that substrings share; the suffix
    link of the whole text's state leads to its longest suffix that ends somewhere else as well. What followed its first
    occurrence is proposed.

    Args:
        shortest: Propose nothing after a shorter match.

    >>> SuffixAutomaton(shortest=1).propose([7, 8, 9, 5, 7, 8], 2).token_ids
    [9, 5]
    """

    def __init__(self, *, shortest: int = 2) -> None:
        if shortest < 1:
            raise ValueError(f"the shortest match must be at least 1; got {shortest}")
        self.shortest = shortest
        self._reset()

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns what followed the longest repeated suffix, at most `count` tokens."""
        if token_ids[: len(self.seen)] != self.seen:
            self._reset()
        for token in token_ids[len(self.seen) :]:
            self._add(token)
        match = self.link[self.last]
        if match < 0 or self.length[match] < self.shortest:
            return Proposal([])
        return Proposal(copy_from(token_ids, self.after[match], count))

    def _reset(self) -> None:
        self.seen: list[int] = []
        self.edges: list[dict[int, int]] = [{}]
        self.link, self.length, self.after, self.last = [-1], [0], [0], 0

    def _add(self, token: int) -> None:
        self.seen.append(token)
        new = self._state({}, length=self.length[self.last] + 1, after=len(self.seen))
        state = self.last
        while state >= 0 and token not in self.edges[state]:
            self.edges[state][token] = new
            state = self.link[state]
        self.link[new], self.last = self._suffix_of(state, token), new

    def _suffix_of(self, state: int, token: int) -> int:
        """The state that the new one links to: split off where longer strings share it."""
        if state < 0:
            return 0
        known = self.edges[state][token]
        if self.length[known] == self.length[state] + 1:
            return known
        clone = self._state(dict(self.edges[known]), length=self.length[state] + 1, after=self.after[known])
        self.link[clone], self.link[known] = self.link[known], clone
        while state >= 0 and self.edges[state].get(token) == known:
            self.edges[state][token] = clone
            state = self.link[state]
        return clone

    def _state(self, edges: dict[int, int], *, length: int, after: int) -> int:
        self.edges.append(edges)
        self.length.append(length)
        self.after.append(after)
        self.link.append(-1)
        return len(self.edges) - 1


def draft_one_by_one(
    logits_after: Callable[[list[int]], Tensor], count: int, *, choose: Callable[[Tensor], Tensor]
) -> Proposal:
    """Drafts `count` tokens; `logits_after` maps the tokens drafted so far to the logits (1, vocab) of the next.

    With a `Sampler` tokens are drawn, and the distributions they were drawn from are handed over for `verify`.
    """
    drafted: list[int] = []
    probs: list[Tensor] = []
    for _ in range(count):
        logits = logits_after(drafted)
        if isinstance(choose, Sampler):
            probs.append(choose.probs(logits))
            drafted.append(int(torch.multinomial(probs[-1], 1, generator=choose.generator)))
        else:
            drafted.append(int(choose(logits)))
    return Proposal(drafted, torch.cat(probs) if probs else None)


class ModelDraft:
    """A smaller model as a draft, with a cache of its own, which it rewinds to what it shares with the text.

    Args:
        model: Any `Target`; only its vocabulary must be the target's.
        choose: `greedy`, or a `Sampler` that draws the tokens and hands over the distributions it drew from.
    """

    def __init__(self, model: Target, *, choose: Callable[[Tensor], Tensor] = greedy) -> None:
        self.model, self.choose = model, choose
        self.model.rewind(self.model.length)
        self.read: list[int] = []  # what the model's cache holds

    def propose(self, token_ids: list[int], count: int) -> Proposal:
        """Returns `count` tokens that the model would write, fewer where its cache has no more room."""
        room = count if self.model.max_length is None else self.model.max_length - len(token_ids) + 1
        return draft_one_by_one(lambda drafted: self._after(token_ids + drafted), min(count, room), choose=self.choose)

    def _after(self, text: list[int]) -> Float[Tensor, "1 vocab"]:
        """Logits after a text, of which only what the cache does not hold is read."""
        shared = min(common_prefix(text, self.read), len(text) - 1)
        self.model.rewind(len(self.read) - shared)
        self.read = text
        return self.model.prefill(torch.tensor([text[shared:]]))


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many first items two lists share.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(i for i in range(shorter) if left[i] != right[i])
