"""A figure's words in the learner's language, put in for the time it is drawn: code and data stay as they are."""

import functools
import importlib.util
import io
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import font_manager
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter

from labutils.lab.language import ENGLISH, language, retold

FONT_PACKAGES = {"zh": ("pylopdf_fonts_zh_cn", "*Sans*.[ot]tf")}  # a module, and its files
SYSTEM_FONTS = {
    "zh": ("Noto Sans SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei"),
}
NAMING = (FixedFormatter, FuncFormatter, StrCategoryFormatter)  # of ticks that bear words


@functools.cache
def font_of(name: str) -> str | None:
    """The font family with a language's characters: the package's where it is installed, else one of this system.

    >>> font_of("en") is None
    True
    """
    module, files = FONT_PACKAGES.get(name, ("", ""))
    package = importlib.util.find_spec(module) if module else None
    for folder in package.submodule_search_locations if package else []:
        for path in sorted(Path(folder).rglob(files)):
            font_manager.fontManager.addfont(path)
            return font_manager.get_font(path).family_name
    here = {font.name for font in font_manager.fontManager.ttflist}
    return next((family for family in SYSTEM_FONTS.get(name, ()) if family in here), None)


def font_package(name: str) -> str:
    """The package with a language's font, as pip knows it.

    >>> font_package("zh")
    'pylopdf-fonts-zh-cn'
    """
    return FONT_PACKAGES[name][0].replace("_", "-")


@contextmanager
def in_words(figure: Figure, name: str) -> Iterator[None]:
    """Put a figure's texts into a language, and back afterwards; they stay English where no font has its characters."""
    family = font_of(name) if name != ENGLISH else None
    texts = [(text, text.get_text(), text.get_fontfamily()) for text in figure.findobj(Text)] if family else []
    tickers = [axis.major for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)] if family else []
    named = [(ticker, ticker.formatter) for ticker in tickers if isinstance(ticker.formatter, NAMING)]
    try:
        for text, words, families in texts:
            told = retold(name, words)
            width = 0.9 * 72 * figure.get_figwidth() / text.get_fontsize()
            text.set_text(broken(told, width) if text.get_wrap() else told)
            text.set_fontfamily([*families, family])
        for ticker, formatter in named:
            ticker.formatter = FuncFormatter(functools.partial(_tick, name, formatter))
        yield
    finally:
        for text, words, families in texts:
            text.set_text(words)
            text.set_fontfamily(families)
        for ticker, formatter in named:
            ticker.formatter = formatter


def _tick(name: str, formatter, value: float, place: int | None = None) -> str:
    return retold(name, str(formatter(value, place)))  # tick labels may be set to numbers


def broken(text: str, width: float) -> str:
    r"""Text in lines no wider than `width` full-width characters; matplotlib itself breaks lines at spaces only.

    >>> broken("量化让模型变小", 4)
    '量化让模\n型变小'
    """
    lines, used = [""], 0.0
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        size = 1.0 if wide else 0.6
        if used + size > width and wide and unicodedata.category(character)[0] != "P":
            lines.append("")
            used = 0.0
        lines[-1] += character
        used += size
    return "\n".join(lines)


def png(figure: Figure, *, dpi: int = 90) -> bytes:
    """A figure as a PNG with its words in the learner's language, for a widget."""
    image = io.BytesIO()
    with in_words(figure, language()):
        figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()
