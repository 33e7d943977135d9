"""Checks of chapter 10, third part: leaving early, a window with sinks, the mask of a cached pass."""

import torch

from labutils.course.checks import exercise, expect_function


def _first_sure(confidence, threshold):
    sure = torch.cat([confidence >= threshold, torch.ones(len(confidence), 1, dtype=torch.bool)], dim=1)
    return sure.int().argmax(dim=1) + 1


def _last_sure(confidence, threshold):
    sure, layers = confidence >= threshold, torch.arange(1, confidence.shape[1] + 1)
    return torch.where(sure.any(dim=1), (sure * layers).amax(dim=1), confidence.shape[1] + 1)


@exercise("10.9")
def exit_depths(answer):
    """Layers that each token runs: up to the first confidence at or above the threshold, else all."""
    reference = _first_sure
    never_all = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.9, 0.4], [0.8, 0.1, 0.9], [0.5, 0.6, 0.7]])
    other = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    expect_function(
        answer,
        reference,
        cases=[{"confidence": never_all, "threshold": 0.8}, {"confidence": other, "threshold": 0.7}],
        mistakes=[
            (
                lambda confidence, threshold: (confidence >= threshold).int().argmax(dim=1) + 1,
                "a token that is never sure left after layer 1: argmax of a row without a True is 0; it runs all",
            ),
            (
                lambda confidence, threshold: reference(confidence, threshold) - 1,
                "off by one: column 0 is asked after ONE layer",
            ),
            (
                lambda confidence, threshold: reference(confidence, threshold).clamp(max=confidence.shape[1]),
                "a token that is never sure runs the last layer too, which has no column: one layer more than columns",
            ),
            (
                lambda confidence, threshold: reference(-confidence, -threshold),
                "the comparison is the wrong way round: a token leaves when it is sure enough",
            ),
            (
                lambda confidence, threshold: reference(confidence, threshold + 1e-6),
                "a confidence equal to the threshold is enough: >=",
            ),
            (_last_sure, "that is the LAST layer that is sure: a token leaves at the first"),
            (
                lambda confidence, threshold: (confidence < threshold).sum(dim=1) + 1,
                "that counts the unsure layers, those behind the exit too: stop at the first sure one",
            ),
        ],
    )


def _window(length, sinks, budget):
    return [*range(sinks), *range(length - (budget - sinks), length)]


def _when_long(positions):
    """The same, but a text that fits stays whole."""
    return lambda length, sinks, budget: list(range(length)) if length <= budget else positions(length, sinks, budget)


@exercise("10.10")
def kept_positions(answer):
    """The first `sinks` and the newest positions, at most `budget`, ascending."""
    wrong = _when_long
    expect_function(
        answer,
        _when_long(_window),
        cases=[
            {"length": 10, "sinks": 2, "budget": 5},
            {"length": 4, "sinks": 2, "budget": 5},
            {"length": 30, "sinks": 4, "budget": 12},
            {"length": 6, "sinks": 0, "budget": 3},
        ],
        mistakes=[
            (
                wrong(lambda length, sinks, budget: [*range(sinks), *range(length - budget, length)]),
                "the sinks count too: only budget - sinks of the newest positions have room",
            ),
            (
                wrong(lambda length, sinks, budget: [*range(sinks), *range(length - budget + sinks - 1, length - 1)]),
                "off by one: the newest position, length - 1, is missing",
            ),
            (
                wrong(lambda length, sinks, budget: [*range(sinks), *range(length - budget + sinks + 1, length)]),
                "off by one: one position fewer than the budget allows",
            ),
            (
                wrong(lambda length, sinks, budget: list(range(length - budget, length))),
                "a window without sinks: the first positions stay for good",
            ),
            (
                wrong(lambda length, sinks, budget: list(range(budget))),
                "the wrong side: the window holds the newest positions, not the oldest",
            ),
            (_window, "a short text: while it fits into the budget every position stays, once"),
        ],
    )


def _mask(diagonal):
    return lambda cached, new: torch.ones(new, cached + new, dtype=torch.bool).tril(diagonal(cached))


@exercise("10.11")
def visible(answer):
    """Which keys each of several new queries sees behind cached positions."""
    reference = _mask(lambda cached: cached)

    def skipped(cached, new):
        return torch.ones(new, cached + new, dtype=torch.bool) if cached else reference(cached, new)

    expect_function(
        answer,
        reference,
        cases=[{"cached": 3, "new": 2}, {"cached": 0, "new": 3}, {"cached": 2, "new": 1}, {"cached": 1, "new": 4}],
        mistakes=[
            (skipped, "that is the bug itself: with a cache, several new queries see each other's future"),
            (
                _mask(lambda cached: 0),
                "aligned at the first key: query i stands at position cached + i, not i",
            ),
            (_mask(lambda cached: cached - 1), "off by one: a query sees its own position too"),
            (_mask(lambda cached: cached + 1), "off by one: a query sees the position after its own"),
            (
                lambda cached, new: torch.ones(new, new, dtype=torch.bool).tril(),
                "the cached positions are missing: there are cached + new columns",
            ),
            (
                lambda cached, new: ~reference(cached, new),
                "inverted: True is what a query sees",
            ),
        ],
    )
