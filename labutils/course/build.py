"""From one source two notebooks: the learner's copy, blank, and the solution, executed."""

import copy
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from labutils.course.badge import badge, repository
from labutils.course.catalogue import Edition, catalogues, edition, editions_of
from labutils.course.execute import ExecutionError, execute
from labutils.course.exercises import ExerciseError, blank, marker
from labutils.course.figures import figures_of, placed, taken
from labutils.course.setup_cell import is_setup, setup_source
from labutils.course.source import Chapter, examine, read_chapter, sources
from labutils.lab.language import ENGLISH, in_language, marked
from labutils.measurement.quiet import why_busy

SHARED_OUTPUTS = marked(
    "*The outputs are those of the English edition, from one and the same run: what the code prints is English.*"
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class Built:
    """What a build found and did."""

    changed: list[Path]
    executed: list[str]
    errors: list[str]
    warnings: list[str]


def learner_notebook(chapter: Chapter, slug: str, edition: Edition | None = None):
    """The learner's copy: exercises blank, no outputs, exercise and check cells may raise."""
    cells = copy.deepcopy(chapter.cells)
    for exercise in chapter.exercises:
        cells[exercise.cell].source = blank(cells[exercise.cell].source, exercise)
        for index, tag in ((exercise.cell, "exercise"), (exercise.check, "check")):
            cells[index].metadata["tags"] = [tag, "raises-exception"]  # so that "run all" goes on
    return _notebook(cells, chapter.stem, slug, "", edition)


def solution_notebook(chapter: Chapter, slug: str, edition: Edition | None = None):
    """The solution, not yet executed."""
    return _notebook(copy.deepcopy(chapter.cells), chapter.stem, slug, "solutions", edition)


def place(stem: str, folder: str = "", language: str = ENGLISH) -> str:
    """Where a notebook stands in the repository.

    >>> place("02_quantization_formulas", "solutions", "zh")
    'notebooks/zh/solutions/02_quantization_formulas.ipynb'
    """
    return "/".join(filter(None, ["notebooks", "" if language == ENGLISH else language, folder, f"{stem}.ipynb"]))


def _notebook(cells: list, stem: str, slug: str, folder: str, edition: Edition | None):
    """A notebook of nbformat 4.5 with the badge, the set-up cell and ids that follow the English content."""
    from labutils.course.quick_nbformat import nbformat

    first_code = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    language = edition.language if edition else ENGLISH
    cells.insert(first_code, nbformat.v4.new_code_cell(setup_source(stem, slug, language)))
    seen: Counter = Counter()
    for cell in cells:
        cell["id"] = _cell_id(cell, seen)
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's own, of no use to a learner
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        elif edition:
            cell.source = edition.cell(cell.source)
    said = [*_unfinished(edition), *([in_language(language, SHARED_OUTPUTS)] if folder and edition else [])]
    line = "\n\n".join([badge(slug, place(stem, folder, language), language), *said])
    cells[0].source = _with_badge(cells[0].source, line)  # after the ids, which know no repository
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=copy.deepcopy(METADATA))
    notebook.metadata["labutils"] = {"chapter": stem} | ({"language": language} if edition else {})
    return notebook


def _unfinished(edition: Edition | None) -> list[str]:
    """Says how much of an edition stands in English; nothing where all is translated."""
    if edition is None or not edition.lacking:
        return []
    message = marked(
        "*{count} of {paragraphs} paragraphs of this chapter are not translated yet, and stand in English.*"
    )
    return [in_language(edition.language, message, count=len(edition.lacking), paragraphs=edition.paragraphs)]


def _with_badge(title: str, line: str) -> str:
    head, _, rest = title.partition("\n")
    return f"{head}\n\n{line}\n{rest}" if rest else f"{head}\n\n{line}"


def _cell_id(cell, seen: Counter) -> str:
    """An id that stays when other cells come and go."""
    mark = marker(cell)
    if is_setup(cell):
        return "setup"
    if mark:
        return f"{mark[0].lower()}-{mark[1]}"[:64]
    digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
    seen[digest] += 1
    return digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def text_of(notebook) -> str:
    """A notebook as its file's text, the same on every machine."""
    from labutils.course.quick_nbformat import nbformat

    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def with_kept_outputs(fresh, stored) -> bool:
    """Give ``fresh`` the outputs of ``stored`` if their code is the same; tell whether it was."""
    ours = [cell for cell in fresh.cells if cell.cell_type == "code"]
    theirs = [cell for cell in stored.cells if cell.cell_type == "code"]
    if not same_code(fresh, stored):
        return False
    if any(cell.execution_count is None for cell in theirs):
        return False
    for cell, old in zip(ours, theirs, strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    mark_busy(fresh, stored.metadata.get("labutils", {}).get("busy", ""))
    return True


def mark_busy(notebook, reason: str) -> None:
    """Say below a solution's title and in its metadata that a busy machine made its timings; nothing without reason."""
    if reason:
        notebook.metadata["labutils"]["busy"] = reason
        language = notebook.metadata["labutils"].get("language", ENGLISH)
        message = marked("*Executed on a busy machine ({reason}): the timings below are noisy.*")
        notebook.cells[0].source += f"\n\n{in_language(language, message, reason=reason)}"


def same_code(first, second) -> bool:
    """Whether two notebooks have the same code, their set-up cells apart."""
    ours, theirs = ([_code(c) for c in notebook.cells if c.cell_type == "code"] for notebook in (first, second))
    return ours == theirs


def _code(cell) -> str:
    return "# SETUP" if is_setup(cell) else cell.source  # the set-up cell follows the repository's name


def read_notebook(path: Path):
    """A notebook from its file, or None where there is none that can be read."""
    from labutils.course.quick_nbformat import nbformat

    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def build(
    root: Path, *, only: str = "", execution: str = "auto", write: bool = True, language: str = "", say=None
) -> Built:
    """Regenerate notebooks from their sources, in English and in every language that has a catalogue.

    Args:
        root: The course's folder.
        only: A part of the names of the chapters to build; all by default.
        execution: "auto" runs the solutions whose code has changed, "always" all, "never" none:
            then a solution whose code has changed is an error.
        write: Without it, only find out which files would change.
        language: Only this edition, such as "zh"; nothing is executed for it. All by default.
        say: Called with a sentence before each long step.

    Returns:
        The files that changed (or would), the chapters executed, errors and warnings.
    """
    built, slug = Built([], [], [], []), repository(root)
    for path in sources(root):
        if only in path.stem:
            try:
                figures = {}
                if language in ("", ENGLISH):
                    figures = _build_chapter(root, path, execution, write, built, slug, say or (lambda _: None))
                if language != ENGLISH and not built.errors:
                    _build_editions(root, read_chapter(path), language, write, built, slug, figures)
            except (ExerciseError, ExecutionError) as error:
                built.errors.append(str(error))
    return built


def _build_chapter(root, path, execution, write, built: Built, slug: str, say) -> dict[str, dict]:
    """Both notebooks in English; returns each edition's figures where the solution was executed."""
    chapter = read_chapter(path)
    findings = examine(chapter)
    built.errors.extend(findings.errors)
    built.warnings.extend(findings.warnings)
    figures: dict[str, dict] = {}
    if findings.errors:
        return figures
    _put(root / place(chapter.stem), learner_notebook(chapter, slug), write, built)
    target = root / place(chapter.stem, "solutions")
    solution, stored = solution_notebook(chapter, slug), read_notebook(target)
    kept = stored is not None and execution != "always" and with_kept_outputs(solution, stored)
    if not kept:
        if execution == "never":
            built.errors.append(f"{target.name}: not that of its source: run `python -m labutils build`")
            return figures
        if write:
            say(f"executing {chapter.stem}")
            before = why_busy()
            editions = editions_of(root, chapter.stem)
            solution = execute(solution, root, editions=editions)
            figures = {name: taken(solution, name) for name in editions}
            bare = [name for name, drawn in figures.items() if not drawn]
            built.warnings.extend(f"{name}, {chapter.stem}: no figure drawn: is a font there?" for name in bare)
            mark_busy(solution, reason := before or why_busy())
            built.warnings.extend([f"{chapter.stem}: executed on a busy machine: {reason}"] if reason else [])
        built.executed.append(chapter.stem)
    _put(target, solution, write, built, unsure=not kept and not write)
    return figures


def _build_editions(root, chapter: Chapter, language: str, write: bool, built: Built, slug: str, figures: dict) -> None:
    """Both notebooks of a chapter in other languages; the solution's outputs are those of the English one.

    Its figures are those that were drawn beside the English ones as these were executed, now or before.
    """
    stem = chapter.stem
    for name in editions_of(root, stem):
        if language not in ("", name):
            continue
        ours = edition(root, name, stem, chapter.cells)
        if ours.lacking:
            built.warnings.append(f"{name}, {stem}: {len(ours.lacking)} of {ours.paragraphs} paragraphs not translated")
        _put(root / place(stem, "", name), learner_notebook(chapter, slug, ours), write, built)
        target = root / place(stem, "solutions", name)
        solution, stored = solution_notebook(chapter, slug, ours), read_notebook(root / place(stem, "solutions"))
        before = read_notebook(target)
        if before is not None and stored is not None and same_code(solution, before):
            figures = {name: figures_of(before, stored)} | figures
        if stored is not None and with_kept_outputs(solution, stored):
            placed(solution, figures.get(name, {}))
            _put(target, solution, write, built)


def update_catalogues(root: Path, language: str, *, only: str = "", write: bool = True) -> list[Path]:
    """Bring a language's catalogues up to date with the sources; return those that changed, or would.

    Args:
        root: The course's folder.
        language: Such as "zh".
        only: A part of the names of chapters whose catalogue is begun where there is none.
        write: Without it, only find out.
    """
    chapters = {path.stem: read_chapter(path).cells for path in sources(root)}
    begun = [stem for stem in chapters if only and only in stem]
    found = catalogues(root, chapters, language, begun)
    changed = [path for path, text in found.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in changed if write else []:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found[path], encoding="utf-8", newline="\n")
    return changed


def _put(path: Path, notebook, write: bool, built: Built, unsure: bool = False) -> None:
    text = text_of(notebook)
    if not unsure and path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    built.changed.append(path)
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
