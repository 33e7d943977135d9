"""The kit that a teacher gives a class: the learner's notebooks and what they need, without solutions."""

import re
import shutil
from pathlib import Path

from labutils.course.badge import repository
from labutils.course.build import learner_notebook, place, text_of
from labutils.course.catalogue import edition, editions_of
from labutils.course.source import examine, read_chapter, sources

FOLDERS = ("labutils", "data")
FILES = ("pyproject.toml", "constraints.txt", "environment.yml", "README.md", "LICENSE", "CITATION.cff")
FILES += ("CONTRIBUTING.md", "notebooks/GLOSSARY.md", "notebooks/RENTED_GPUS.md", "notebooks/SUMMARY.md")
FILES += ("README.zh.md", "notebooks/zh/GLOSSARY.md", "notebooks/FORMATS.md")
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#]+)[^)]*\)")  # to a file
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", ".ipynb_checkpoints", "*.egg-info")


def handout(root: Path, target: Path, *, only: str = "") -> list[Path]:
    """Write the kit into a new folder.

    The notebooks are made from their sources, so nothing of the teacher's own copies goes along.
    ``notebooks/pristine`` holds each once more: `check` moves the answers into it.

    Args:
        root: The course's folder.
        target: The folder to write; it must not exist, or be empty.
        only: A part of the names of the chapters to hand out; all by default.

    Raises:
        ValueError: When the target is not empty, or no chapter fits, or a source has errors.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the kit's folder must be new or empty; got {target}")
    chapters = [read_chapter(path) for path in sources(root) if only in path.stem]
    if not chapters:
        raise ValueError(f"at least one chapter's name must hold the given part; got {only!r}")
    errors = [error for chapter in chapters for error in examine(chapter).errors]
    if errors:
        raise ValueError("\n".join(errors))
    _copy_course(root, target)
    written = [path for chapter in chapters for path in _write_notebooks(root, target, chapter)]
    _unlink_missing(target)
    return written


def _copy_course(root: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=LEFT_OUT)
    for name in FILES:
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def _unlink_missing(target: Path) -> None:
    """Leaves of each link to a file that the kit has not its words alone, such as those to the solutions."""
    for page in (target / name for name in FILES if name.endswith(".md")):
        if page.is_file():
            text = page.read_text(encoding="utf-8")
            kept = LINK.sub(lambda link, page=page: link[0] if (page.parent / link[2]).exists() else link[1], text)
            page.write_text(kept, encoding="utf-8", newline="\n")


def _write_notebooks(root: Path, target: Path, chapter) -> list[Path]:
    slug, stem = repository(root), chapter.stem
    english = learner_notebook(chapter, slug)
    notebooks = {place(stem): english, place(stem, "pristine"): english}
    for language in editions_of(root, stem):
        notebooks[place(stem, "", language)] = learner_notebook(
            chapter, slug, edition(root, language, stem, chapter.cells)
        )
    for name, notebook in notebooks.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text_of(notebook), encoding="utf-8", newline="\n")
    return [target / name for name in notebooks]
