"""The generated set-up cell: finds the course here, or fetches it on Colab. Standard library only."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from labutils.course.moved import keep_old_names
from labutils.lab.language import ENGLISH, use

MARKER = "# SETUP"
NEVER_INSTALLED = frozenset({"numpy", "torch"})  # a host's own builds fit its drivers and each other

TEMPLATE = """\
# SETUP (generated; run me first): finds the course, or fetches it where it is not, as on Colab
import importlib.util
import os
import pathlib
import subprocess
import sys

here = pathlib.Path.cwd()
places = [here, *here.parents, here / "course"]
root = next((place for place in places if (place / "labutils" / "course").is_dir()), None)
if root is None and importlib.util.find_spec("labutils") is None:
    root = here / "course"
    home = "https://github.com/{repository}"
    url = os.environ.get("COURSE_REPO", home)
    fetch = ["fetch", "-q", "--depth", "1", url, os.environ.get("COURSE_REF", "HEAD")]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for step in (fetch, ["checkout", "-q", "FETCH_HEAD"]):
        subprocess.run(["git", "-C", str(root), *step], check=True)
if root is not None:
    sys.path.insert(0, str(root))
from labutils.course.setup_cell import ready

ready("{stem}"{language})"""


def setup_source(stem: str, repository: str, language: str = ENGLISH) -> str:
    """The source of the first code cell of notebook ``stem``."""
    chosen = "" if language == ENGLISH else f', language="{language}"'
    return TEMPLATE.format(stem=stem, repository=repository, language=chosen)


def is_setup(cell) -> bool:
    """Whether a notebook's cell is the generated set-up cell."""
    return cell["cell_type"] == "code" and "".join(cell["source"]).startswith(MARKER)


def language_of(cells) -> str:
    """The language that a notebook's set-up cell chooses."""
    chosen = [
        re.search(r'^ready\(.*language="(\w+)"\)', "".join(c["source"]), re.MULTILINE) for c in cells if is_setup(c)
    ]
    return chosen[0][1] if chosen and chosen[0] else ENGLISH


def ready(stem: str, language: str = ENGLISH) -> None:
    """Make this kernel ready for notebook ``stem``: packages on Colab, language, figures and the learner's progress."""
    use(language)
    keep_old_names()
    if "google.colab" in sys.modules:
        install_missing(Path(__file__).resolve().parents[2] / "pyproject.toml")
    from labutils.course.figures import show_in_words
    from labutils.course.progress import begin

    begin(stem)
    show_in_words()


def install_missing(pyproject: Path) -> list[str]:
    """Install what the course needs and this host lacks, but never numpy or torch; return what."""
    wanted = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    missing = [requirement for requirement in wanted if is_missing(requirement)]
    if missing:
        print("installing", ", ".join(missing))
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    return missing


def is_missing(requirement: str) -> bool:
    """Whether a requirement such as ``transformers>=5,<6`` is not met here, is meant for here, and may be installed.

    >>> is_missing("numpy>=99"), is_missing("a-package-that-nobody-has>=1")
    (False, True)
    """
    from packaging.requirements import Requirement  # comes with every Jupyter

    wanted = Requirement(requirement)
    if wanted.name.lower() in NEVER_INSTALLED or (wanted.marker and not wanted.marker.evaluate()):
        return False
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return not wanted.specifier.contains(found, prereleases=True)
