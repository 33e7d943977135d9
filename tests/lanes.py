"""The three lanes of an exercise: the solution passes, the blank fails, each wrong answer gets its own hint."""

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot
from smaller import smaller

from labutils.course.checks import CheckFailed
from labutils.course.exercises import Exercise, blank
from labutils.course.isolation import Isolation
from labutils.course.source import Chapter, read_chapter

HEADER = re.compile(r"^# %% WRONG (\w+) \| (.+?)( \| same)?\s*$")


@dataclass(frozen=True)
class WrongAnswer:
    """One plausible mistake: an exercise cell and the words that its hint must hold."""

    exercise: str
    words: str
    source: str
    may_share: bool  # whether another wrong answer of the exercise may get the same hint


def read_wrong_answers(path: Path) -> list[WrongAnswer]:
    """The cells of ``wrong_answers/NN_name.py``.

    A header is ``# %% WRONG name | words``; a third part ``| same`` allows a hint to be shared.
    """
    answers: list[WrongAnswer] = []
    header, lines = None, []
    for line in [*path.read_text(encoding="utf-8").splitlines(), "# %% END"]:
        if line.startswith("# %%"):
            if header:
                answers.append(WrongAnswer(header[1], header[2], "\n".join(lines).strip(), bool(header[3])))
            header, lines = HEADER.match(line), []
            if not header and "WRONG" in line:
                raise ValueError(f"a header is `# %% WRONG name | words`; got {line!r} in {path.name}")
        else:
            lines.append(line)
    return answers


def run_lanes(source: Path, wrong_answers: Path) -> list[str]:
    """Run all three lanes of a chapter in this process; one sentence per failure.

    After each exercise the names are put back as `labutils grade` does, so that no later cell may need more.
    """
    chapter = read_chapter(source)
    wrong = read_wrong_answers(wrong_answers) if wrong_answers.is_file() else []
    names = {exercise.name for exercise in chapter.exercises}
    failures = [f"no exercise is called {w.exercise!r} in {source.name}" for w in wrong if w.exercise not in names]
    namespace: dict = {"__name__": "__main__"}
    by_cell = {exercise.cell: exercise for exercise in chapter.exercises}
    marked = {index for exercise in chapter.exercises for index in (exercise.cell, exercise.check)}
    code = {index: cell.source for index, cell in enumerate(chapter.cells) if cell.cell_type == "code"}
    lessons, unknown = smaller(chapter.stem, {index: text for index, text in code.items() if index not in marked})
    failures += [f"{source.name} has no {size!r}, which tests/smaller.py makes smaller" for size in unknown]
    isolation = Isolation(namespace, {e.name: code[e.cell] for e in chapter.exercises}, True)
    checks = {exercise.check for exercise in chapter.exercises}
    try:
        for index, text in (code | lessons).items():
            if index in by_cell:
                failures += _lanes_of(chapter, by_cell[index], namespace, wrong)
            isolation.before_cell(text)
            if index in checks:  # the solution's own check has run among the lanes; its imports are needed below
                _attempt(text, namespace, f"{source.name}, cell {index}")
            else:
                _execute(text, namespace, f"{source.name}, cell {index}")
            isolation.after_cell(text)
    finally:
        matplotlib.pyplot.close("all")
    return failures


def _lanes_of(chapter: Chapter, exercise: Exercise, namespace: dict, wrong: list[WrongAnswer]) -> list[str]:
    solution, check = (chapter.cells[i].source for i in (exercise.cell, exercise.check))
    mine = [answer for answer in wrong if answer.exercise == exercise.name]
    failures = _solution_lane(exercise, solution, check, namespace)
    error, _ = _both(blank(solution, exercise), check, namespace)
    if not isinstance(error, NotImplementedError):
        failures.append(f"{exercise.title}: the blank must fail with NotImplementedError; got {error!r}")
    if len(mine) < 3:
        failures.append(f"{exercise.title}: at least three wrong answers; got {len(mine)}")
    hints: dict[str, str] = {}
    for answer in mine:
        failures += _wrong_lane(exercise, answer, check, namespace, hints)
    return failures


def _solution_lane(exercise: Exercise, solution: str, check: str, namespace: dict) -> list[str]:
    error, printed = _both(solution, check, namespace)
    if error is not None:
        return [f"{exercise.title}: the solution must pass; got {error!r}"]
    if printed != f"✓ {exercise.title}\n":
        return [f"{exercise.title}: the check prints exactly '✓ {exercise.title}'; got {printed!r}"]
    return []


def _wrong_lane(exercise: Exercise, answer: WrongAnswer, check: str, namespace: dict, hints: dict) -> list[str]:
    error, _ = _both(answer.source, check, namespace)
    label = f"{exercise.title}, wrong answer '{answer.words}'"
    if not isinstance(error, CheckFailed) or isinstance(error, NotImplementedError):
        return [f"{label}: must fail with CheckFailed; got {error!r}"]
    if answer.words not in error.hint:
        return [f"{label}: its words must stand in the hint; got {error.hint!r}"]
    other = hints.setdefault(error.hint, answer.words)
    if other != answer.words and not answer.may_share:
        return [f"{label}: each mistake has a hint of its own; '{other}' gets the same: {error.hint!r}"]
    return []


def _both(answer: str, check: str, namespace: dict) -> tuple[BaseException | None, str]:
    """Run an exercise cell and its check in a copy of the namespace: the error, and what the check printed."""
    scratch = dict(namespace)
    try:
        error, _ = _attempt(answer, scratch, "the exercise cell")
        return (error, "") if error else _attempt(check, scratch, "the check cell")
    finally:
        scratch.clear()  # its functions know it: a circle that would keep what the chapter deletes


def _attempt(source: str, namespace: dict, label: str) -> tuple[BaseException | None, str]:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            _execute(source, namespace, label)
    except Exception as error:
        return error, printed.getvalue()
    return None, printed.getvalue()


def _execute(source: str, namespace: dict, label: str) -> None:
    exec(compile(source, f"<{label}>", "exec"), namespace)


def main(arguments: list[str]) -> int:
    """``python tests/lanes.py NN_name``: run the lanes of one chapter and print what fails."""
    root = Path(__file__).resolve().parents[1]
    path = root / "notebooks" / "source" / f"{arguments[0]}.py"
    failures = run_lanes(path, root / "tests" / "wrong_answers" / f"{arguments[0]}.py")
    print("\n".join(failures) or "all lanes hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
