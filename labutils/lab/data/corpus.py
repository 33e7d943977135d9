"""The text that every chapter measures on: the Python standard library's source, split by a fixed list of modules.

It is real code and real English, it is present wherever Python is, and nothing of it is copied into this repository.
"""

import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Modules that stand in Python 3.11 to 3.14 alike. They are never trained on.
VALIDATION_MODULES = (
    "doctest.py",
    "fileinput.py",
    "ipaddress.py",
    "random.py",
    "sched.py",
    "selectors.py",
    "shelve.py",
    "threading.py",
)
TEST_MODULES = (
    "argparse.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "imaplib.py",
    "json/decoder.py",
    "mailbox.py",
    "optparse.py",
    "pickle.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
    "xml/dom/minidom.py",
)
SPLITS = ("train", "validation", "test")
SHINGLE_LINES = 4  # so many consecutive lines shared with a held-out module make a copy ...
COPIED_SHINGLES = 5  # ... when it happens this often
PACKAGE_LIMIT_BYTES = 1_000_000  # no single installed package may drown the others


@dataclass(frozen=True)
class Document:
    """One source file: its name (a path relative to its library) and its text.

    `is_chat` says that the text is a chat of our own making, in which control tokens steer; in any other they are text.
    """

    name: str
    text: str
    is_chat: bool = field(default=False, repr=False)


def stdlib_dir() -> Path:
    """Folder of the standard library's source.

    Raises:
        FileNotFoundError: when this Python was shipped without its source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in TEST_MODULES + VALIDATION_MODULES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            "the corpus needs a Python that ships its standard library's source as .py files "
            f"(python.org, conda, Debian and pyenv do); {folder} lacks {missing[0]}"
        )
    return folder


def read_source(path: Path) -> str | None:
    """Text of a source file with Unix line ends, or None where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def stdlib_documents(split: str) -> list[Document]:
    """The standard library's modules of one split, sorted by name.

    Args:
        split: "train" (everything that is not held out), "validation" or "test".

    Raises:
        ValueError: for another split.
        FileNotFoundError: when this Python was shipped without sources.

    >>> [document.name for document in stdlib_documents("validation")][:2]
    ['doctest.py', 'fileinput.py']
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    folder = stdlib_dir()
    if split != "train":
        names = VALIDATION_MODULES if split == "validation" else TEST_MODULES
        return [Document(name, read_source(folder / name) or "") for name in names]
    return list(_training_modules(folder))


@functools.cache
def _training_modules(folder: Path) -> list[Document]:
    """Read once a process: a chapter asks for calibration text again and again, and each time takes two seconds."""
    held_out = held_out_documents()
    names = {document.name for document in held_out}
    candidates = (d for d in _documents_below(folder, skip=("site-packages", "dist-packages")) if d.name not in names)
    return without_copies(candidates, held_out)


def held_out_documents() -> list[Document]:
    """All modules that no model of this course may be trained on."""
    return stdlib_documents("validation") + stdlib_documents("test")


def package_documents() -> list[Document]:
    """Source of this environment's installed packages, up to PACKAGE_LIMIT_BYTES each, for training only."""
    folder = Path(sysconfig.get_path("purelib"))
    chosen: list[Document] = []
    for package in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "labutils"):
        size = 0
        documents = _documents_below(package, skip=())
        for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
            size += len(document.text)
            if size > PACKAGE_LIMIT_BYTES:
                break
            chosen.append(Document(f"{package.name}/{document.name}", document.text))
    return without_copies(chosen, held_out_documents())


def without_copies(documents: Iterable[Document], held_out: Iterable[Document]) -> list[Document]:
    r"""Documents that do not repeat held-out text (vendored copies, backports).

    A document goes when it shares COPIED_SHINGLES runs of SHINGLE_LINES consecutive non-blank lines with the held-out
    text. Licence headers and the like stay below that.

    >>> original = Document("a.py", "\n".join(f"x{i} = {i}" for i in range(20)))
    >>> without_copies([Document("copy.py", "import os\n" + original.text), Document("b.py", "y = 1")], [original])
    [Document(name='b.py', text='y = 1')]
    """
    known = {shingle for document in held_out for shingle in _shingles(document.text)}
    return [d for d in documents if len(known.intersection(_shingles(d.text))) < COPIED_SHINGLES]


def _shingles(text: str) -> Iterator[tuple[str, ...]]:
    lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 3]
    return (tuple(lines[i : i + SHINGLE_LINES]) for i in range(len(lines) - SHINGLE_LINES + 1))


def _documents_below(folder: Path, skip: tuple[str, ...]) -> list[Document]:
    documents = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        text = None if any(part in skip for part in name.split("/")) else read_source(path)
        if text and text.strip():
            documents.append(Document(name, text))
    return documents


def is_test_file(document: Document) -> bool:
    """Whether a library's document belongs to its tests, which read less like the modules that we measure on."""
    parts = document.name.split("/")
    return "test" in parts[:-1] or "tests" in parts[:-1] or parts[-1].startswith("test_")
