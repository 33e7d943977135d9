"""The language a learner reads: hints, verdicts and progress, found in a gettext catalogue by their English text."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENGLISH = "en"
CATALOGUES = Path(__file__).parent / "languages"
_CHOSEN = {"language": ENGLISH}


def languages() -> list[str]:
    """The languages beside English, each with a catalogue in `labutils/languages`.

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
