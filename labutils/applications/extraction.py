"""Spans in a text: as tags of tokens for a model to learn, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

OUTSIDE = "O"
Offsets = Sequence[tuple[int, int]]


class Span(NamedTuple):
    """Characters `start` to `end` of a text, and what they are."""

    start: int
    end: int
    label: str


def bio_tags(spans: Iterable[Span], offsets: Offsets) -> list[str]:
    """A tag for each token: B- where a span begins, I- inside, O elsewhere (Ramshaw and Marcus 1995, W95-0107).

    A token belongs to the span that it shares a character with, for a tokenizer may put a space before a word into it.

    >>> bio_tags([Span(3, 9, "city")], [(0, 2), (2, 6), (6, 9)])
    ['O', 'B-city', 'I-city']
    """
    tags = [OUTSIDE] * len(offsets)
    for span in spans:
        inside = [i for i, (start, end) in enumerate(offsets) if max(start, span.start) < min(end, span.end)]
        for place, i in enumerate(inside):
            tags[i] = f"{'I' if place else 'B'}-{span.label}"
    return tags


def spans_of(tags: Sequence[str], offsets: Offsets, text: str) -> set[Span]:
    """The spans that tags mean, without white space at their ends; an I- that continues nothing begins a span.

    >>> sorted(spans_of(["O", "B-city", "I-city"], [(0, 2), (2, 6), (6, 9)], "to Vienna"))
    [Span(start=3, end=9, label='city')]
    """
    runs: list[list] = []  # start, end, label
    before = OUTSIDE
    for tag, (start, end) in zip(tags, offsets, strict=True):
        kind, _, label = tag.partition("-")
        if kind == "I" and before.partition("-")[2] == label:
            runs[-1][1] = end
        elif kind != OUTSIDE:
            runs.append([start, end, label])
        before = tag
    return {_trimmed(text, *run) for run in runs}


def _trimmed(text: str, start: int, end: int, label: str) -> Span:
    piece = text[start:end]
    return Span(start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip()), label)


def fit_head(
    features: Float[Tensor, "items width"], labels: Int[Tensor, " items"], classes: int, *, steps: int = 40
) -> nn.Linear:
    """A linear classifier on frozen features: each feature to mean 0 and deviation 1, then cross-entropy by L-BFGS.

    Args:
        features: What a model that is not trained here says of each item.
        labels: 0 … classes − 1.
        classes: How many.
        steps: Iterations at most.

    Raises:
        ValueError: If a label is none, or there are fewer than two items.
    """
    if len(features) < 2 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        span = f"{len(features)} items, labels {int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"a head needs 2 or more items and labels from 0 to {classes - 1}; got {span}")
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x, head = (features - mean) / deviation, nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(x), labels) + 1e-3 * head.weight.pow(2).sum() / classes
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():  # fold the scaling into the weights, so that raw features go in
        head.weight /= deviation
        head.bias -= head.weight @ mean
    return head.requires_grad_(False)
