"""What each chapter owes a learner who cannot see the figure or use a mouse, and what its files must not hold."""

import json
import re
from pathlib import Path

import pytest

from labutils.course.source import read_chapter

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks" / "source").glob("[0-9][0-9]_*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9][0-9]_*.ipynb"))
FIGURE = re.compile(r"\bplt\.show\(\)")
WIDGET = re.compile(r"_widget\(|\binteract(ive)?\(|\bwidgets\.(?!HTML|VBox|HBox|Image|Layout)\w+\(")
SENTENCE = re.compile(r"\*[^*\s][^*]+[.:;]")  # opens in italics, and says something


def neighbours(cells, index):
    """The Markdown right above a cell, and the cell right below it; a cell without text between counts as none."""
    above = cells[index - 1].source if index and cells[index - 1].cell_type == "markdown" else ""
    below = next((c.source for c in cells[index + 1 : index + 2] if c.cell_type == "markdown"), "")
    return above, below


def findings(cells):
    """One sentence per figure without its sentence, and per widget without its question."""
    found = []
    for index, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        above, below = neighbours(cells, index)
        if FIGURE.search(cell.source) and not SENTENCE.match(below):
            found.append(f"cell {index}: below a figure, Markdown begins with an italic sentence about it")
        if WIDGET.search(cell.source) and "?" not in above:
            found.append(f"cell {index}: above a widget, Markdown asks the question that it answers")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_figure_has_a_sentence_and_each_widget_a_question(source):
    assert findings(read_chapter(source).cells) == []


def cells_of(*sources):
    from nbformat import v4

    return [(v4.new_markdown_cell if text.startswith("md ") else v4.new_code_cell)(text[3:]) for text in sources]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["py plt.show()", "md *The figure shows a line that falls.* More."], []),
        (["py plt.show()", "md The figure shows a line."], ["figure"]),
        (["py plt.show()", "md **Explain.** It falls."], ["figure"]),
        (["py plt.show()", "py x = 1", "md *Too late, as a sentence.*"], ["figure"]),
        (["py plt.show()"], ["figure"]),
        (["md Which is faster?", "py widgets.SelectionSlider(options=[1])"], []),
        (["md Move it.", "py slider = widgets.IntSlider()"], ["widget"]),
        (["py show = speed_quality_widget(records)"], ["widget"]),
        (["py box = widgets.HTML('text')"], []),
    ],
)
def test_findings_on_small_notebooks(sources, words):
    found = findings(cells_of(*sources))
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_notebook_holds_no_widget_state(path):
    """`metadata.widgets` breaks GitHub's preview; a view without its state shows nothing anywhere."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert "application/vnd.jupyter.widget" not in path.read_text(encoding="utf-8")


def test_there_is_a_chapter_with_a_widget():
    sources = [cell.source for path in SOURCES for cell in read_chapter(path).cells if cell.cell_type == "code"]
    assert any(WIDGET.search(source) for source in sources) and any(FIGURE.search(source) for source in sources)
