"""Checks of chapter 10, last part: token masks, forced text, what masking does to a distribution, one order of sums."""

import torch

from labutils.course.checks import exercise, expect_function

# "ab|aé|c", byte by byte: 0 -a-> 1, 1 -b-> 3, 1 -\xc3-> 2, 2 -\xa9-> 3, 0 -c-> 3; the text may end in 3
NEXT = [{97: 1, 99: 3}, {98: 3, 195: 2}, {169: 3}, {}]
TOKENS = [b"", b"a", b"b", b"ab", b"a\xc3", b"\xc3\xa9", b"\xa9", b"c", b"ac", b"abb"]


def _reached(next_state, token, state):
    for byte in token:
        state = next_state[state].get(byte) if state is not None else None
    return state


def _token_mask(next_state, tokens, state):
    return [bool(token) and _reached(next_state, token, state) is not None for token in tokens]


def _standing_still(next_state, tokens, state):
    return [bool(token) and all(byte in next_state[state] for byte in token) for token in tokens]


def _whole_texts(next_state, tokens, state):
    reached = [_reached(next_state, token, state) for token in tokens]
    return [end is not None and bool(token) and not next_state[end] for token, end in zip(tokens, reached, strict=True)]


@exercise("10.12")
def token_mask(answer):
    """Which tokens may come next, walked byte by byte."""
    expect_function(
        answer,
        _token_mask,
        cases=[{"next_state": NEXT, "tokens": TOKENS, "state": state} for state in (0, 1, 2, 3)],
        mistakes=[
            (
                lambda next_state, tokens, state: [bool(t) and t[0] in next_state[state] for t in tokens],
                "only the first byte was tried: a token is allowed when ALL its bytes lead on",
            ),
            (_standing_still, "each byte was tried from the same state: move to the next state after every byte"),
            (
                lambda next_state, tokens, state: [_reached(next_state, t, state) is not None for t in tokens],
                "a token without bytes is special: it would never move on, so it is not allowed",
            ),
            (
                lambda next_state, tokens, state: _token_mask(next_state, tokens, 0),
                "that is the mask of state 0: start from the state that was given",
            ),
            (
                _whole_texts,
                "only tokens that finish the text were allowed: one that stops halfway may be continued by others",
            ),
        ],
    )


def _forced(next_state, accepting, state, *, stops=True, most=None, pick=False):
    forced = []
    while len(next_state[state]) == 1 or (pick and next_state[state]):
        if (stops and accepting[state]) or len(forced) == most:
            break
        byte, state = min(next_state[state].items())
        forced.append(byte)
    return bytes(forced)


@exercise("10.13")
def forced_run(answer):
    """The longest text that must come next."""
    # "in(g|k)s?!": 0 i 1 n 2 (g 3 | k 3), 3 s 4, 3 ! 5, 4 ! 5; and "on(ly)?" from 6: 6 o 7 n 8, 8 l 9 y 10
    table = [
        {105: 1},
        {110: 2},
        {103: 3, 107: 3},
        {115: 4, 33: 5},
        {33: 5},
        {},
        {111: 7},
        {110: 8},
        {108: 9},
        {121: 10},
        {},
    ]
    ends = [state in (5, 8, 10) for state in range(len(table))]
    expect_function(
        answer,
        _forced,
        cases=[{"next_state": table, "accepting": ends, "state": state} for state in (6, 0, 1, 2, 4, 5, 8, 9)],
        mistakes=[
            (
                lambda next_state, accepting, state: _forced(next_state, accepting, state, stops=False),
                "where the text may end, nothing more is forced: stop in an accepting state",
            ),
            (
                lambda next_state, accepting, state: _forced(next_state, accepting, state, most=1),
                "only one byte was taken: go on while there is one way",
            ),
            (
                lambda next_state, accepting, state: _forced(next_state, accepting, state, pick=True),
                "a way was chosen where there are two: forced text ends at the first choice",
            ),
            (
                lambda next_state, accepting, state: _forced(next_state, accepting, state).decode(),
                "return bytes: forced text may end inside a character",
            ),
            (
                lambda next_state, accepting, state: _forced(next_state, accepting, 0),
                "that is what state 0 forces: start from the state that was given",
            ),
        ],
    )


def _masked(first, second, allowed):
    kept = first * allowed.any(1)
    rows = second * allowed
    return kept[:, None] / kept.sum() * rows / rows.sum(1, keepdim=True).clamp(min=1e-12)


def _conditioned(first, second, allowed):
    both = first[:, None] * second * allowed
    return both / both.sum()


def _unscaled(first, second, allowed):
    return first[:, None] * second * allowed, _conditioned(first, second, allowed)


def _one_mask(first, second, allowed):
    rows = second * allowed
    masked = first[:, None] * rows / rows.sum(1, keepdim=True).clamp(min=1e-12)
    return masked, _conditioned(first, second, allowed)


def _by_row(first, second, allowed):
    both = first[:, None] * second * allowed
    return _masked(first, second, allowed), both / both.sum(1, keepdim=True).clamp(min=1e-12)


@exercise("10.14")
def masked_and_conditioned(answer):
    """The distribution that masking step by step draws from, and the model's own among the allowed texts."""

    def reference(first, second, allowed):
        return _masked(first, second, allowed), _conditioned(first, second, allowed)

    generator = torch.Generator().manual_seed(0)
    random = torch.rand(4, 3, generator=generator)
    cases = [
        {
            "first": torch.tensor([0.75, 0.25]),
            "second": torch.tensor([[0.125, 0.875], [0.5, 0.5]]),
            "allowed": torch.tensor([[True, False], [True, True]]),
        },
        {
            "first": torch.rand(4, generator=generator).softmax(0),
            "second": (3 * random).softmax(1),
            "allowed": torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).bool(),
        },
    ]
    expect_function(
        answer,
        reference,
        cases=cases,
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda first, second, allowed: reference(first, second, allowed)[::-1],
                "the two are swapped: masking divides at every step, conditioning once, by the sum over whole texts",
            ),
            (
                lambda first, second, allowed: (_conditioned(first, second, allowed),) * 2,
                "masking does not know what comes later: its first token is judged by `first` alone",
            ),
            (_unscaled, "after the mask each step's probabilities must sum to 1 again: divide by what is left"),
            (_one_mask, "the first token was not masked: one that no allowed text begins with has probability 0"),
            (_by_row, "the model's own distribution divides once, by the sum over ALL allowed texts, not row by row"),
        ],
    )


def _in_parts(row, parts):
    total = torch.zeros((), dtype=row.dtype)
    for part in row.chunk(parts):
        total = total + _one_by_one(part)
    return total


def _one_by_one(values):
    total = torch.zeros((), dtype=values.dtype)
    for value in values:
        total = total + value
    return total


@exercise("10.15")
def row_sums(answer):
    """Sums of rows whose bits do not depend on how many rows there are."""

    def by(parts, dtype=None):
        def sums(rows):
            cast = rows if dtype is None else rows.to(dtype)
            return torch.stack([_in_parts(row, parts(len(rows))) for row in cast]).to(rows.dtype)

        return sums

    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    expect_function(
        answer,
        by(lambda batch: 8),
        cases=[{"rows": rows}, {"rows": rows[:1]}, {"rows": rows[2:4]}, {"rows": rows[:3]}],
        rtol=0,
        atol=0,
        mistakes=[
            (by(lambda batch: max(8 // batch, 1)), "the order still depends on len(rows): cut every row into 8 parts"),
            (
                by(lambda batch: 1),
                "the same bits for every batch, but one worker sums a whole row while seven wait: keep 8 parts",
            ),
            (
                by(lambda batch: max(8 // batch, 1), torch.float32),
                "float32 makes the difference smaller and leaves its cause, an order that depends on the batch",
            ),
            (by(lambda batch: batch), "now a larger batch cuts finer: the number of parts must not know the batch"),
        ],
    )
