"""Compare a learner's answer with the right one and name the mistake that explains the difference."""

import copy
import functools

from labutils.course.checks.compare import ATOL, RTOL, describe, difference, guess, is_array, same, shorten, type_name
from labutils.course.checks.core import CheckFailed, from_error, is_blank
from labutils.lab.language import translated


def cases_of(names: str, *rows) -> list[dict]:
    """Cases for `expect_function` as a table: the arguments' names, then their values case by case.

    >>> cases_of("rows columns", (2, 3), (1, 1))
    [{'rows': 2, 'columns': 3}, {'rows': 1, 'columns': 1}]
    """
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def expect_function(
    answer, reference, *, cases, mistakes=(), rtol=RTOL, atol=ATOL, dtype=False, may_modify=False
) -> None:
    """Compare a learner's function with a reference on several inputs.

    Args:
        answer: The learner's function.
        reference: The right one, with the same keyword arguments.
        cases: Inputs: each a dict of keyword arguments, or a function that makes one afresh.
        mistakes: Pairs (wrong function, hint). The hint is shown when the learner's function
            gives the same as the wrong one, or raises the same error. A wrong *value* serves too.
        rtol: Relative tolerance of floats.
        atol: Absolute tolerance of floats.
        dtype: Whether the exact dtype counts, or only its kind.
        may_modify: Whether the answer may change its inputs.

    Raises:
        CheckFailed: Naming the first input on which the two differ.
    """
    if not callable(answer):
        raise CheckFailed("the answer must be a function", actual=describe(answer))
    close = functools.partial(same, rtol=rtol, atol=atol, dtype=dtype)
    inputs = [_Case(case, may_modify) for case in cases]
    ours = [case.outcome(reference) for case in inputs]
    theirs = [case.outcome(answer, learner=True) for case in inputs]
    wrong = [i for i, (a, e) in enumerate(zip(theirs, ours, strict=True)) if not _agree(a, e, close)]
    if not wrong:
        return
    first = wrong[0]
    hint = _recognise(mistakes, inputs, theirs, wrong, close)
    _fail(theirs[first], ours[first], inputs[first].text, hint, dtype)


class _Case:
    """One input, given afresh to every function that is tried on it."""

    def __init__(self, case, may_modify: bool):
        self._case, self._may_modify = case, may_modify
        self.text = shorten(", ".join(f"{k}={describe(v)}" for k, v in self.make().items()))

    def make(self) -> dict:
        return self._case() if callable(self._case) else copy.deepcopy(self._case)

    def outcome(self, function, *, learner: bool = False):
        """``(True, value)`` or ``(False, exception)``."""
        arguments = self.make()
        try:
            value = function(**arguments)
        except (Exception, SystemExit) as error:
            return False, error
        if learner and not self._may_modify:
            self._refuse_changes(arguments)
        return True, value

    def _refuse_changes(self, arguments: dict) -> None:
        for name, before in self.make().items():
            comparable = isinstance(before, (list, dict)) or is_array(before)
            if comparable and not same(arguments[name], before, rtol=0.0, atol=0.0, dtype=True):
                raise CheckFailed(
                    translated("your function changed its input `{name}`", name=name),
                    given=self.text,
                    hint=translated("work on a copy of `{name}`, or make a new value", name=name),
                )


def _agree(left, right, close) -> bool:
    if left[0] != right[0]:
        return False
    if left[0]:
        return close(left[1], right[1])
    return type(left[1]) is type(right[1]) and str(left[1]) == str(right[1])


def _recognise(mistakes, inputs, theirs, wrong, close) -> str:
    """The hint of the mistake that explains most of the wrong cases, the first among equals."""
    best, most = "", 0
    for mistake, hint in mistakes:
        tried = {i: _outcome_of(mistake, inputs[i]) for i in wrong}
        count = sum(_agree(theirs[i], tried[i], close) for i in wrong)
        if count > most:
            best, most = hint, count
    return best


def _outcome_of(mistake, case: _Case):
    return case.outcome(mistake) if callable(mistake) else (True, mistake)


def _fail(theirs, ours, given: str, hint: str, dtype: bool) -> None:
    is_value, actual = theirs
    if not is_value:
        raise from_error(actual, given=given, hint=hint) from None
    if not ours[0]:
        rule = f"{type(ours[1]).__name__}: {ours[1]}"
        raise CheckFailed("an error was to be raised", given=given, expected=rule, actual=describe(actual), hint=hint)
    raise _mismatch(actual, ours[1], given, hint, dtype)


def _mismatch(actual, expected, given, hint, dtype=False) -> CheckFailed:
    words = [describe(expected), describe(actual)]
    if words[0] == words[1]:  # they differ further to the right
        words = [shorten(repr(expected)), shorten(repr(actual))]
    return CheckFailed(
        difference(actual, expected, dtype=dtype) or translated("the value is not the expected one"),
        given=given,
        expected=words[0],
        actual=words[1],
        hint=hint or guess(actual, expected),
    )


def expect_close(actual, expected, *, given="", mistakes=(), hint="", rtol=RTOL, atol=ATOL, dtype=False) -> None:
    """Compare one value with the expected one.

    Args:
        actual: The learner's value.
        expected: The right one.
        given: What it was computed from, in words.
        mistakes: Pairs (wrong value, or a function that makes it; hint).
        hint: What to say when no mistake is recognised.
        rtol: Relative tolerance of floats.
        atol: Absolute tolerance of floats.
        dtype: Whether the exact dtype counts, or only its kind.
    """
    close = functools.partial(same, rtol=rtol, atol=atol, dtype=dtype)
    if close(actual, expected):
        return
    for wrong, words in mistakes:
        if close(actual, wrong() if callable(wrong) else wrong):
            raise _mismatch(actual, expected, given, words, dtype)
    raise _mismatch(actual, expected, given, hint, dtype)


def expect_equal(actual, expected, *, given="", mistakes=(), hint="") -> None:
    """As `expect_close`, without a tolerance: for integers, texts and exact dtypes."""
    expect_close(actual, expected, given=given, mistakes=mistakes, hint=hint, rtol=0.0, atol=0.0, dtype=True)


def expect_true(condition, problem: str, *, given="", expected="", actual="", hint="") -> None:
    """Require a property; ``problem`` says what is wrong when it does not hold."""
    if not condition:
        raise CheckFailed(problem, given=given, expected=expected, actual=actual, hint=hint)


def expect_type(actual, kind: type, *, given="", hint="") -> None:
    """Require a type."""
    words = translated("expected a {expected}; got {actual}", expected=kind.__name__, actual=type_name(actual))
    expect_true(isinstance(actual, kind), words, given=given, actual=describe(actual), hint=hint)


def expect_shape(actual, shape: tuple, *, given="", mistakes=(), hint="") -> None:
    """Require a shape; a mistake is a pair (wrong shape, hint)."""
    words = translated("expected a {expected}; got {actual}", expected="tensor", actual=type_name(actual))
    expect_true(is_array(actual), words, given=given, hint=hint)
    expect_equal(tuple(actual.shape), tuple(shape), given=given, mistakes=mistakes, hint=hint)


def expect_raises(answer, error: type, *, hint="", **arguments) -> None:
    """Require that ``answer(**arguments)`` raises ``error``."""
    given = ", ".join(f"{key}={describe(value)}" for key, value in arguments.items())
    try:
        value = answer(**arguments)
    except error as raised:
        if is_blank(raised):
            raise
        return
    words = translated("expected {error} to be raised", error=error.__name__)
    raise CheckFailed(words, given=given, actual=describe(value), hint=hint)
