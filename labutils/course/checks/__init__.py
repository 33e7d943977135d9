"""Checks that teach: each names the input, the expected and the actual value, and the mistake.

A chapter's checks live in ``labutils/course/checks/chNN.py`` and read like lists of mistakes::

    from labutils.course.checks import exercise, expect_function

    @exercise("0.1")
    def tokens_per_second(answer):
        expect_function(
            answer,
            lambda tokens, seconds: tokens / seconds,
            cases=[{"tokens": 10, "seconds": 2.0}, {"tokens": 3, "seconds": 4.0}],
            mistakes=[
                (lambda tokens, seconds: seconds / tokens,
                 "upside down: that is seconds per token; divide tokens by seconds"),
                (lambda tokens, seconds: tokens // seconds,
                 "`//` throws the fraction away: divide with `/`"),
            ],
        )

The cell in the notebook is then ``ch00.tokens_per_second(tokens_per_second)``: it raises
`CheckFailed` or prints the one line ``✓ 0.1 tokens_per_second``. ``labutils.course`` has the how-to.
"""

from labutils.course.checks.core import EXERCISES, LISTENERS, RESULTS, CheckFailed, StillBlank, exercise, passed
from labutils.course.checks.expect import (
    cases_of,
    expect_close,
    expect_equal,
    expect_function,
    expect_raises,
    expect_shape,
    expect_true,
    expect_type,
)

__all__ = [
    "EXERCISES",
    "LISTENERS",
    "RESULTS",
    "CheckFailed",
    "StillBlank",
    "cases_of",
    "exercise",
    "expect_close",
    "expect_equal",
    "expect_function",
    "expect_raises",
    "expect_shape",
    "expect_true",
    "expect_type",
    "passed",
]
