"""Read what a learner hands in, whatever it is, and find the chapter that it belongs to."""

import json
from dataclasses import dataclass
from pathlib import Path

from labutils.course.exercises import chapter_number, exercises, find

SIZE_LIMIT_BYTES = 50_000_000


class UnusableError(ValueError):
    """A file that cannot be checked; the text says why in one sentence."""


@dataclass(frozen=True)
class Reference:
    """The notebook that a hand-in is checked in: the solution, or the kit's pristine copy."""

    stem: str
    cells: list
    is_solution: bool

    @property
    def exercises(self):
        """Its exercises, numbered."""
        return exercises(self.cells, chapter_number(self.stem))


def read_hand_in(path: Path) -> list[dict]:
    """The cells of a notebook as plain dictionaries, from JupyterLab, Colab or anything alike.

    Raises:
        UnusableError: When the file is none, is too large, or is not a notebook of format 4.
    """
    try:
        if not path.is_file():
            raise UnusableError(f"{path.name}: there is no such file")
        if path.stat().st_size > SIZE_LIMIT_BYTES:
            raise UnusableError(f"{path.name}: a notebook has at most {SIZE_LIMIT_BYTES // 10**6} MB")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UnusableError):
            raise
        raise UnusableError(f"{path.name}: not a notebook ({type(error).__name__}: {str(error)[:80]})") from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list):
        raise UnusableError(f"{path.name}: a notebook of format 4 has a list of cells; this file has none")
    return [_plain(cell) for cell in cells if isinstance(cell, dict)]


def _plain(cell: dict) -> dict:
    """A cell's type, source and tags; all else in it belongs to the tool that saved it."""
    source = cell.get("source", "")
    if isinstance(source, list):
        source = "".join(line for line in source if isinstance(line, str))
    metadata = cell.get("metadata")
    tags = metadata.get("tags") if isinstance(metadata, dict) else None
    return {
        "cell_type": str(cell.get("cell_type", "")),
        "source": source if isinstance(source, str) else "",
        "tags": tags if isinstance(tags, list) else [],
    }


def reference_folder(root: Path) -> tuple[Path, bool]:
    """Where the references are, and whether they are solutions: a hand-out kit has only pristine copies."""
    solutions = root / "notebooks" / "solutions"
    return (solutions, True) if any(solutions.glob("*.ipynb")) else (root / "notebooks" / "pristine", False)


def find_reference(root: Path, cells: list[dict], name: str) -> Reference:
    """The chapter with most of the hand-in's exercises; among equals, the one that its file name tells.

    Raises:
        UnusableError: When no chapter shares an exercise or the name with the hand-in.
    """
    folder, is_solution = reference_folder(root)
    theirs = set(find(cells, "EXERCISE"))
    best, most = None, (0, 0)
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        ours = read_hand_in(path)
        score = (len(theirs & set(find(ours, "EXERCISE"))), int(path.stem in name))
        if score > most:
            best, most = Reference(path.stem, ours, is_solution), score
    if best is None:
        raise UnusableError(f"{name}: holds no exercise of any chapter in {folder.parent.name}/{folder.name}")
    return best
