"""One printable page for each chapter: its goal, its sections with their formulas, and what the learner has at the end.

All of it is taken from the chapter's own Markdown, so that it cannot say anything else.
"""

import re
from pathlib import Path

from labutils.course.source import Chapter, read_chapter, sources
from labutils.quantization.conventions import formats_page

PAGE_END = '\n<div style="page-break-after: always"></div>\n'
HEAD = """# The course on one page a chapter

*Written by `python -m labutils build` from the chapters: their goals, sections, formulas and results. Print it, or
search it; the explanations stand in the notebooks.*
"""


def summary_of(chapter: Chapter) -> str:
    """A chapter's page, as Markdown; formulas that a chapter quotes in order to refute them are left out.

    Raises:
        ValueError: If it has no title with a goal below.
    """
    texts = [cell.source for cell in chapter.cells if cell.cell_type == "markdown"]
    title, goal = re.match(r"# (.+)", texts[0]), re.search(r"(?s)\*\*Goal:\*\* .+?(?=\n\n|\Z)", texts[0])
    if not title or not goal:
        raise ValueError(f"a chapter must have a title and a goal; got {chapter.stem}")
    body, _, end = "\n\n".join(texts[1:]).partition("## What you have")
    lines = [f"## {title[1]}", "", goal[0], ""]
    for part in re.split(r"(?m)^(?=## )", body):
        heading = re.match(r"## (\d+ · .+)", part)
        lines += [f"- {heading[1]}"] if heading else []
        lines += [
            line for formula in formulas(part) for line in ("", *(f"  {row}" for row in formula.splitlines()), "")
        ]
    lines += ["", "**What you have:**", "", *re.findall(r"(?ms)^- .+?(?=\n- |\n\n|\Z)", end)]
    question = re.search(r"(?s)\*\*Open question.+?(?=\n\n|\Z)", end)
    lines += ["", question[0]] if question else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def formulas(text: str) -> list[str]:
    r"""Displayed formulas, but for those that the paragraph before ascribes to an article.

    >>> formulas("An article gives\n\n$$a = c$$\n\nbut\n\n$$a = b$$")
    ['$$a = b$$']
    """
    pieces = re.split(r"(?s)(\$\$.+?\$\$)", text)
    before = [piece.strip().rpartition("\n\n")[2] for piece in pieces[::2]]
    return [formula for formula, words in zip(pieces[1::2], before, strict=False) if " article " not in words]


def write_summary(root: Path, *, write: bool = True) -> list[Path]:
    """Writes all chapters' pages to notebooks/SUMMARY.md; returns its path if it changed, or would."""
    text = HEAD + "\n" + PAGE_END.join(summary_of(read_chapter(source)) for source in sources(root))
    return _written(root / "notebooks" / "SUMMARY.md", text, write=write)


def write_formats(root: Path, *, write: bool = True) -> list[Path]:
    """Writes what was observed of other libraries to notebooks/FORMATS.md; returns its path if it changed, or would."""
    return _written(root / "notebooks" / "FORMATS.md", formats_page(), write=write)


def _written(path: Path, text: str, *, write: bool) -> list[Path]:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return []
    if write:
        path.write_text(text, encoding="utf-8", newline="\n")
    return [path]
