"""TEACHING.md says what the chapters say: their minutes, their exercises, their open questions."""

import ast
import re
from pathlib import Path

import pytest
from bug_sheet import bug_sheet
from lanes import read_wrong_answers

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


@pytest.fixture(scope="module")
def plan():
    """The exercises of each week, by chapter."""
    weeks = re.findall(r"(?m)^\| \d+ \| (\d\d)[^|]* \| ([\d., ]+) \|$", TEACHING)
    found = {source.stem[:2]: [] for source in SOURCES}
    for chapter, names in weeks:
        found[chapter].append(names.split(", "))
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_core_path_is_the_same_in_plan_headings_and_head_and_fits_its_sessions(source, plan):
    cells = [cell.source for cell in read_chapter(source).cells if cell.cell_type == "markdown"]
    text = said("\n".join(cells))
    minutes = {n: int(m) for n, m in re.findall(r"Exercise (\d+\.\d+): .+?(\d+) minutes?, difficulty", text)}
    marked = set(re.findall(r"Exercise (\d+\.\d+): \S+ \(core[,)]", text))
    weeks = plan[source.stem[:2]]
    planned = {name for names in weeks for name in names}
    assert weeks and all(sum(minutes[name] for name in names) <= 80 for names in weeks)
    assert planned == (marked or set(minutes)), "headings mark the plan's exercises, unless it takes all"
    [head] = re.findall(r"\| Exercises \|(.+)\|", cells[0])
    assert ("core" in head) == bool(marked)
    if sessions := re.search(r"fit into (one session|two sessions)", head):
        assert sessions[1] == ("one session", "two sessions")[len(weeks) - 1]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_bug_sheet_holds_three_wrong_answers_without_their_comments(source):
    first, second = (bug_sheet(source.stem[:2], seed=seed) for seed in (1, 2))
    cells, _, answers = first.partition("page-break-after")
    assert first != second and answers.count("the check's hint says") == 3
    wrong = read_wrong_answers(ROOT / "tests" / "wrong_answers" / source.name)
    known = {ast.unparse(ast.parse(answer.source)) for answer in wrong}
    printed = re.findall(r"(?ms)^```python\n(.+?)\n```", cells)
    assert len(set(printed)) == 3 and set(printed) <= known


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
