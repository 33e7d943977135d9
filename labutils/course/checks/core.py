"""What a check is: it fails as a `CheckFailed` that teaches, or prints one line."""

import contextlib
import functools
import io
import linecache
import pathlib
import traceback

from labutils.course.checks.compare import shorten
from labutils.course.checks.shadows import find_shadow
from labutils.lab.language import translated

EXERCISES: list[str] = []  # "0.1 tokens_per_second", in the order of definition
RESULTS: dict[str, bool] = {}  # what was checked in this process, and whether it passed
LISTENERS: list = []  # called as listener(name, passed); `labutils.course.progress` listens

_LABUTILS = pathlib.Path(__file__).resolve().parents[2]


class CheckFailed(AssertionError):
    """A learner's answer is not right yet. Its text says what was given, expected and got.

    Args:
        problem: One sentence that says what is wrong.
        given: The input on which it is wrong.
        expected: The right value.
        actual: The learner's value.
        hint: What to change.
        where: The line of the learner's code that raised, where one did.
    """

    def __init__(self, problem: str, *, given="", expected="", actual="", hint="", where=""):
        super().__init__(problem)
        said = [
            translated(text) if isinstance(text, str) else text for text in (problem, given, expected, actual, hint)
        ]
        self.problem, self.given, self.expected, self.actual, self.hint = said
        self.where = where
        self.name = self.printed = ""

    def __str__(self) -> str:
        head = f"✗ {self.name}: {self.problem}" if self.name else self.problem
        labels = {
            "given": translated("given"),
            "expected": translated("expected"),
            "actual": translated("actual"),
            "where": translated("where"),
            "printed": translated("printed"),
            "hint": translated("hint"),
        }
        lines = [f"    {label:<9} {getattr(self, row)}" for row, label in labels.items() if getattr(self, row)]
        return "\n".join([head, *lines])

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback through this library."""
        return str(self).splitlines()


class StillBlank(CheckFailed, NotImplementedError):
    """The exercise still raises the ``NotImplementedError`` of the learner's copy."""


def exercise(number: str):
    """Decorate the check of exercise ``number``; the function's name is the exercise's name.

    The check passes when the function returns. What the learner's code prints meanwhile is kept
    back, so that a pass shows one deterministic line; a failure shows its last words.
    """

    def decorate(check):
        name = f"{number} {check.__name__}"
        if name not in EXERCISES:
            EXERCISES.append(name)

        @functools.wraps(check)
        def run(*args, **kwargs) -> None:
            failure = _run(check, args, kwargs)
            _record(name, failure is None)
            if failure is None:
                return passed(name)
            failure.name = name
            raise failure.with_traceback(None) from None

        return run

    return decorate


def passed(name: str) -> None:
    """Print the one line that says an exercise is right, such as ``✓ 0.1 tokens_per_second``."""
    print(f"✓ {name}")


class _Tail(io.TextIOBase):
    """Keeps the end of what is printed, however much that is."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[-2000:]
        return len(text)


def _run(check, args, kwargs) -> CheckFailed | None:
    printed = _Tail()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            check(*args, **kwargs)
    except CheckFailed as failure:
        result = failure
    except (Exception, SystemExit) as error:
        result = from_error(error)
    else:
        return None
    result.printed = shorten(" | ".join(printed.text.strip().splitlines()[-3:]))
    shadow = None if isinstance(result, StillBlank) else find_shadow(check.__name__)
    result.hint = "; ".join(str(part) for part in (shadow, result.hint) if part)
    return result


def _record(name: str, is_right: bool) -> None:
    RESULTS[name] = is_right
    for listener in LISTENERS:
        listener(name, is_right)


def from_error(error: BaseException, *, given: str = "", hint: str = "") -> CheckFailed:
    """The failed check that stands for an exception in the learner's code."""
    if is_blank(error):
        return StillBlank(translated("still blank ({error})", error=error), hint="write your answer in the cell above")
    if isinstance(error, SystemExit):
        return CheckFailed("your code ends the program", given=given, hint="leave exit() out")
    words = shorten(f"{type(error).__name__}: {error}".rstrip(": "))
    where = _where(error)
    problem = translated("your code raised {error}", error=words)
    return CheckFailed(problem, given=given, where=where, hint=hint or _advice(error))


def is_blank(error: BaseException) -> bool:
    """Whether an exception is the one that the learner's copy raises in place of an answer."""
    return isinstance(error, NotImplementedError) and str(error).startswith("Exercise ")


def _where(error: BaseException) -> str:
    """The last line of the learner's own code that the exception passed through."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = frame.f_code.co_filename
        if "site-packages" in path or _LABUTILS in pathlib.Path(path).parents:
            continue
        line = linecache.getline(path, number, frame.f_globals).strip()
        place = translated("line {number} of {name}", number=number, name=frame.f_code.co_name)
        return place + (f": {line}" if line else "")
    return ""


def _advice(error: BaseException) -> str:
    if isinstance(error, NameError):
        return translated("define every name that you use inside the EXERCISE cell itself")
    if isinstance(error, TypeError) and "argument" in str(error):
        return translated("keep the function's name and its arguments as they were given")
    if isinstance(error, RecursionError):
        return translated("your function calls itself without an end")
    return ""
