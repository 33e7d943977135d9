"""One page a chapter, taken from the chapter: complete, printable, never stale."""

import re
from pathlib import Path

import pytest
from hand_ins import DEMO

from labutils.course.source import read_chapter, sources
from labutils.course.summary import PAGE_END, formulas, summary_of, write_summary

ROOT = Path(__file__).resolve().parents[1]


def test_the_stored_pages_are_those_of_the_chapters():
    assert write_summary(ROOT, write=False) == []


@pytest.mark.parametrize("source", sources(ROOT), ids=lambda path: path.stem)
def test_a_chapter_has_its_page(source):
    page = summary_of(read_chapter(source))
    text = source.read_text(encoding="utf-8")
    assert re.findall(r"(?m)^- (\d+ · .+)$", page) == re.findall(r"(?m)^# ## (\d+ · .+)$", text)
    assert re.search(r"(?ms)What you have:\*\*\n\n(- .+\n){3,}", page) and "**Open question" in page
    assert len(page.splitlines()) < 75  # a sheet of paper
    assert PAGE_END.strip() not in page


def test_what_an_article_claims_is_no_formula_of_ours():
    page = summary_of(read_chapter(ROOT / "notebooks" / "source" / "02_quantization_formulas.py"))
    assert "quant\\_bit" not in page and "operatorname{clamp}" in page
    assert formulas("The article says:\n\n$$a$$\n\nRight is\n\n$$b\nc$$") == ["$$b\nc$$"]


def test_a_chapter_without_a_goal_is_named(tmp_path):
    path = tmp_path / "77_x.py"
    path.write_text("# %% [markdown]\n# # 77 · X\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a title and a goal; got 77_x"):
        summary_of(read_chapter(path))


def test_write_summary_writes_once(tmp_path):
    folder = tmp_path / "notebooks" / "source"
    folder.mkdir(parents=True)
    source = next((DEMO / "notebooks" / "source").glob("*.py"))
    (folder / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    target = tmp_path / "notebooks" / "SUMMARY.md"
    assert write_summary(tmp_path, write=False) == [target] and not target.exists()
    assert write_summary(tmp_path) == [target] and write_summary(tmp_path) == []
