"""Figures in the learner's language in a notebook, and in every edition's from one and the same run of a solution."""

import copy
import importlib
import os
import sys

from labutils.lab.language import ENGLISH, language, translated

BESIDE = "LABUTILS_FIGURES"  # the languages in which a build wants each figure beside the English one
PNG = "image/png"


def mime(name: str) -> str:
    """The type under which a figure in another language stands beside the English one, until the build moves it.

    >>> mime("zh")
    'image/vnd.labutils.zh+png'
    """
    return f"image/vnd.labutils.{name}+png"


def show_in_words() -> None:
    """Let this kernel draw figures in the learner's language, and beside it in those that a build asks for."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    beside = os.environ.get(BESIDE, "").split()
    if shell is None or (language() == ENGLISH and not beside):
        return
    from IPython.core.formatters import PNGFormatter
    from matplotlib.figure import Figure

    from labutils.lab.plots.words import font_of, font_package

    importlib.import_module("matplotlib_inline.backend_inline")  # which registers how a notebook draws, once
    formatters = shell.display_formatter.formatters
    printer = formatters[PNG].pop(Figure, None)
    if printer is None:  # figures go elsewhere, such as to a window
        return
    printer = getattr(printer, "english", printer)  # the set-up cell may run again
    formatters[PNG].for_type(Figure, _printer(printer, None))
    for name in filter(font_of, beside):
        formatters[mime(name)] = PNGFormatter(format_type=mime(name), print_method="_repr_beside_", parent=shell)
        formatters[mime(name)].for_type(Figure, _printer(printer, name))
    if language() != ENGLISH and font_of(language()) is None:
        said = "figures keep their English words, as no font here has this language's characters: pip install {package}"
        print(translated(said, package=font_package(language())))


def _printer(english, name: str | None):
    """Prints a figure in a language, by default the learner's at that moment."""
    from labutils.lab.plots.words import in_words

    def draw(figure):
        with in_words(figure, name or language()):
            return english(figure)

    draw.english = english
    return draw


def taken(notebook, name: str) -> dict[tuple[int, int], str]:
    """Take one language's figures out of an executed notebook: each PNG with its cell and the output's place there."""
    places = [(c, o, output) for c, o, output in _images(notebook) if mime(name) in output.data]
    return {(c, o): output.data.pop(mime(name)) for c, o, output in places}


def placed(notebook, figures: dict[tuple[int, int], str]) -> None:
    """Put another language's figures into a notebook that shows the English ones; in place."""
    for c, o, output in _images(notebook):
        output.data[PNG] = figures.get((c, o), output.data[PNG])


def figures_of(edition, english) -> dict[tuple[int, int], str]:
    """The figures of a stored edition, as long as all else that it shows is what the English notebook shows."""
    if _all_but_images(edition) != _all_but_images(english):
        return {}
    return {(c, o): output.data[PNG] for c, o, output in _images(edition)}


def _images(notebook) -> list:
    return [
        (c, o, output)
        for c, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
        for o, output in enumerate(cell.outputs)
        if PNG in output.get("data", {})
    ]


def _all_but_images(notebook) -> list:
    shown = copy.deepcopy([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    for output in (output for outputs in shown for output in outputs):
        if PNG in output.get("data", {}):
            output.data[PNG] = ""
    return shown
