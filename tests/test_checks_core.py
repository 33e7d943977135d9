"""The core of the checks: what they accept, what they say, and which mistake they name."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.course import checks
from labutils.course.checks import (
    CheckFailed,
    StillBlank,
    exercise,
    expect_close,
    expect_equal,
    expect_function,
    expect_raises,
    expect_shape,
    expect_true,
    expect_type,
)
from labutils.course.checks.compare import describe, difference, guess, same


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch):
    monkeypatch.setattr(checks.core, "RESULTS", {})
    monkeypatch.setattr(checks.core, "LISTENERS", [])
    before = list(checks.EXERCISES)
    yield
    checks.EXERCISES[:] = before


def speed(answer):
    expect_function(
        answer,
        lambda tokens, seconds: tokens / seconds,
        cases=[{"tokens": 10, "seconds": 4.0}, {"tokens": 3, "seconds": 2.0}],
        mistakes=[
            (lambda tokens, seconds: seconds / tokens, "upside down"),
            (lambda tokens, seconds: tokens // seconds, "cut off"),
            (lambda tokens, seconds: tokens / [], "list"),
        ],
    )


def make(body):
    body.__name__ = "speed"
    return exercise("9.1")(body)


def failure_of(check, *arguments):
    with pytest.raises(CheckFailed) as caught:
        check(*arguments)
    return caught.value


def test_exercise_prints_one_line(capsys):
    make(speed)(lambda tokens, seconds: tokens / seconds)
    assert capsys.readouterr().out == "✓ 9.1 speed\n"


def test_exercise_keeps_what_the_answer_prints_from_a_pass_and_shows_it_in_a_failure(capsys):
    def chatty(tokens, seconds):
        print("tokens are", tokens)
        print("warning", file=sys.stderr)
        return tokens / seconds

    make(speed)(chatty)
    assert capsys.readouterr() == ("✓ 9.1 speed\n", "")
    failure = failure_of(make(speed), lambda tokens, seconds: print("I give", tokens))
    assert "I give 3" in failure.printed


def test_failure_names_input_expected_actual_hint():
    text = str(failure_of(make(speed), lambda tokens, seconds: seconds / tokens))
    for words in ("✗ 9.1 speed", "tokens=10, seconds=4.0", "2.5", "0.4", "upside down"):
        assert words in text


def test_failure_shows_the_learner_no_library_traceback():
    failure = failure_of(make(speed), lambda tokens, seconds: 1.0)
    assert failure._render_traceback_() == str(failure).splitlines()
    assert failure.__cause__ is None and failure.__suppress_context__


@pytest.mark.parametrize("order", [1, -1])
def test_mistake_that_explains_most_cases_wins(order):
    mistakes = [
        (lambda tokens, seconds: {10: 2.0, 3: 7.0}[tokens], "coincidence in the first case"),
        (lambda tokens, seconds: tokens // seconds, "cut off"),
    ]

    def check(answer):
        cases = [{"tokens": 10, "seconds": 4.0}, {"tokens": 3, "seconds": 2.0}]
        expect_function(answer, lambda tokens, seconds: tokens / seconds, cases=cases, mistakes=mistakes[::order])

    assert failure_of(make(check), lambda tokens, seconds: tokens // seconds).hint == "cut off"


def test_mistake_recognised_by_its_exception():
    failure = failure_of(make(speed), lambda tokens, seconds: tokens / [])
    assert failure.hint == "list"
    assert "TypeError" in failure.problem


def test_unknown_mistake_gets_no_wrong_hint():
    assert failure_of(make(speed), lambda tokens, seconds: 17.0).hint == ""


def test_blank_fails_as_not_implemented():
    def blank(tokens, seconds):
        raise NotImplementedError("Exercise 9.1: speed")

    failure = failure_of(make(speed), blank)
    assert isinstance(failure, StillBlank) and isinstance(failure, NotImplementedError)
    assert not isinstance(failure_of(make(speed), lambda tokens, seconds: _other()), NotImplementedError)


def _other():
    raise NotImplementedError("aten::round is not implemented for 'Half'")


def test_blank_does_not_pass_as_the_expected_error():
    def blank():
        raise NotImplementedError("Exercise 9.1: speed")

    assert isinstance(failure_of(make(lambda answer: expect_raises(answer, RuntimeError)), blank), StillBlank)
    make(lambda answer: expect_raises(answer, ZeroDivisionError, x=0))(lambda x: 1 / x)
    failure = failure_of(make(lambda answer: expect_raises(answer, ZeroDivisionError, hint="h", x=1)), lambda x: 1 / x)
    assert "expected ZeroDivisionError" in failure.problem and failure.hint == "h"


def test_exception_in_the_answer_says_where():
    def answer(tokens, seconds):
        return undefined_name

    failure = failure_of(make(speed), answer)
    assert "NameError" in failure.problem and "undefined_name" in failure.where
    assert "inside the EXERCISE cell" in failure.hint
    assert str(os.getcwd()) not in str(failure)


def test_exit_in_the_answer_is_a_failure():
    assert "ends the program" in failure_of(make(speed), lambda tokens, seconds: sys.exit(0)).problem


def test_wrong_signature_and_no_function():
    assert "arguments" in failure_of(make(speed), lambda a: 1).hint
    assert "must be a function" in failure_of(make(speed), 3.0).problem


def test_changed_input_is_found():
    def check(answer):
        expect_function(answer, lambda x: x + 1, cases=[{"x": torch.zeros(2)}])

    assert "changed its input `x`" in failure_of(make(check), lambda x: x.add_(1)).problem
    make(check)(lambda x: x + 1)


def test_each_call_gets_a_fresh_input():
    def check(answer):
        reference = lambda x: x.pop()  # noqa: E731
        expect_function(answer, reference, cases=[{"x": [1, 2]}], mistakes=[(reference, "")], may_modify=True)

    make(check)(lambda x: x.pop())


def test_case_may_be_a_function():
    make(lambda answer: expect_function(answer, lambda x: x * 2, cases=[lambda: {"x": 2}]))(lambda x: x + x)


def test_expected_error_must_be_raised():
    check = lambda answer: expect_function(answer, lambda x: 1 / x, cases=[{"x": 0}])  # noqa: E731
    make(check)(lambda x: 1 / x)
    assert "error was to be raised" in failure_of(make(check), lambda x: 0).problem


def test_results_and_listeners():
    heard = []
    checks.core.LISTENERS.append(lambda name, ok: heard.append((name, ok)))
    failure_of(make(speed), lambda tokens, seconds: 0.0)
    make(speed)(lambda tokens, seconds: tokens / seconds)
    assert heard == [("9.1 speed", False), ("9.1 speed", True)]
    assert checks.core.RESULTS == {"9.1 speed": True}


def test_expect_close_and_equal():
    expect_close(0.1 + 0.2, 0.3)
    expect_equal("a", "a")
    failure = failure_of(expect_close, 4000, 500.0)
    assert failure.hint.startswith("your value is 8 times too large")
    with pytest.raises(CheckFailed, match="bits"):
        expect_close(4000, 500.0, mistakes=[(4000, "in bits")])
    with pytest.raises(CheckFailed, match="lazy"):
        expect_close(4000, 500.0, mistakes=[(lambda: 4000, "lazy")])
    failure_of(expect_equal, 0.1 + 0.2, 0.3)


def test_expect_shape_type_true():
    expect_shape(torch.zeros(2, 3), (2, 3))
    expect_true(True, "never said")
    with pytest.raises(CheckFailed, match="transpose it"):
        expect_shape(torch.zeros(3, 2), (2, 3), mistakes=[((3, 2), "transpose it")])
    with pytest.raises(CheckFailed, match="expected a tensor; got a list"):
        expect_shape([], (0,))
    with pytest.raises(CheckFailed, match="a list; got a tuple"):
        expect_type((), list)


@pytest.mark.parametrize(
    ("actual", "expected", "verdict"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (math.inf, 1.0, False),
        (None, 0, False),
        (2**70, 2**70, True),
        (1 + 2j, 1 + 2j, True),
        ({"a": [1.0]}, {"a": [1.0 + 1e-9]}, True),
        ({"a": 1}, {"b": 1}, False),
        ((1, 2), [1, 2], True),
        ([1], [1, 2], False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), [1.0, 1.0], False),
        (torch.ones(2), np.ones(2), True),
        (torch.ones(2, dtype=torch.int8), torch.ones(2), False),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2), True),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.tensor([True]), torch.tensor([True]), True),
        (np.float32(0.5), 0.5, True),
        (torch.tensor(0.5), 0.5, True),
        (0.5, torch.tensor(0.5), True),
        (np.array(3), 3, True),
        ([torch.tensor(0.5)], [0.5], True),
        (torch.tensor([0.5]), 0.5, False),
        (torch.tensor(0.6), 0.5, False),
        (torch.tensor(0.5), "0.5", False),
        (np.bool_(True), True, True),
        ("text", "text", True),
    ],
)
def test_same(actual, expected, verdict):
    assert same(actual, expected) is verdict


def test_same_with_dtype_is_strict():
    assert not same(torch.ones(2), torch.ones(2).double(), dtype=True)
    assert same((0.5, -4.0), (0.5, -4)) and not same((0.5, -4.0), (0.5, -4), dtype=True)
    assert same(np.int64(3), 3, dtype=True) and same(torch.tensor(3), 3, dtype=True)
    assert "index 1: expected -4; got -4.0" in difference((0.5, -4.0), (0.5, -4), dtype=True)
    assert difference(-4.0, -4, dtype=True) == "expected an int; got a float"
    assert same(torch.ones(2), torch.ones(2).double())


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1), st.data())
def test_same_is_reflexive_and_sees_any_changed_element(values, data):
    tensor = torch.tensor(values)
    assert same(tensor, tensor.clone()) and same(values, list(values))
    index = data.draw(st.integers(0, len(values) - 1))
    changed = tensor.double()
    changed[index] += 1 + abs(changed[index])
    assert not same(changed, tensor.double())


@given(st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.lists(st.integers()), st.binary()))
def test_describe_is_one_short_line(value):
    text = describe(value)
    assert len(text) <= 300 and "\n" not in text


def test_difference_points_at_the_place():
    assert "[1, 0]" in difference(torch.tensor([[1, 2], [9, 4]]), torch.tensor([[1, 2], [3, 4]]))
    assert "index 1" in difference([1, 5], [1, 2])
    assert "3 items; got 2" in difference([1, 2], [1, 2, 3])
    assert "dtype" in difference(torch.ones(1), torch.ones(1, dtype=torch.int8))


def test_difference_of_texts():
    assert "character 4" in difference("the red", "the cat")


def test_guess_knows_common_mistakes():
    assert "return" in guess(None, 1.0)
    assert "transpose" in guess(torch.zeros(2, 3), torch.zeros(3, 2))
    assert "sign" in guess(-2.0, 2.0)
    assert "1000 times too small" in guess(torch.tensor([0.001, 0.002]), torch.tensor([1.0, 2.0]))
    assert "1000 times too small" in guess(torch.tensor(0.001), 1.0)
    assert guess(3.3, 1.0) == ""


def test_failure_in_ipython_is_short_and_without_library_frames():
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell()
    shell.user_ns["check"] = make(speed)
    with capture_output() as captured:
        shell.run_cell("check(lambda tokens, seconds: seconds / tokens)", store_history=False)
    assert "upside down" in captured.stdout
    assert "Traceback" not in captured.stdout and "expect.py" not in captured.stdout
