"""The language a learner reads: hints, verdicts and progress, found in a gettext catalogue by their English text."""

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENGLISH = "en"
CATALOGUES = Path(__file__).parent / "languages"
_CHOSEN = {"language": ENGLISH}
BLANK = re.compile(r"\{\d+\}|\[s\]")
PIECES = re.compile(r"(: |, | \(|\))")


def languages() -> list[str]:
    """The languages beside English, each with a catalogue in `labutils/lab/languages`.

    >>> "zh" in languages()
    True
    """
    return sorted(path.stem for path in CATALOGUES.glob("*.po"))


def language() -> str:
    """$LABUTILS_LANGUAGE if it names a language of the course, else the one that was chosen with `use`."""
    asked = os.environ.get("LABUTILS_LANGUAGE", "")
    return asked if asked in (ENGLISH, *languages()) else _CHOSEN["language"]


def use(name: str) -> None:
    """Choose the language of this process; an unknown one is English."""
    _CHOSEN["language"] = name if name in languages() else ENGLISH


@contextmanager
def speaking(name: str) -> Iterator[None]:
    """Choose a language for the time of the block."""
    before = _CHOSEN["language"]
    use(name)
    try:
        yield
    finally:
        use(before)


def translated(message: str, /, **values) -> str:
    """A message in the learner's language, with its values; in English where the catalogue lacks it.

    >>> translated("line {number}", number=3)
    'line 3'
    >>> with speaking("zh"):
    ...     translated("hint")
    '提示'
    """
    return in_language(language(), message, **values)


def in_language(name: str, message: str, /, **values) -> str:
    """As `translated`, in a given language whatever the learner's is."""
    text = message if name == ENGLISH else _spoken(name).get(message, message)
    return text.format(**values) if values else text


def retold(name: str, text: str) -> str:
    """A finished text in another language: that of its message, or of one whose numbered blanks it fills.

    A figure's code writes its words itself, so only the finished text is there to be looked up. Of the messages that
    fit, the one is taken whose blanks hold the fewest pieces. What fills a blank is retold in turn; a text that no
    message fits is retold piece by piece.
    """
    if name == ENGLISH or text in _spoken(name):
        return in_language(name, text)
    fits = [(message, found.groups()) for form, message in _forms(name) if (found := form.fullmatch(text))]
    if fits:  # of equals the one with the most words of its own
        message, blanks = min(fits, key=lambda fit: sum(len(PIECES.findall(words)) for words in fit[1]))
        return _spoken(name)[message].format(*(retold(name, words) for words in blanks))
    pieces = PIECES.split(text)
    pieces[::2] = [retold(name, piece) for piece in pieces[::2]] if len(pieces) > 1 else pieces
    return "".join(pieces)


@functools.cache
def _forms(name: str) -> list[tuple[re.Pattern, str]]:
    """The messages with blanks, each with what a filled one looks like; those with the most words first."""
    blank = [message for message in _spoken(name) if BLANK.search(message)]
    blank.sort(key=lambda message: -len(BLANK.sub("", message)))
    return [(re.compile(_form(message), re.DOTALL), message) for message in blank]


def _form(message: str) -> str:
    r"""A regular expression for the filled message; "[s]" is the plural of a count.

    >>> print(_form("{0} row[s]"))
    (.*?)\ rows?
    """
    marks = ["s?" if mark == "[s]" else "(.*?)" for mark in BLANK.findall(message)]
    return "".join(a + b for a, b in zip(map(re.escape, BLANK.split(message)), [*marks, ""], strict=True))


def marked(message: str) -> str:
    """The message itself: marks for the catalogue what `translated` gets by name."""
    return message


def in_all_languages(message: str) -> list[str]:
    """A message as it reads in English and in every other language."""
    return [in_language(name, message) for name in (ENGLISH, *languages())]


@functools.cache
def _spoken(name: str) -> dict[str, str]:
    return translations(CATALOGUES / f"{name}.po")


def translations(path: Path) -> dict[str, str]:
    """What a catalogue translates; what it marks as fuzzy is left out."""
    from babel.messages.pofile import read_po

    with path.open("rb") as file:
        return {entry.id: entry.string for entry in read_po(file) if entry.id and entry.string and not entry.fuzzy}
