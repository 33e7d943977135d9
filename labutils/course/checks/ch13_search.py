"""Checks of chapter 13: the next generation of a search, and what a smaller model inherits."""

import torch

from labutils.capstone.search import one_step_away
from labutils.course.checks import cases_of, exercise, expect_function


def _step(found, space, budget, *, strict=False, pick=min, key=1, skip=True, near=one_step_away, all_alive=False):
    fitting = [c for c, (time, _) in found.items() if all_alive or (time < budget if strict else time <= budget)]
    if not fitting:
        return []
    best = pick(fitting, key=lambda c: found[c][key])
    return sorted(c for c in near(best, space) if not skip or c not in found)


def _step_wrong(**change):
    return lambda found, space, budget: _step(found, space, budget, **change)


def _round_the_end(candidate, space):
    return [
        (*candidate[:axis], values[(values.index(candidate[axis]) + d) % len(values)], *candidate[axis + 1 :])
        for axis, values in enumerate(space)
        for d in (-1, 1)
    ]


def _any_value(candidate, space):
    return [
        (*candidate[:axis], value, *candidate[axis + 1 :])
        for axis, values in enumerate(space)
        for value in values
        if value != candidate[axis]
    ]


def _only_up(candidate, space):
    return [c for c in one_step_away(candidate, space) if c > candidate]


@exercise("13.5")
def evolve_step(answer):
    """The untried neighbours of the best candidate within the budget."""
    space, wide = [(1, 2, 3), (4, 8, 16)], [(1, 2, 3, 4), (128, 192, 256), (1, 2)]
    expect_function(
        answer,
        _step,
        cases=cases_of(
            "found space budget",
            ({(2, 8): (1.0, 0.5), (3, 16): (3.0, 0.1), (1, 4): (0.2, 0.9)}, space, 2.0),
            ({(1, 8): (0.6, 0.7), (1, 4): (0.5, 0.9), (2, 4): (0.9, 0.8)}, space, 1.0),
            ({(3, 4): (2.0, 0.2), (1, 4): (1.0, 0.6)}, space, 2.0),
            (
                {(4, 128, 1): (0.9, 0.3), (2, 192, 1): (0.5, 1.5), (1, 128, 1): (0.3, 1.2), (2, 256, 2): (1.1, 0.2)},
                wide,
                1.0,
            ),
            ({(1, 4): (2.0, 0.4)}, space, 1.0),
        ),
        mistakes=[
            (_step_wrong(all_alive=True), "a candidate above the budget must not be the parent, however good it is"),
            (_step_wrong(skip=False), "leave out what was tried before: nobody pays twice for the same answer"),
            (_step_wrong(key=0), "the fastest is not the best: the budget is a limit, the loss is the aim"),
            (_step_wrong(pick=max), "the second number is a LOSS: the parent is the one with the smallest"),
            (_step_wrong(near=_round_the_end), "an axis ends: the first value has no place before it (index -1 wraps)"),
            (_step_wrong(near=_any_value), "one PLACE along an axis: the value next to it, not any other"),
            (_step_wrong(near=_only_up), "a child may be smaller too: go one place down as well as up"),
            (_step_wrong(strict=True), "a time equal to the budget is within it"),
        ],
    )


def _inherit(embedding, gain, read, write, channels, tokens, *, power=0.5, write_columns=False, first=False):
    factor = (len(gain) / len(channels)) ** power
    rows = embedding[-tokens:] if first else embedding[:tokens]
    written = write[:, : len(channels)] if write_columns else write[channels]
    return rows[:, channels], gain[channels] * factor, read[:, channels], written


def _inherit_wrong(**change):
    def answer(embedding, gain, read, write, channels, tokens):
        return _inherit(embedding, gain, read, write, channels, tokens, **change)

    return answer


def _leading(embedding, gain, read, write, channels, tokens):
    return _inherit(embedding, gain, read, write, list(range(len(channels))), tokens)


def _no_tokens(embedding, gain, read, write, channels, tokens):
    return _inherit(embedding, gain, read, write, channels, len(embedding))


@exercise("13.4")
def inherit(answer):
    """Embedding, gain and matrices of a model with fewer channels and fewer tokens."""
    generator = torch.Generator().manual_seed(13)

    def case(hidden, channels, tokens):
        shapes = ((9, hidden), (hidden,), (hidden + 1, hidden), (hidden, 5))
        return (*(torch.randn(*shape, generator=generator) for shape in shapes), channels, tokens)

    expect_function(
        answer,
        _inherit,
        cases=cases_of(
            "embedding gain read write channels tokens", case(8, [1, 6], 4), case(6, [0, 2, 5], 9), case(4, [3], 2)
        ),
        mistakes=[
            (
                _inherit_wrong(power=0),
                "RMSNorm divides by the mean over FEWER channels: the gain takes the factor √(hidden / kept)",
            ),
            (
                _inherit_wrong(power=-0.5),
                "the factor is √(hidden / kept), above 1: a mean over fewer channels is larger",
            ),
            (_inherit_wrong(power=1), "the norm divides by a ROOT: the factor is √(hidden / kept)"),
            (
                _inherit_wrong(write_columns=True),
                "a matrix that writes the residual stream has the channels as its ROWS (outputs)",
            ),
            (_leading, "keep the channels that are listed, not as many leading ones"),
            (_inherit_wrong(first=True), "the early merges have the small ids: keep the FIRST rows of the embedding"),
            (_no_tokens, "the vocabulary shrinks too: the first `tokens` rows of the embedding"),
        ],
    )
