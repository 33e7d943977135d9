"""Figures in another language: their words found in the source, put in for the drawing, and never boxes."""

import base64
import io
import os
import sys
import warnings

import pytest
from aside import install_aside
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbformat import v4
from test_packaging import PINS, ROOT

from labutils.course import figures
from labutils.course.execute import execute
from labutils.course.figure_words import figure_words
from labutils.lab import language
from labutils.lab.language import retold
from labutils.lab.plots import words
from labutils.lab.plots.words import broken, font_of, font_package, in_words, png

CHINESE = language.translations(language.CATALOGUES / "zh.po")
KNOWN = {
    "speed (tokens/s)": "速度（词元/秒）",
    "{0} row[s]": "{0} 行",
    "{0} is {1}x as fast as {2} and {3}": "{0} 的速度是 {2} 的 {1} 倍，{3}",
    "costs {0} bits": "损失 {0} 比特",
    "memory": "内存",
    "the decoding of {0}": "{0} 的解码",
    "{0}: {1} used": "{0}：用了 {1}",
}


@pytest.fixture
def known(monkeypatch):
    """A small catalogue in place of the course's."""
    monkeypatch.delenv("LABUTILS_LANGUAGE", raising=False)
    monkeypatch.setattr(language, "_spoken", lambda name: KNOWN)
    language._forms.cache_clear()
    yield
    language._forms.cache_clear()


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    """A family with Chinese characters: this environment's, or the lab's package installed aside."""
    if font_of("zh") is None:
        folder = tmp_path_factory.mktemp("font")
        install_aside(folder, [str(PINS[font_package("zh")])])
        sys.path.append(str(folder))
        font_of.cache_clear()
    yield font_of("zh")
    font_of.cache_clear()


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ('ax.set_title("Rows and columns")', ["Rows and columns"]),
        ('ax.set(xlabel=f"{name}, bits")', ["{0}, bits"]),
        ("ax.plot(x, label=f\"{r} row{'s' * (r > 1)} of {n}\")", ["{0} row[s] of {1}"]),
        (
            'gain = "loses less" if sure else "is not told apart"\nax.set_title(gain)',
            ["is not told apart", "loses less"],
        ),
        ('for i, name in enumerate(("LSTM", "attention")):\n    ax.plot(x, label=name)', ["LSTM", "attention"]),
        ('def finding(x):\n    return f"none of {x}"\nax.set_title(finding(3))', ["none of {0}"]),
        ('def draw(ax, names):\n    ax.plot(x, label=names[0])\ndraw(ax, ["one way"])', ["one way"]),
        ("ax.set_title(f\"sure: {', '.join(sure) or 'none here'}\")", ["none here", "sure: {0}"]),
        ('print("a table"); ax.plot(x, color="grey", label="_hidden")\nax.set(xlabel="x", ylabel=f"{a} {b}")', []),
    ],
)
def test_figure_words_are_those_that_are_drawn(source, messages):
    assert figure_words(source) == messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory", "内存"),
        ("1 row", "1 行"),
        ("12 rows", "12 行"),
        ("int8 is 2.1x as fast as float32 and costs 0.02 bits", "int8 的速度是 float32 的 2.1 倍，损失 0.02 比特"),
        ("LabLM: memory (int8, 2 rows)", "LabLM: 内存 (int8, 2 行)"),
        ("the decoding of 2 rows: 47% used", "2 行 的解码：用了 47%"),  # not the decoding of "2 rows: 47% used"
        ("an unknown text: , (", "an unknown text: , ("),
        (": ", ": "),
        ("", ""),
    ],
)
def test_retold_by_hand(known, text, expected):
    assert retold("zh", text) == expected
    assert retold("en", text) == text


@pytest.mark.parametrize("width", [1, 3.5, 8, 100])
def test_broken_lines_lose_nothing_and_fit(width):
    text = "LabLM 的速度是原来的 2 倍，质量不变（误差以内）"
    lines = broken(text, width).split("\n")
    assert "".join(lines) == text
    assert all(len(line) <= width + 9 for line in lines)  # a word of Latin letters stays whole
    assert len(lines) == 1 if width == 100 else len(lines) > 1


def labelled():
    figure = Figure(layout="constrained")
    ax = figure.subplots()
    ax.plot([1, 2], label="12 rows")
    ax.set(xlabel="speed (tokens/s)", title="memory", xticks=[0, 1], xticklabels=["memory", "int8"])
    ax.legend()
    return figure


def texts_of(figure):
    figure.draw_without_rendering()
    return sorted((t.get_text(), tuple(t.get_fontfamily())) for t in figure.findobj(Text) if t.get_text())


def test_words_are_put_in_for_the_drawing_and_taken_back(known, font):
    figure = labelled()
    before = texts_of(figure)
    with in_words(figure, "zh"):
        shown = {text for text, _ in texts_of(figure)}
        assert {"速度（词元/秒）", "内存", "12 行", "int8"} <= shown and not shown & {"memory", "12 rows"}
    assert texts_of(figure) == before
    with pytest.raises(ZeroDivisionError), in_words(figure, "zh"):
        1 / 0  # noqa: B018
    assert texts_of(figure) == before
    with in_words(figure, "en"):
        assert texts_of(figure) == before


def test_ticks_named_by_numbers_are_drawn(known, font):
    figure = Figure()
    axes = figure.subplots()
    axes.set_xticks([1, 2], [10, 20])
    with in_words(figure, "zh"):
        figure.draw_without_rendering()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20"]


def test_without_a_font_the_words_stay_english(known, monkeypatch):
    monkeypatch.setattr(words, "font_of", lambda name: None)
    figure = labelled()
    before = texts_of(figure)
    with in_words(figure, "zh"):
        assert texts_of(figure) == before


def drawn_strictly(texts, family):
    """Draws texts in a family after matplotlib's own; a box instead of a character is an error."""
    figure = Figure(figsize=(12, len(texts) / 4))
    for place, text in enumerate(texts):
        figure.text(0, place / len(texts), text.replace("$", ""), fontfamily=["sans-serif", family])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        figure.savefig(io.BytesIO())


def test_no_character_of_the_catalogue_is_a_box(font):
    letters = "".join(sorted({letter for text in CHINESE.values() for letter in text if letter.isprintable()}))
    assert len(letters) > 800
    drawn_strictly([letters[start : start + 50] for start in range(0, len(letters), 50)], font)
    with pytest.raises(UserWarning, match="missing from font"):
        drawn_strictly(["量化"], "DejaVu Sans")


def test_a_widget_s_picture_follows_the_language(known, font):
    figure = labelled()
    english = png(figure)
    with language.speaking("zh"):
        assert png(figure) != english
    assert png(figure) == english


CELLS = (
    "import os\nfrom labutils.course.figures import show_in_words\nshow_in_words()",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2], label='passed')\nplt.legend()\nplt.show()",
    "del os.environ['LABUTILS_LANGUAGE'], os.environ['LABUTILS_FIGURES']\nfrom labutils.lab import language",
    "language.use('zh')\nshow_in_words()\nshow_in_words()",
)


@pytest.mark.slow
def test_one_run_draws_a_figure_in_every_language(font, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in (*CELLS, CELLS[1])])
    done = execute(notebook, ROOT, editions=["zh"])
    english, live = (cell.outputs[-1].data for cell in (done.cells[1], done.cells[4]))
    assert english["image/png"] != live["image/png"]
    assert english[figures.mime("zh")] == live["image/png"]
    stored = figures.taken(done, "zh")
    assert stored[1, 0] == live["image/png"] and figures.taken(done, "zh") == {}
    assert base64.b64decode(stored[1, 0]).startswith(b"\x89PNG")
    before = english["image/png"]
    figures.placed(done, stored)
    assert done.cells[1].outputs[0].data["image/png"] == stored[1, 0] != before


def solution(image, printed):
    output = v4.new_output("display_data", {"image/png": image, "text/plain": "<Figure>"})
    cells = [v4.new_code_cell("x", outputs=[v4.new_output("stream", text=printed), output])]
    return v4.new_notebook(cells=cells)


def test_stored_figures_are_kept_only_beside_the_same_outputs():
    english = solution("english", "1.5 s")
    assert figures.figures_of(solution("chinese", "1.5 s"), english) == {(0, 1): "chinese"}
    assert figures.figures_of(solution("chinese", "1.6 s"), english) == {}
    assert english.cells[0].outputs[1].data["image/png"] == "english"  # looked at, not touched
