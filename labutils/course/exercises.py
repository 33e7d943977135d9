"""Exercises in notebooks: find them, blank them, and move them by name from one copy to another."""

import ast
import copy
import re
from dataclasses import dataclass

MARKER = re.compile(r"^#\s*(EXERCISE|CHECK)\s+([A-Za-z_]\w*)\s*$")
BEGIN = re.compile(r"^\s*### BEGIN SOLUTION\s*$")
END = re.compile(r"^\s*### END SOLUTION\s*$")


class ExerciseError(ValueError):
    """A notebook's exercises do not follow the format; the text names the cell."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: where it and its check stand among a notebook's cells."""

    number: str
    name: str
    cell: int
    check: int

    @property
    def title(self) -> str:
        """Number and name, as checks print them: ``2.3 dequantize``."""
        return f"{self.number} {self.name}"


def chapter_number(stem: str) -> int:
    """The chapter of a notebook's name: ``02_quantization`` gives 2.

    >>> chapter_number("02_quantization")
    2
    """
    match = re.match(r"(\d{2})_", stem)
    if not match:
        raise ExerciseError(f"a notebook's name begins with two digits and an underscore; got {stem!r}")
    return int(match.group(1))


def marker(cell) -> tuple[str, str] | None:
    """``("EXERCISE", name)`` or ``("CHECK", name)`` of a code cell, by its first line; else None."""
    if cell["cell_type"] != "code":
        return None
    lines = _text(cell).strip().splitlines()
    match = MARKER.match(lines[0].strip()) if lines else None
    return (match.group(1), match.group(2)) if match else None


def _text(cell) -> str:
    source = cell.get("source", "")
    return "".join(source) if isinstance(source, list) else source


def find(cells, kind: str) -> dict[str, list[int]]:
    """The positions of the cells of one kind, "EXERCISE" or "CHECK", by name."""
    found: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        mark = marker(cell)
        if mark and mark[0] == kind:
            found.setdefault(mark[1], []).append(index)
    return found


def exercises(cells, chapter: int) -> list[Exercise]:
    """All exercises of an authored notebook, numbered by their order.

    Raises:
        ExerciseError: For an exercise without its check right after it, or a name used twice.
    """
    answers, checks = find(cells, "EXERCISE"), find(cells, "CHECK")
    for name, places in [*answers.items(), *checks.items()]:
        if len(places) > 1:
            raise ExerciseError(f"an exercise's name is used once; got {name!r} in cells {places}")
    for name in checks.keys() - answers.keys():
        raise ExerciseError(f"each CHECK has its EXERCISE; got only `# CHECK {name}` in cell {checks[name][0]}")
    result = []
    for order, (name, (cell,)) in enumerate(answers.items(), start=1):
        following = next((i for i in range(cell + 1, len(cells)) if cells[i]["cell_type"] == "code"), None)
        if following is None or following != checks.get(name, [None])[0]:
            raise ExerciseError(f"the code cell after `# EXERCISE {name}` (cell {cell}) must begin `# CHECK {name}`")
        result.append(Exercise(f"{chapter}.{order}", name, cell, following))
    return result


def blank(source: str, exercise: Exercise) -> str:
    """The learner's copy of an exercise: each solution replaced by one ``raise``.

    Raises:
        ExerciseError: Where BEGIN and END SOLUTION do not pair up, or nothing is between them.
    """
    lines, inside, begun = [], False, ""
    for line in source.splitlines():
        if BEGIN.match(line):
            _require(not inside, exercise, "a BEGIN SOLUTION inside another")
            inside, begun = True, line[: len(line) - len(line.lstrip())]
            lines.append(f'{begun}raise NotImplementedError("Exercise {exercise.number}: {exercise.name}")')
        elif END.match(line):
            _require(inside, exercise, "an END SOLUTION without its BEGIN")
            inside = False
        elif not inside:
            lines.append(line)
    _require(not inside, exercise, "a BEGIN SOLUTION without its END")
    _require(bool(BEGIN.search(source) or begun or "BEGIN SOLUTION" in source), exercise, "no BEGIN SOLUTION")
    return "\n".join(lines)


def _require(condition: bool, exercise: Exercise, got: str) -> None:
    if not condition:
        raise ExerciseError(f"`### BEGIN SOLUTION` and `### END SOLUTION` come in pairs; got {got} in {exercise.title}")


def _tree(source: str) -> str | None:
    try:
        return ast.dump(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@dataclass(frozen=True)
class Transplant:
    """A reference notebook that holds a learner's answers, and what could not be moved."""

    cells: list
    missing: tuple[str, ...]
    doubled: tuple[str, ...]
    changed_checks: tuple[str, ...]


def transplant(reference_cells, learner_cells, keep: frozenset[str] = frozenset()) -> Transplant:
    """A copy of the reference's cells with the learner's EXERCISE cells, matched by name.

    Only sources move: ids, tags and outputs stay the reference's. Exercises named in ``keep``, and
    those that the learner's notebook lacks or has twice, stay as they are in the reference.
    """
    cells = copy.deepcopy(list(reference_cells))
    theirs, checks = find(learner_cells, "EXERCISE"), find(learner_cells, "CHECK")
    missing, doubled, changed = [], [], []
    for name, (place,) in find(cells, "EXERCISE").items():
        found = theirs.get(name, [])
        if len(found) == 1 and name not in keep:
            cells[place]["source"] = _text(learner_cells[found[0]])
        (missing if not found else doubled if len(found) > 1 else []).append(name)
    for name, (place,) in find(cells, "CHECK").items():
        copies = [_text(learner_cells[i]) for i in checks.get(name, [])]
        if [_canonical(text) for text in copies] != [_canonical(_text(cells[place]))]:
            changed.append(name)
    return Transplant(cells, tuple(missing), tuple(doubled), tuple(changed))


def _canonical(source: str) -> str:
    return _tree(source) or "\n".join(line.rstrip() for line in source.strip().splitlines())
