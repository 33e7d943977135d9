"""The field's words: terms that only this course used stay out of code, docstrings and pages."""

import ast
import re
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = {  # what was said here, and the field's word
    r"surgeon's update": "the OBS update",
    r"\brows? a program": "rows per program",
    r"\bmean over (the )?places": "mean over positions",
    r"\b(each|every|one|the second) place (ahead|later|of a text)": "position",
    r"(the|softmax's) shares (no longer sum|are written)": "attention weights",
    r"\b(all|many) texts of (the|a) batch": "sequences",
}
NAMES = re.compile(r"(?<![\w'])\*?(places?|answers)(?![\w'])")  # of axes: "*places vocab"


def prose():
    """Each text that people read: modules whole, pages, and the Markdown cells of the sources."""
    for path in sorted((ROOT / "labutils").rglob("*.py")):
        yield path, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.md")):
        yield path, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks" / "source").glob("*.py")):
        cells = jupytext.read(path).cells
        yield path, "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def private_terms(text):
    return [f"{found[0]!r}: say {word}" for term, word in PRIVATE.items() for found in re.finditer(term, text, re.I)]


def private_axes(text):
    """Axes of jaxtyping annotations, as Float[Tensor, "*places vocab"], that have a private name."""
    shapes = (
        node.slice.elts[1]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2
    )
    strings = (shape.value for shape in shapes if isinstance(shape, ast.Constant) and isinstance(shape.value, str))
    return [shape for shape in strings if NAMES.search(shape)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("We meet the surgeon's update again.", 1),
        ("return the mean over places", 1),
        ("a step of several rows a program", 1),
        ("The texts of a customer, in three places; answers are judged.", 0),
    ],
)
def test_private_terms_are_recognised(text, found):
    assert len(private_terms(text)) == found


def test_private_axes_are_recognised():
    assert private_axes('x: Float[Tensor, "*places vocab"]\ny: Int[Tensor, "sequences positions"]') == ["*places vocab"]
    assert private_axes('z: dict[str, "Place"]') == []


def test_nothing_says_it_in_words_of_its_own():
    assert {path.name: terms for path, text in prose() if (terms := private_terms(text))} == {}


def test_axes_have_the_field_s_names():
    modules = ((path, text) for path, text in prose() if path.suffix == ".py" and "source" not in path.parts)
    assert {path.name: axes for path, text in modules if (axes := private_axes(text))} == {}
