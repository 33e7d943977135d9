"""Read what a learner hands in, whatever it is, and find the chapter that it belongs to."""

import json
from dataclasses import dataclass
from pathlib import Path

from labutils.course.exercises import chapter_number, exercises, find
from labutils.lab.paths import readable

SIZE_LIMIT_BYTES = 50_000_000
LINE_ENDS = tuple("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")  # where `str.splitlines` cuts, and so nbformat


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
        UnusableError: When the file is none, is too large, is not UTF-8, or is not a notebook of format 4.
    """
    name = readable(Path(path.name))
    try:
        if not path.is_file():
            raise UnusableError(f"{name}: there is no such file")
        if path.stat().st_size > SIZE_LIMIT_BYTES:
            raise UnusableError(f"{name}: a notebook has at most {SIZE_LIMIT_BYTES // 10**6} MB")
        content = _parsed(name, path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UnusableError):
            raise
        raise UnusableError(f"{name}: not a notebook ({type(error).__name__}: {str(error)[:80]})") from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list):
        raise UnusableError(f"{name}: a notebook of format 4 has a list of cells; this file has none")
    return [_plain(cell) for cell in cells if isinstance(cell, dict)]


def _parsed(name: str, content: bytes):
    """JSON that is as tolerant as it can be: no byte, character or number of one cell voids the others."""
    encoding = json.detect_encoding(content)
    if "utf-8" not in encoding and content.decode(encoding, "replace").lstrip("\ufeff \t\r\n").startswith("{"):
        words = f"the file is saved as {encoding[:6].upper()}, which no notebook program reads"
        raise UnusableError(f"{name}: {words}; open it in a text editor and save it with the encoding UTF-8")
    text = content.decode("utf-8-sig", errors="replace")
    return json.loads(text, strict=False, parse_int=float)  # an int of more than 4300 digits would raise


def _plain(cell: dict) -> dict:
    """A cell's type, source and tags; all else in it belongs to the tool that saved it."""
    source = cell.get("source", "")
    if isinstance(source, list):
        source = _joined([line for line in source if isinstance(line, str)])
    metadata = cell.get("metadata")
    tags = metadata.get("tags") if isinstance(metadata, dict) else None
    return {
        "cell_type": _sound(str(cell.get("cell_type", ""))),
        "source": _sound(source) if isinstance(source, str) else "",
        "tags": tags if isinstance(tags, list) else [],
    }


def _joined(lines: list[str]) -> str:
    r"""The text of a list of lines; some converters leave out the line ends.

    >>> _joined(["# EXERCISE a", "a = 1"]) == _joined(["# EXERCISE a\n", "a = 1"])
    True
    """
    return "".join([*(line if line.endswith(LINE_ENDS) else line + "\n" for line in lines[:-1]), *lines[-1:]])


def _sound(text: str) -> str:
    r"""Text that can be written as UTF-8: halves of a pair are joined, a lone half becomes U+FFFD.

    >>> _sound("\ud83d\ude00") == "\U0001f600", _sound("cut off: \ud83d") == "cut off: \ufffd"
    (True, True)
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
