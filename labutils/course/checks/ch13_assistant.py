"""Checks of chapter 13: what a latency badge says."""

import statistics

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.serving.queueing import latency_badge


def _badge(arrival_s, admitted_s, token_s):
    return tuple(latency_badge(arrival_s, admitted_s, token_s).values())


def _wrong(*, queue=None, ttft=None, per_token=None):
    """The right badge but for one number, computed from (arrival, admission, tokens)."""

    def answer(arrival_s, admitted_s, token_s):
        right = _badge(arrival_s, admitted_s, token_s)
        changed = [f and f(arrival_s, admitted_s, token_s) for f in (queue, ttft)]
        last = per_token(arrival_s, token_s) if per_token and len(token_s) > 1 else right[2]
        return (*(r if c is None else c for r, c in zip(right, changed, strict=False)), last)

    return answer


def _single(value):
    def answer(arrival_s, admitted_s, token_s):
        queue_s, ttft_s, per_token_s = _badge(arrival_s, admitted_s, token_s)
        return queue_s, ttft_s, value(ttft_s) if per_token_s is None else per_token_s

    return answer


def _divides_by_zero(arrival_s, admitted_s, token_s):
    return admitted_s - arrival_s, token_s[0] - arrival_s, (token_s[-1] - token_s[0]) / (len(token_s) - 1)


def _gaps(token_s):
    return [b - a for a, b in zip(token_s, token_s[1:], strict=False)]


@exercise("13.1")
def badge(answer):
    """Queue, time to first token and time per token of one answer."""
    expect_function(
        answer,
        _badge,
        cases=cases_of(
            "arrival_s admitted_s token_s",
            (1.0, 1.25, [1.5, 1.75, 2.5]),
            (0.0, 0.5, [2.0, 2.0, 2.0, 3.5]),
            (10.0, 10.0, [10.5, 11.0]),
            (3.0, 3.5, [4.0]),
        ),
        mistakes=[
            (
                _wrong(per_token=lambda a, t: (t[-1] - a) / len(t)),
                "the first token's wait is no part of it: begin at t_1",
            ),
            (_wrong(per_token=lambda a, t: (t[-1] - t[0]) / len(t)), "n tokens have n - 1 gaps: divide by those"),
            (
                _wrong(per_token=lambda a, t: (t[-1] - a) / (len(t) - 1)),
                "the first token's wait is no part of it: begin at t_1",
            ),
            (
                _wrong(per_token=lambda a, t: statistics.median(_gaps(t))),
                "take the mean gap: where guesses stand, several tokens come at once, and a median may be 0",
            ),
            (
                _wrong(queue=lambda a, m, t: t[0] - a),
                "the queue ends at admission; what follows is the prompt's reading",
            ),
            (
                _wrong(queue=lambda a, m, t: t[0] - m),
                "from admission to the first token is the prompt's reading, no queue",
            ),
            (_wrong(ttft=lambda a, m, t: t[0] - m), "the client has waited since its arrival: TTFT contains the queue"),
            (_divides_by_zero, "one token has no gap: return None for its time per token"),
            (_single(lambda ttft_s: 0.0), "0 would be infinitely fast: a single token has no time per token, None"),
            (
                _single(lambda ttft_s: ttft_s),
                "a single token has no time per token: TTFT does not stand in for it, None",
            ),
        ],
    )
