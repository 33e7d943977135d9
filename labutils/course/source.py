"""A chapter's source in jupytext's percent format: read it, and hold it to the course's format."""

import re
from dataclasses import dataclass
from pathlib import Path

from labutils.course.exercises import Exercise, ExerciseError, chapter_number, exercises

CODE_LINES, MARKDOWN_WORDS = 18, 150  # beyond these a cell is worth a warning; the aims are 15 and 120
ASKED = {"minutes": r"\bminutes?\b", "lines": r"\blines?\b", "difficulty": r"\bdifficulty\b"}


@dataclass(frozen=True)
class Chapter:
    """One source file: its cells as notebook nodes, and its exercises."""

    path: Path
    cells: list
    exercises: list[Exercise]

    @property
    def stem(self) -> str:
        """The name of source and notebooks, without the ending."""
        return self.path.stem


@dataclass(frozen=True)
class Findings:
    """What the format forbids, and what it advises against."""

    errors: list[str]
    warnings: list[str]


def sources(root: Path) -> list[Path]:
    """The sources of all chapters, in order."""
    return sorted((root / "notebooks" / "source").glob("[0-9][0-9]_*.py"))


def read_chapter(path: Path) -> Chapter:
    """Read one source.

    Raises:
        ExerciseError: When its exercises do not follow the format; the text names the file.
    """
    import jupytext

    cells = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent").cells
    try:
        return Chapter(path, cells, exercises(cells, chapter_number(path.stem)))
    except ExerciseError as error:
        raise ExerciseError(f"{path.name}: {error}") from None


def examine(chapter: Chapter) -> Findings:
    """Hold a chapter to the format: each finding names the file and the cell."""
    errors, warnings = [], []
    if not chapter.cells or chapter.cells[0].cell_type != "markdown":
        errors.append(f"{chapter.path.name}: the first cell is Markdown: the title and the goal")
    for exercise in chapter.exercises:
        errors += [f"{chapter.path.name}, cell {exercise.cell}: {e}" for e in _examine_exercise(chapter, exercise)]
    for index, cell in enumerate(chapter.cells):
        length = _length_warning(cell)
        if length:
            warnings.append(f"{chapter.path.name}, cell {index}: {length}")
        if cell.cell_type == "code" and re.search(r"^\s*[%!]", cell.source, flags=re.MULTILINE):
            errors.append(f"{chapter.path.name}, cell {index}: no magics or shell lines in a source")
    return Findings(errors, warnings)


def _examine_exercise(chapter: Chapter, exercise: Exercise) -> list[str]:
    """What the text above an exercise lacks."""
    text, index = "", exercise.cell - 1
    while index >= 0 and chapter.cells[index].cell_type == "markdown":
        text, index = chapter.cells[index].source + "\n" + text, index - 1
    lacks = [
        f"the text above names {what}" for what, words in ASKED.items() if not re.search(words, text, re.IGNORECASE)
    ]
    if f"Exercise {exercise.number}" not in text:
        lacks.insert(0, f"the text above is headed 'Exercise {exercise.number}', the number by order")
    hints = len(re.findall(r"<details>.*?</details>", text, flags=re.DOTALL))
    if hints < 2:
        lacks.append(f"two hints in <details> stand above; got {hints}")
    source = chapter.cells[exercise.cell].source
    if "### BEGIN SOLUTION" not in source or "### END SOLUTION" not in source:
        lacks.append("the answer stands between ### BEGIN SOLUTION and ### END SOLUTION")
    return [f"`# EXERCISE {exercise.name}`: {words}" for words in lacks]


def _length_warning(cell) -> str:
    if cell.cell_type == "code":
        count = sum(1 for line in cell.source.splitlines() if line.strip())
        return f"{count} lines of code; aim at 15" if count > CODE_LINES else ""
    prose = re.sub(r"<details>.*?</details>|<[^>]+>|\$\$.*?\$\$", " ", cell.source, flags=re.DOTALL)
    count = len(prose.split())
    return f"{count} words; aim at 120" if count > MARKDOWN_WORDS else ""
