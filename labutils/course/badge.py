"""The repository's name, in one setting: Colab badges, set-up cells and README follow it."""

import re
import tomllib
from pathlib import Path

from labutils.lab.language import ENGLISH, in_language, marked

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}")
IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
README_START, README_END = "<!-- badges -->", "<!-- /badges -->"


def repository(root: Path) -> str:
    """``OWNER/NAME`` from ``[tool.labutils] repository`` in pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return check_slug(settings.get("tool", {}).get("labutils", {}).get("repository", ""))


def check_slug(slug: str) -> str:
    """The slug itself.

    Raises:
        ValueError: When it is not ``OWNER/NAME``.
    """
    if not SLUG.fullmatch(slug):
        raise ValueError(f"a repository is OWNER/NAME, as in its GitHub address; got {slug!r}")
    return slug


def badge(slug: str, path: str, language: str = ENGLISH) -> str:
    """The line in a notebook that opens ``path`` of the repository in Colab.

    A link of words: a badge's picture would be fetched from Google whenever the notebook is opened
    in JupyterLab, and no page of the course asks for anything beyond the machine.
    """
    words = in_language(language, marked("Open in Colab"))
    return f"[▶ {words}](https://colab.research.google.com/github/{slug}/blob/main/{path})"


def readme_badge(slug: str, path: str) -> str:
    """README's badge, with its picture."""
    return f"[![Open in Colab]({IMAGE})](https://colab.research.google.com/github/{slug}/blob/main/{path})"


def rebadge(root: Path, slug: str) -> list[Path]:
    """Point everything at ``slug``; return the files that changed.

    Changes pyproject.toml, CITATION.cff, the badges and set-up cells of all notebooks, and
    README.md, where the part between the badge comments is written anew.
    """
    old, new = repository(root), check_slug(slug)
    notebooks = sorted((root / "notebooks").rglob("*.ipynb"))
    files = [root / "pyproject.toml", root / "CITATION.cff", *notebooks]
    texts = {path: _replaced(_read(path), old, new) for path in files if path.is_file()}
    readme = root / "README.md"
    if readme.is_file():
        texts[readme] = with_badges(_replaced(_read(readme), old, new), new, _first_notebook(root))
    changed = [path for path, text in texts.items() if text != _read(path)]
    for path in changed:
        path.write_text(texts[path], encoding="utf-8", newline="\n")
    return changed


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _replaced(text: str, old: str, new: str) -> str:
    """``old`` as a whole repository name, wherever it stands, as ``new``."""
    pattern = rf"(?<![\w.-]){re.escape(old)}(?=\.git\b|[^\w.-]|\.(?!\w)|$)"
    return re.sub(pattern, lambda _: new, text)


def with_badges(readme: str, slug: str, path: str) -> str:
    """README's text with the badge between its two comments; unchanged where it has none."""
    block = f"{README_START}\n{readme_badge(slug, path)}\n{README_END}"
    pattern = re.escape(README_START) + ".*?" + re.escape(README_END)
    return re.sub(pattern, lambda _: block, readme, flags=re.DOTALL)


def _first_notebook(root: Path) -> str:
    sources = sorted((root / "notebooks" / "source").glob("[0-9][0-9]_*.py"))
    return f"notebooks/{sources[0].stem if sources else '00_start_here'}.ipynb"
