"""TEACHING.md says what the chapters say: their minutes, their exercises, their open questions."""

import re
from pathlib import Path

import pytest

from labutils.course.handout import handout
from labutils.course.source import read_chapter

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = (ROOT / "notebooks" / "ANSWERS.md").read_text(encoding="utf-8")
TEACHING = (ROOT / "notebooks" / "TEACHING.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "notebooks" / "source").glob("[0-9][0-9]_*.py"))


def row_of(chapter):
    """The row of TEACHING.md's table of minutes that a chapter deserves."""
    first = chapter.cells[0].source
    number, title = re.match(r"# (\d\d) · (.+)", first).groups()
    minutes = re.search(r"\| Time \| (.+?) for you", first)[1]
    measured = re.search(r"\| Time \|.*\(measured: ([\d.]+(?: and [\d.]+)? s)", first)[1]
    memory = re.search(r"\| Memory, download \| ([\d.]+ GB)", first)[1]
    text = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
    needed = sum(int(number) for number in re.findall(r"(\d+)\s+minutes?,\s+difficulty", text))
    return f"| {number} | {title} | {minutes} | {len(chapter.exercises)}, {needed} minutes | {measured}, {memory} |"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_teaching_has_a_chapter_s_row_and_a_model_answer(source):
    chapter = read_chapter(source)
    assert row_of(chapter) in TEACHING.splitlines()
    assert any("**Open question" in cell.source for cell in chapter.cells)
    answer = re.search(rf"(?ms)^### {source.stem[:2]} · .+?\?\n\n(.+?)(?=^#|\Z)", TEACHING)
    assert answer and len(answer[1].split()) > 60


def said(text):
    """A text's words, without the marks of comments and line ends."""
    return " ".join(text.replace("\n#", "\n").split())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_answers_have_a_row_for_each_predict_and_explain(source):
    """A row begins with words of its cell, so that a cell moved, added or rewritten is noticed."""
    table = re.search(rf"(?ms)^## {source.stem[:2]}\n(.+?)(?=^## |\Z)", ANSWERS)[1]
    rows = re.findall(r'(?m)^\| ([PE])(\d+) \| "(.+?)" \| (.+?) \| (.+?) \|$', table)
    assert len(rows) == len(re.findall(r"(?m)^\| [PE]", table)), "a row has five cells"
    cells = [said(cell.source) for cell in read_chapter(source).cells if cell.cell_type == "markdown"]
    for kind, word in (("P", r"\*\*Predict"), ("E", r"\*\*Explain|<summary>Explain")):
        asked = [cell for cell in cells if re.search(word, cell)]
        mine = [(int(number), words) for letter, number, words, *_ in rows if letter == kind]
        assert [number for number, _ in mine] == list(range(1, len(asked) + 1)), f"{kind} rows of {source.stem}"
        strange = [words for (_, words), cell in zip(mine, asked, strict=True) if words not in cell]
        assert not strange, f"words that their cells lack in {source.stem}: {strange}"


def test_the_kit_carries_each_file_it_refers_to_and_no_answers(tmp_path):
    kit = tmp_path / "kit"
    written = handout(ROOT, kit)
    pages = {page.relative_to(kit).as_posix(): page.read_text(encoding="utf-8") for page in kit.rglob("*.md")}
    assert {"README.md", "CONTRIBUTING.md", "notebooks/RENTED_GPUS.md"} <= set(pages)
    assert not {"notebooks/ANSWERS.md", "notebooks/TEACHING.md"} & set(pages)
    for page, text in pages.items():
        links = re.findall(r"\]\((?!\w+:|#)([^)#]+)[^)]*\)", text)
        missing = [link for link in links if not ((kit / page).parent / link).exists()]
        assert not missing, f"{page} links to {missing}"
    named = {name for path in written for name in re.findall(r"notebooks/\w+\.md", path.read_text(encoding="utf-8"))}
    assert named and all((kit / name).is_file() for name in named)


def test_the_plan_s_core_paths_fit_a_session():
    plan = re.findall(r"(?m)^\| \d+ \| (\d\d)[^|]* \| ([\d., ]+) \|$", TEACHING)
    assert {chapter for chapter, _ in plan} == {source.stem[:2] for source in SOURCES}
    minutes, marked = {}, set()
    for source in SOURCES:
        text = said("\n".join(c.source for c in read_chapter(source).cells if c.cell_type == "markdown"))
        found = re.findall(r"Exercise (\d+\.\d+): .+?(\d+) minutes?, difficulty", text)
        minutes |= {name: int(number) for name, number in found}
        marked |= set(re.findall(r"Exercise (\d+\.\d+): \S+ \(core[,)]", text))
    for chapter, names in plan:
        needed = [minutes[name] for name in names.split(", ")]
        assert all(name.startswith(f"{int(chapter)}.") for name in names.split(", "))
        assert sum(needed) <= 80, f"week of chapter {chapter}: {sum(needed)} minutes"
    assert marked <= {name for _, names in plan for name in names.split(", ")}


def test_each_exercise_of_a_chapter_states_its_minutes():
    for source in SOURCES:
        chapter = read_chapter(source)
        text = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
        assert len(re.findall(r"\d+\s+minutes?,\s+difficulty", text)) == len(chapter.exercises)


def test_numbers_of_the_model_answers():
    assert "3.5 GB" in TEACHING and 7e9 * 4 / 8 == 3.5e9 and 20 * 3.5 == 70
    cache = 2 * 32 * 32 * 128 * 2  # Llama-2-7B: keys and values, layers, heads, head_dim, fp16
    assert cache == 2**19 and f"{20 * 1024 * cache / 1e9:.1f} GB" == "10.7 GB" and "10.7 GB" in TEACHING
    assert f"{6.74 * 2:.1f} GB" == "13.5 GB" and "13.5 GB" in TEACHING


def test_every_command_that_it_names_exists():
    from labutils.course.cli.main import COMMANDS

    named = set(re.findall(r"python -m\s+labutils\s+(\w+)", TEACHING))
    assert {"bench", "handout", "lab", "check", "grade", "doctor", "rebadge"} == named
    assert named <= set(COMMANDS)
