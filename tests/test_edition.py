"""Other languages from the same source: the same code, paragraphs that fall back, hints in the learner's words."""

import contextlib
import importlib
import json
import pkgutil
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from hand_ins import RIGHT, ROOT, STEM, WRONG_SPEED, demo_course, learner, save
from markdown_it import MarkdownIt
from nbformat import v4

from labutils.course import catalogue, checks, figures
from labutils.course.build import build, learner_notebook, place, read_notebook, repository, text_of, update_catalogues
from labutils.course.check import as_text, check_notebook
from labutils.course.checks import CheckFailed, StillBlank, ch02
from labutils.course.execute import unclean
from labutils.course.grade import Options, grade
from labutils.course.handout import handout
from labutils.course.progress import summary
from labutils.course.setup_cell import is_setup, language_of, setup_source
from labutils.course.source import read_chapter, sources
from labutils.lab import language
from labutils.lab.paths import readable

ZH = ROOT / "notebooks" / "zh"
CATALOGUES = [*sorted(ZH.glob("*.po")), *sorted(language.CATALOGUES.glob("*.po"))]
CHAPTERS = sorted(path.stem for path in ZH.glob("[0-9][0-9]_*.po"))
CHINESE = re.compile(r"[\u4e00-\u9fff]")
KEPT = re.compile(r"`[^`]+`|<code>.*?</code>|\$[^$]+\$|arXiv:[\d.]*\d|</?\w+>|\{[^{}]*\}")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
TITLE = ("90 · A demonstration chapter", "90 · 示范章节")
HINT = ("Divide, round, clip.", "先除，再舍入，最后截断。")


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.delenv("LABUTILS_LANGUAGE", raising=False)
    yield
    language.use(language.ENGLISH)


def translate(path, *pairs):
    text = path.read_text(encoding="utf-8")
    for message, translation in pairs:
        before = f'msgid "{message}"\nmsgstr ""'
        assert before in text
        text = text.replace(before, f'msgid "{message}"\nmsgstr "{translation}"')
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def course(tmp_path):
    """The demonstration course with a Chinese catalogue that holds a title and a hint."""
    root = demo_course(tmp_path)
    update_catalogues(root, "zh", only=STEM)
    translate(root / "notebooks" / "zh" / f"{STEM}.po", TITLE, HINT)
    assert build(root, language="zh").errors == []
    return root


def code_of(path):
    """All of a notebook's code cells but the pictures, whose words differ."""
    cells = [cell for cell in read_notebook(path).cells if cell.cell_type == "code"]
    for output in (output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})):
        output.data["image/png"] = ""
    return [(cell.id, cell.source, cell.metadata, cell.outputs) for cell in cells if not is_setup(cell)]


def test_the_same_code_under_other_prose(course):
    english, chinese = (course / place(STEM, "", name) for name in ("en", "zh"))
    assert code_of(english) == code_of(chinese)
    first, *rest = (cell for cell in read_notebook(chinese).cells if cell.cell_type == "markdown")
    assert first.source.startswith(f"# {TITLE[1]}\n") and f"main/notebooks/zh/{STEM}.ipynb)" in first.source
    assert [cell.id for cell in read_notebook(english).cells] == [cell.id for cell in read_notebook(chinese).cells]
    hints = next(cell.source for cell in rest if HINT[1] in cell.source)
    assert f"<details><summary>Hint 1</summary>{HINT[1]}</details>" in hints  # markup stays, "Hint 1" falls back
    assert language_of(read_notebook(chinese).cells) == "zh" and language_of(read_notebook(english).cells) == "en"


def test_the_title_says_how_much_stands_in_english(course):
    cells = read_chapter(course / "notebooks" / "source" / f"{STEM}.py").cells
    wanted = catalogue.paragraphs(cells)
    shown = read_notebook(course / place(STEM, "", "zh")).cells[0].source
    assert f"本章共 {len(wanted)} 段，其中 {len(wanted) - 2} 段尚未译成中文" in shown
    assert [f"zh, {STEM}: {len(wanted) - 2} of {len(wanted)}"] == [
        warning.partition(" paragraphs")[0] for warning in build(course, language="zh").warnings
    ]


def test_an_edition_that_translates_all_says_nothing(course):
    everything = catalogue.Edition("zh", {}, 3, [])
    notebook = learner_notebook(read_chapter(course / "notebooks" / "source" / f"{STEM}.py"), "a/b", everything)
    assert "段" not in notebook.cells[0].source


def test_outputs_are_those_of_the_english_solution_and_nothing_is_executed(course, monkeypatch):
    monkeypatch.setattr("labutils.course.build.execute", None)
    assert not (course / place(STEM, "solutions", "zh")).exists()  # the English one has not run
    english = course / place(STEM, "solutions")
    notebook = read_notebook(english)
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = number
        cell.outputs = [v4.new_output("stream", name="stdout", text=f"output {number}\n")]
    english.write_text(text_of(notebook), encoding="utf-8")
    assert [path.name for path in build(course, language="zh").changed] == [f"{STEM}.ipynb"]
    assert code_of(english) == code_of(course / place(STEM, "solutions", "zh"))
    assert build(course, language="zh").changed == []


def shows(notebook, image, printed, **beside):
    """A notebook whose first code cell has printed something and drawn a figure."""
    for cell in (code := [cell for cell in notebook.cells if cell.cell_type == "code"]):
        cell.execution_count = 1
    drawn = v4.new_output("display_data", {"image/png": image, "text/plain": "<Figure>"} | beside)
    code[1].outputs = [v4.new_output("stream", name="stdout", text=printed), drawn]
    return notebook


def image_of(path):
    return next(o.data["image/png"] for c in read_notebook(path).cells for o in c.get("outputs", []) if "data" in o)


def test_an_edition_keeps_the_figures_of_the_run_that_it_shows(course):
    english, chinese = (course / place(STEM, "solutions", name) for name in ("en", "zh"))
    english.write_text(text_of(shows(read_notebook(english), "an English figure", "1.5 s")), encoding="utf-8")
    build(course, language="zh")
    assert image_of(chinese) == "an English figure" and "输出与英文版" in chinese.read_text(encoding="utf-8")
    text = chinese.read_text(encoding="utf-8").replace("an English figure", "一幅中文图")
    chinese.write_text(text, encoding="utf-8")
    assert build(course, language="zh").changed == [] and image_of(chinese) == "一幅中文图"
    english.write_text(english.read_text(encoding="utf-8").replace("1.5 s", "1.6 s"), encoding="utf-8")
    build(course, language="zh")
    assert image_of(chinese) == "an English figure" and "1.6 s" in chinese.read_text(encoding="utf-8")


def test_a_run_draws_the_figures_of_every_edition(course, monkeypatch):
    def execute(notebook, root, editions):
        assert editions == ["zh"]
        return shows(notebook, "an English figure", "1.5 s", **{figures.mime("zh"): "一幅中文图"})

    monkeypatch.setattr("labutils.course.build.execute", execute)
    monkeypatch.setattr("labutils.course.build.why_busy", lambda: "one more job")
    assert build(course, execution="always").executed == [STEM]
    english, chinese = (course / place(STEM, "solutions", name) for name in ("en", "zh"))
    assert image_of(english) == "an English figure" and image_of(chinese) == "一幅中文图"
    assert "labutils.zh" not in english.read_text(encoding="utf-8")
    assert "在繁忙的机器上运行（one more job）" in chinese.read_text(encoding="utf-8")
    assert code_of(english) == code_of(chinese)


def test_a_changed_paragraph_is_fuzzy_a_removed_one_obsolete_and_none_is_lost(course):
    path = course / "notebooks" / "zh" / f"{STEM}.po"
    header = path.read_text(encoding="utf-8").replace("X-Complete: no", "X-Complete: yes")
    path.write_text(header, encoding="utf-8")
    source = course / "notebooks" / "source" / f"{STEM}.py"
    before = source.read_text(encoding="utf-8")
    source.write_text(before.replace(HINT[0], "Divide, then round, then clip."), encoding="utf-8")
    assert update_catalogues(course, "zh", write=False) == [path] and "fuzzy" not in path.read_text(encoding="utf-8")
    assert update_catalogues(course, "zh") == [path]
    text = path.read_text(encoding="utf-8")
    entry = f'#, fuzzy\nmsgid "Divide, then round, then clip."\nmsgstr "{HINT[1]}"'
    assert entry in text and "X-Complete: no" in text  # it no longer claims what is no longer true
    build(course, language="zh")
    shown = (course / place(STEM, "", "zh")).read_text(encoding="utf-8")
    assert "Divide, then round, then clip." in shown and HINT[1] not in shown  # fuzzy is not shown
    source.write_text(before.replace(TITLE[0], "Ninety"), encoding="utf-8")
    update_catalogues(course, "zh")
    assert f'#~ msgid "{TITLE[0]}"\n#~ msgstr "{TITLE[1]}"' in path.read_text(encoding="utf-8")
    source.write_text(before, encoding="utf-8")
    update_catalogues(course, "zh")
    text = path.read_text(encoding="utf-8")
    assert f'msgid "{TITLE[0]}"\nmsgstr "{TITLE[1]}"' in text and "#~" not in text
    assert update_catalogues(course, "zh") == []


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("# One\n\ntwo\nlines", ["One", "two lines"]),
        ("| | |\n| --- | --- |\n| Time | 3 |\n| Size | `4` |", ["| Time | 3 |", "| Size | `4` |"]),
        ("- a\n- b\n  c\n1. d\n2. e", ["a", "b c", "d", "e"]),
        ("before\n\n$$x \\text{ is}$$\n\nafter $y$", ["before", "after $y$"]),
        ("text\n\n```python\nfor x in y:\n\n    pass\n```\n\nmore", ["text", "more"]),
        ("<details><summary>Hint</summary>Do <code>it</code>.</details>", ["Hint", "Do <code>it</code>."]),
        ("<details><summary>Why</summary>\n\nOne.\n\nTwo.\n</details>", ["Why", "One.", "Two."]),
        ("in bits 4\n448. E5M2 has", ["in bits 4 448. E5M2 has"]),
        ("---\n\n1 + 1 = 2", []),
    ],
)
def test_paragraphs_of_markdown(source, messages):
    found = []
    assert catalogue.replaced(source, lambda message: found.append(message) or "") == source  # fallen back: as it was
    assert found == messages
    marked = catalogue.replaced(source, lambda message: f"<{messages.index(message)}>")
    assert all(f"<{number}>" in marked for number in range(len(messages)))


def test_check_gives_chinese_hints_for_a_chinese_hand_in(course, tmp_path):
    notebook = json.loads((course / place(STEM, "", "zh")).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith("# EXERCISE tokens_per_second"):
            cell["source"] = "# EXERCISE tokens_per_second\n" + RIGHT["tokens_per_second"]
        if "".join(cell["source"]).startswith("# EXERCISE weight_bytes"):
            cell["source"] = "# EXERCISE weight_bytes\nweight_bytes = 500_000"
    report = check_notebook(save(notebook, tmp_path / "class" / "hand_in.ipynb"), course)
    assert [verdict.verdict for verdict in report.verdicts] == ["right", "blank", "wrong"]
    assert "写在练习的第一行" in report.verdicts[1].hint or "raise" in report.verdicts[1].hint
    text = as_text(report, "hand_in.ipynb")
    assert "3 道练习中有 1 道正确" in text and "✗ 90.2 quantize: 未作答" in text and "应为" in text
    table = grade(tmp_path / "class", tmp_path / "grades", Options(course), say=lambda _: None)
    assert [row["verdict"] for row in table] == ["right", "blank", "wrong"]  # words for tables stay English
    assert CHINESE.search(table[1]["hint"]) and table[1]["hint"] == report.verdicts[1].hint
    english = check_notebook(save(learner(course, tokens_per_second=WRONG_SPEED), tmp_path / "english.ipynb"), course)
    assert not CHINESE.search(as_text(english, "english.ipynb"))


def test_handout_carries_the_editions(course, tmp_path):
    shutil.copy2(ROOT / "README.zh.md", course)
    written = handout(course, tmp_path / "kit")
    assert place(STEM, "", "zh") in [readable(path.relative_to(tmp_path / "kit")) for path in written]
    assert "BEGIN SOLUTION" not in (tmp_path / "kit" / place(STEM, "", "zh")).read_text(encoding="utf-8")
    assert (tmp_path / "kit" / "README.zh.md").is_file()


def affine_codes_that_multiply(x, scale, zero_point, qmin, qmax):
    return ((x * scale).round() + zero_point).clamp(qmin, qmax).int()


def failure(answer):
    with pytest.raises(CheckFailed) as caught:
        ch02.affine_codes(answer)
    return caught.value


def test_a_hint_in_both_languages(monkeypatch):
    assert failure(affine_codes_that_multiply).hint.startswith("you multiplied by the scale")
    language.use("zh")
    chinese = failure(affine_codes_that_multiply)
    assert chinese.hint == "你乘了缩放因子：整数码数的是步数，所以要除以它"
    assert re.search(r"^    提示 +你乘了缩放因子", str(chinese), re.MULTILINE) and "应为" in str(chinese)
    monkeypatch.setenv("LABUTILS_LANGUAGE", "en")
    assert failure(affine_codes_that_multiply).hint.startswith("you multiplied by the scale")


def test_messages_with_values_are_translated_as_templates():
    language.use("zh")
    assert "你的代码抛出了 ZeroDivisionError" in str(failure(lambda **case: 1 / 0))
    assert failure(lambda **case: None).hint == "你的函数返回了 None：是不是忘了 `return`？"

    def blank(**case):
        raise NotImplementedError("Exercise 2.1: affine_codes")

    assert isinstance(failure(blank), StillBlank) and "还没有作答（Exercise 2.1: affine_codes）" in str(failure(blank))
    assert "道练习中已通过" in summary("2")


def test_unknown_languages_are_english(monkeypatch):
    language.use("xx")
    assert language.language() == "en"
    language.use("zh")
    monkeypatch.setenv("LABUTILS_LANGUAGE", "../zh")
    assert language.language() == "zh"  # a wish that cannot be met changes nothing
    monkeypatch.setenv("LABUTILS_LANGUAGE", "en")
    assert language.language() == "en"
    with language.speaking("zh"):
        assert language.translated("hint") == "hint"  # the learner's wish wins


def test_the_build_does_not_ask_for_the_learner_s_language(course, monkeypatch):
    before = [(course / place(STEM, "", name)).read_bytes() for name in ("en", "zh")]
    for name in ("en", "zh"):
        monkeypatch.setenv("LABUTILS_LANGUAGE", name)
        build(course, execution="never")
        assert [(course / place(STEM, "", name)).read_bytes() for name in ("en", "zh")] == before


def test_language_of_reads_only_the_set_up_cell():
    setup = SimpleNamespace(cell_type="code", source=setup_source("02_x", "a/b", "zh"))
    other = SimpleNamespace(cell_type="code", source='ready("02_x", language="xx")')
    cells = [vars(other), vars(setup)]
    assert language_of(cells) == "zh" and language_of(cells[:1]) == "en"
    assert setup_source("02_x", "a/b") == setup_source("02_x", "a/b", "zh").replace(', language="zh"', "")


# The course's own catalogues


def test_catalogues_are_those_of_the_sources():
    stale = update_catalogues(ROOT, "zh", write=False)
    assert stale == [], "python -m labutils build --update-catalogues"


@pytest.mark.parametrize("stem", CHAPTERS)
def test_stored_edition_is_that_of_its_source(stem):
    chapter, slug = read_chapter(ROOT / "notebooks" / "source" / f"{stem}.py"), repository(ROOT)
    ours = catalogue.edition(ROOT, "zh", stem, chapter.cells)
    stored = (ROOT / place(stem, "", "zh")).read_text(encoding="utf-8")
    assert stored == text_of(learner_notebook(chapter, slug, ours)), f"python -m labutils build --only {stem}"
    assert code_of(ROOT / place(stem, "solutions", "zh")) == code_of(ROOT / place(stem, "solutions"))
    assert code_of(ROOT / place(stem, "", "zh")) == code_of(ROOT / place(stem))
    assert unclean(read_notebook(ROOT / place(stem, "solutions", "zh")), ROOT) == []


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_complete_means_complete(path):
    """A catalogue that claims to be complete translates everything, hints included, and marks nothing as fuzzy."""
    if catalogue.CLAIM not in path.read_text(encoding="utf-8"):
        pytest.skip("makes no such claim")
    known = language.translations(path)
    checked = [path.stem] if path.parent == ZH else [source.stem for source in sources(ROOT)]
    wanted = catalogue.hints(ROOT, checked, [] if path.parent == ZH else CHAPTERS)
    said = language.translations(language.CATALOGUES / "zh.po")
    assert [message for message in wanted if message not in said] == []
    if path.parent == ZH:
        cells = read_chapter(ROOT / "notebooks" / "source" / f"{path.stem}.py").cells
        assert [message for message in catalogue.paragraphs(cells) if message not in known] == []


def test_some_chapter_is_complete_and_the_claim_can_fail(course):
    assert sum(catalogue.CLAIM in path.read_text(encoding="utf-8") for path in CATALOGUES) >= 2
    path = course / "notebooks" / "zh" / f"{STEM}.po"
    cells = read_chapter(course / "notebooks" / "source" / f"{STEM}.py").cells
    assert len(catalogue.edition(course, "zh", STEM, cells).lacking) == len(catalogue.paragraphs(cells)) - 2
    path.write_text(path.read_text(encoding="utf-8").replace(f'\nmsgid "{HINT[0]}"', f'\n#, fuzzy\nmsgid "{HINT[0]}"'))
    assert HINT[0] in catalogue.edition(course, "zh", STEM, cells).lacking


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_code_formulas_and_numbers_survive_translation(path):
    for message, translation in language.translations(path).items():
        assert Counter(KEPT.findall(message)) == Counter(KEPT.findall(translation)), message
        assert message.count("|") == translation.count("|"), message
        numbers = [Counter(NUMBER.findall(text.replace(",", ""))) for text in (message, translation)]
        assert numbers[0] <= numbers[1], message


@pytest.mark.parametrize("stem", CHAPTERS)
def test_bold_is_bold_beside_chinese_punctuation(stem):
    """CommonMark closes no emphasis between a full-width mark and a character: the stars would be seen."""
    for cell in read_notebook(ROOT / place(stem, "", "zh")).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$", "x", cell.source, flags=re.DOTALL)
            shown = re.sub(r"<code>.*?</code>", "", MarkdownIt().render(prose), flags=re.DOTALL)
            assert "*" not in shown, cell.source


@pytest.mark.parametrize("stem", CHAPTERS)
def test_every_hint_of_the_mistakes_is_in_the_catalogue(stem, monkeypatch):
    """The catalogue is read off the source; here the checks themselves hand over their hints."""
    handed = []
    modules = [m.name for m in pkgutil.iter_modules(checks.__path__) if m.name.startswith(f"ch{stem[:2]}")]
    for name in modules:
        module = importlib.import_module(f"labutils.course.checks.{name}")
        for expect in ("expect_function", "expect_close", "expect_equal"):
            if hasattr(module, expect):
                monkeypatch.setattr(module, expect, lambda *_, mistakes=(), **__: handed.extend(h for _, h in mistakes))
        for check in [value for value in vars(module).values() if hasattr(value, "__wrapped__")]:
            with contextlib.suppress(Exception):  # it may need more than one answer, or ask it something first
                check.__wrapped__(None)
    assert len(handed) >= 20
    known = language.translations(language.CATALOGUES / "zh.po")
    assert [hint for hint in handed if hint not in known] == []


def test_every_source_of_a_catalogue_exists():
    assert set(CHAPTERS) <= {path.stem for path in sources(ROOT)}
    table = (ZH / "GLOSSARY.md").read_text(encoding="utf-8")
    assert all(term in table for term in ("键值缓存", "预填充", "投机解码", "词元", "量化", "剪枝", "知识蒸馏"))
