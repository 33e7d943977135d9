"""A chapter's prose in another language: a gettext catalogue with one message a paragraph.

`notebooks/source` stays the only source of code, formulas and markup; ``notebooks/zh/NN_name.po`` holds what the
Markdown says. A paragraph that its catalogue lacks stands in English.
"""

import ast
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from labutils.course.figure_words import figure_words
from labutils.lab.language import CATALOGUES, translations

MARKUP = re.compile(
    r"(```.*?```|\$\$.*?\$\$|</?details>|</?summary>|^\|[ |:-]*\|$|^#+ |^(?:[-*]|\d\.) |\n\n+|\n(?=\|))",
    re.DOTALL | re.MULTILINE,
)
HEADER = """\
msgid ""
msgstr ""
"Language: {language}\\n"
"MIME-Version: 1.0\\n"
"Content-Type: text/plain; charset=UTF-8\\n"
"Content-Transfer-Encoding: 8bit\\n"
"X-Complete: no\\n"
"""
CLAIM = '"X-Complete: yes\\n"'
SAYING = ("given", "expected", "actual", "hint")
SHARED = ("core.py", "compare.py", "expect.py", "shadows.py")  # of the checks: what all chapters say


@dataclass(frozen=True)
class Edition:
    """One chapter in one language: its translations, and how much of it they cover."""

    language: str
    translations: dict[str, str]
    paragraphs: int
    lacking: list[str]

    def cell(self, source: str) -> str:
        """A Markdown cell with every paragraph that has a translation in its place."""
        return replaced(source, lambda message: self.translations.get(message, ""))


def replaced(source: str, replacement: Callable[[str], str]) -> str:
    r"""Markdown whose paragraphs, headings, items, hints and table rows are replaced; all markup stays.

    >>> replaced("## One\n\n$$x$$\n\n- two\n  words", lambda message: message.upper())
    '## ONE\n\n$$x$$\n\n- TWO WORDS'
    """
    parts = MARKUP.split(source)
    for index in range(0, len(parts), 2):
        text = parts[index].strip()
        message = " ".join(text.split())
        if re.search(r"[^\W\d_]", message):
            parts[index] = parts[index].replace(text, replacement(message) or text)
    return "".join(parts)


def paragraphs(cells: list) -> dict[str, str]:
    """The messages of a chapter's Markdown cells, each with the heading under which it first stands."""
    found: dict[str, str] = {}
    heading = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            first = cell.source.partition("\n")[0]
            heading = first.lstrip("# ") if first.startswith("#") else heading
            replaced(cell.source, lambda message, heading=heading: found.setdefault(message, heading))
    return found


def editions_of(root: Path, stem: str) -> list[str]:
    """The languages in which a chapter has a catalogue."""
    return sorted(path.parent.name for path in (root / "notebooks").glob(f"*/{stem}.po"))


def edition(root: Path, language: str, stem: str, cells: list) -> Edition:
    """A chapter's edition from its catalogue."""
    known = translations(root / "notebooks" / language / f"{stem}.po")
    wanted = paragraphs(cells)
    return Edition(language, known, len(wanted), [message for message in wanted if message not in known])


def updated(path: Path, wanted: dict[str, str]) -> str:
    """A catalogue's text once it holds the wanted messages, in order.

    A changed message keeps the translation of the nearest old one, marked as fuzzy; a message that is no longer wanted
    moves to the end as obsolete, and comes back with its translation. A catalogue that now lacks something
    does not claim to be complete.

    Args:
        path: The catalogue; it need not exist.
        wanted: Each message with a comment for the translator.
    """
    from babel.messages import Catalog
    from babel.messages.pofile import read_po, write_po

    text = path.read_text(encoding="utf-8") if path.is_file() else HEADER.format(language=path.parent.name)
    catalogue, template = read_po(io.BytesIO(text.encode())), Catalog()
    for message, comment in wanted.items():
        template.add(message, auto_comments=[comment] if comment else [])
    for message in wanted.keys() & catalogue.obsolete.keys():
        catalogue[message] = catalogue.obsolete.pop(message)
    catalogue.update(template, update_creation_date=False)
    for message in [message for message, entry in catalogue.obsolete.items() if not entry.string]:
        del catalogue.obsolete[message]
    for entry in catalogue:
        entry.flags -= {"python-format", "python-brace-format"}
    header = text.partition("\n\n")[0].rstrip("\n")
    if any(entry.id and (entry.fuzzy or not entry.string) for entry in catalogue):
        header = header.replace(CLAIM, CLAIM.replace("yes", "no"))
    body = io.BytesIO()
    write_po(body, catalogue, omit_header=True, width=0)
    return f"{header}\n\n{body.getvalue().decode().strip()}\n"


def said_by(path: Path) -> Iterator[str]:
    """The messages for a learner in a module: what it marks or translates, and the problems and hints of checks."""
    in_checks = path.parent.name == "checks"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        texts = node.args[:1] if name in ("translated", "marked") else []
        if in_checks:
            texts = [*texts, *_texts_of_checks(node, name)]
        for text in texts:
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value:
                yield text.value


def _texts_of_checks(node: ast.AST, name: str) -> list[ast.expr]:
    """What may be a problem, an input in words, or a hint."""
    if isinstance(node, ast.Call):
        positional = node.args[:2] if name in ("CheckFailed", "StillBlank", "expect_true") else []
        return positional + [word.value for word in node.keywords if word.arg in SAYING]
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in SAYING:
        return [node.value]
    is_pair = isinstance(node, ast.Tuple) and len(node.elts) == 2  # (mistake, hint)
    return [text for text in node.elts[1:] if is_pair and " " in str(getattr(text, "value", ""))] if is_pair else []


def hints(root: Path, checked: list[str], drawn: list[str]) -> dict[str, str]:
    """What verdicts, progress, widgets, some chapters' checks and some chapters' figures say, each with its module."""
    checks, course = root / "labutils" / "course" / "checks", root / "labutils" / "course"
    modules = [checks / name for name in SHARED]
    names = ("badge", "build", "check", "figures", "predictions", "progress", "verdicts")
    modules += [course / f"{name}.py" for name in names]
    modules += [path for stem in checked for path in sorted(checks.glob(f"ch{stem[:2]}*.py"))]
    modules += sorted((root / "labutils" / "lab" / "widgets").glob("[a-z]*.py"))
    found: dict[str, str] = {}
    for path in modules:
        for message in said_by(path):
            found.setdefault(message, path.stem)
    for path in _drawing(root, drawn):
        for message in figure_words(path.read_text(encoding="utf-8")):
            found.setdefault(message, path.stem)
    return found


def _drawing(root: Path, stems: list[str]) -> Iterator[Path]:
    """The sources of chapters, each followed by the modules whose figures it draws."""
    for stem in stems:
        source = root / "notebooks" / "source" / f"{stem}.py"
        yield source
        names = re.findall(r"labutils\.lab\.plots\.(\w+)", source.read_text(encoding="utf-8"))
        paths = [root / "labutils" / "lab" / "plots" / f"{name}.py" for name in dict.fromkeys(names)]
        yield from (path for path in paths if path.is_file())


def catalogues(root: Path, chapters: dict[str, list], language: str, begin: list[str]) -> dict[Path, str]:
    """The up-to-date text of a language's catalogues: of each chapter that has one, and of what the program says.

    Args:
        root: The course's folder.
        chapters: Each chapter's cells, by stem.
        language: Such as "zh".
        begin: Chapters whose catalogue is begun.
    """
    folder = root / "notebooks" / language
    stems = [stem for stem in chapters if stem in begin or (folder / f"{stem}.po").is_file()]
    found = {folder / f"{stem}.po": updated(folder / f"{stem}.po", paragraphs(chapters[stem])) for stem in stems}
    if (own := root / "labutils" / "lab" / CATALOGUES.name / f"{language}.po").parent.is_dir():
        found[own] = updated(own, hints(root, list(chapters), stems))
    return found
