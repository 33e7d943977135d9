"""Where the course's files lie: the repository, its shipped data, and the learner's own folder."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"


def learner_dir() -> Path:
    """The learner's own folder (ledger, progress): $LABUTILS_HOME if set, else `learner` in the repository."""
    return Path(os.environ.get("LABUTILS_HOME") or ROOT / "learner")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a name to write to, beside `path`, whose folder is made; the file becomes `path` once the block ends well.

    After an error or a kill, `path` is what it was. Two processes that write at once leave the whole of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
        yield Path(folder) / path.name
        os.replace(Path(folder) / path.name, path)


def readable(path: Path) -> str:
    r"""A path as text that can be printed and written: bytes of a name that are no UTF-8 become escapes.

    >>> readable(Path(os.fsdecode(b"group/jos\xe9.ipynb")))
    'group/jos\\xe9.ipynb'
    """
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def tool_cache_dir() -> Path:
    """Where compiled FPGA tools and their results are kept: $YOWASP_CACHE_DIR if set, else `fpga` in `learner_dir`."""
    return Path(os.environ.get("YOWASP_CACHE_DIR") or learner_dir() / "fpga")
