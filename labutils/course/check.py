"""Check a learner's notebook: its answers, moved by name into a copy of the reference, under nbval.

A notebook is never compared with its own outputs: those are overwritten when a learner runs and saves.
The learner's EXERCISE cells go into a temporary copy of the solution (of the pristine copy in a
hand-out kit), where the CHECK cells and the lines that they must print are the course's own. After each check
the kernel is put back as it was, so that no answer is judged by another's names (`labutils.course.isolation`).
"""

import argparse
import copy
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from labutils.course import verdicts
from labutils.course.contained import Limits, run_contained
from labutils.course.exercises import Exercise, transplant
from labutils.course.guard import process_limit
from labutils.course.hand_in import Reference, UnusableError, find_reference, read_hand_in
from labutils.course.setup_cell import language_of
from labutils.course.verdicts import Verdict
from labutils.lab.language import ENGLISH, language, speaking, translated
from labutils.lab.paths import tool_cache_dir

CELL_TIMEOUT_S = 120.0
LONG_CELLS_S = dict.fromkeys(("03", "08", "09", "12", "13"), 300.0)  # of which their longest cells take a good part
LIMITS = Limits()
STARTUP = "from labutils.course import guard\nguard.install(get_ipython(), {answers!a}, {is_solution})\n"
# nbval reads the sanitizer file in the locale's encoding: keep it ASCII
SANITIZER = "[carriage returns]\nregex: \\r\nreplace: \n"


@dataclass(frozen=True)
class Report:
    """What was found in one notebook."""

    chapter: str
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)
    language: str = ENGLISH

    @property
    def is_right(self) -> bool:
        """Whether every exercise is right."""
        return all(verdict.verdict == verdicts.RIGHT for verdict in self.verdicts)

    def as_dict(self) -> dict:
        """For JSON."""
        return {"chapter": self.chapter, "verdicts": [v.as_dict() for v in self.verdicts], "notes": self.notes}


def cell_timeout_s(chapter: str) -> float:
    """Returns how long a cell of a chapter may run, at home and in class.

    >>> cell_timeout_s("02_quantization_formulas"), cell_timeout_s("08_fpga")
    (120.0, 300.0)
    """
    return LONG_CELLS_S.get(chapter[:2], CELL_TIMEOUT_S)


def check_notebook(path: Path, root: Path, *, timeout_s: float | None = None, limits: Limits = LIMITS) -> Report:
    """Give a verdict on each exercise of a learner's notebook, which is only read.

    Args:
        path: The learner's notebook.
        root: The course's folder, or that of a hand-out kit.
        timeout_s: How long one cell may run; by default as long as its chapter allows.
        limits: What a whole run may use.

    Raises:
        UnusableError: When the file is not a notebook of this course.
    """
    learner = read_hand_in(path)
    reference = find_reference(root, learner, path.name)
    with speaking(language_of(learner)):
        seconds = timeout_s or cell_timeout_s(reference.stem)
        return _Checking(reference, learner, root, seconds, limits).report()


class _Checking:
    """One check: runs the notebook, and again without each answer that hung or killed it."""

    def __init__(self, reference: Reference, learner: list, root: Path, timeout_s: float, limits: Limits):
        self.reference, self.learner, self.root = reference, learner, root
        self.timeout_s, self.limits = timeout_s, limits
        self.exercises = reference.exercises
        answers = {exercise.name: reference.cells[exercise.cell]["source"] for exercise in self.exercises}
        self.startup = STARTUP.format(answers=answers, is_solution=reference.is_solution)
        self.found: dict[str, Verdict] = {}
        self.notes: list[str] = []
        self.suspect: tuple[Exercise, int, str] | None = None

    def report(self) -> Report:
        first = transplant(self.reference.cells, self.learner)
        titles = {exercise.name: exercise.title for exercise in self.exercises}
        self.found |= {name: verdicts.missing(titles[name]) for name in first.missing}
        self.found |= {name: verdicts.doubled(titles[name]) for name in first.doubled}
        replaced = frozenset(self.found)
        while len(self.found) < len(self.exercises):
            culprit = self._round(replaced)
            if culprit is None:
                break
            replaced |= {culprit}
        for exercise in self.exercises:
            hint = translated("the lesson before it did not run: see the notes")
            verdict = self.found.setdefault(exercise.name, Verdict(exercise.title, verdicts.NOT_RUN, hint))
            if exercise.name in first.changed_checks:
                self.found[exercise.name] = replace(verdict, note=verdicts.CHEATED)
        return Report(self.reference.stem, [self.found[e.name] for e in self.exercises], self.notes, language())

    def _round(self, replaced: frozenset[str]) -> str | None:
        """Run once; record what is new; name the exercise that ended the run early, if one did."""
        cells = transplant(self.reference.cells, self.learner, keep=replaced).cells
        notebook = prepared(cells, self.exercises)
        for _ in range(2):  # a kernel that never came to an answer: another program had taken one of its ports
            records, running, reason = run_cells(notebook, self.startup, self.root, self.timeout_s, self.limits)
            if records.get(0, {}).get("fatal") != "dead":
                break
        code = [index for index, cell in enumerate(cells) if cell["cell_type"] == "code"]
        by_cell = {code[number]: record for number, record in records.items()}
        for exercise in self.exercises:
            self._judge(exercise, by_cell)
        self._note_lessons(by_cell)
        ended = next((n for n, r in records.items() if r["fatal"]), running)
        kind = reason or records.get(ended, {}).get("fatal", "dead")
        return self._blame(None if ended is None else code[ended], kind, replaced)

    def _judge(self, exercise: Exercise, by_cell: dict) -> None:
        answer, check = by_cell.get(exercise.cell), by_cell.get(exercise.check)
        if exercise.name in self.found or answer is None or answer["fatal"] or (check is None and answer["passed"]):
            return
        if check is None or not check["fatal"]:
            self.found[exercise.name] = verdicts.judge(exercise.title, answer, check or {})

    def _note_lessons(self, by_cell: dict) -> None:
        """Say which cells of the lesson failed: a check after them may fail for no fault of its own."""
        marked = {cell for exercise in self.exercises for cell in (exercise.cell, exercise.check)}
        for index, record in by_cell.items():
            if index not in marked and not record["passed"] and not record["fatal"]:
                words = verdicts.tidy(f"{record['ename']}: {record['evalue'] or record['message']}", 200)
                note = f"cell {index + 1}, part of the lesson, failed ({words})"
                if note not in self.notes:
                    self.notes.append(note)

    def _blame(self, cell: int | None, kind: str, replaced: frozenset[str]) -> str | None:
        """Whom to leave out of the next round, after one that ended early at ``cell``.

        An answer is guilty when its own cell or check ended the run. When a cell of the lesson did,
        the answer before it is only suspect: it is guilty if the lesson then runs without it.
        """
        suspect, self.suspect = self.suspect, None
        if suspect is not None and suspect[1] != cell:
            self._condemn(suspect[0], suspect[2])
        before = [e for e in self.exercises if cell is not None and e.cell <= cell and e.name not in replaced]
        if cell is None:
            return None
        if not before or (suspect is not None and suspect[1] == cell):
            self.notes.append(f"cell {cell + 1}, part of the lesson, did not come to its end ({kind})")
            return None
        if cell in (before[-1].cell, before[-1].check):
            self._condemn(before[-1], kind)
        else:
            self.suspect = (before[-1], cell, kind)
        return before[-1].name

    def _condemn(self, exercise: Exercise, kind: str) -> None:
        self.found[exercise.name] = verdicts.fatal(exercise.title, kind, f"{self.timeout_s:g} s")


def prepared(cells: list, exercises: list[Exercise]) -> dict:
    """The temporary notebook: no outputs but the lines that the checks must print, no tags on exercises."""
    from labutils.course.quick_nbformat import nbformat

    v4, result = nbformat.v4, []
    lines = {exercise.check: f"✓ {exercise.title}\n" for exercise in exercises}
    marked = {exercise.cell for exercise in exercises} | lines.keys()
    for index, cell in enumerate(copy.deepcopy(cells)):
        if cell["cell_type"] != "code":
            result.append(v4.new_markdown_cell(cell["source"]))
            continue
        source = re.sub(r"(?m)^(\s*#+\s*)(NBVAL_|PYTEST_VALIDATE)", r"\1 no \2", cell["source"])
        fresh = v4.new_code_cell(source if index in marked else cell["source"])
        if index not in marked and "raises-exception" in cell["tags"]:  # a lesson that shows an error
            fresh.metadata["tags"] = ["raises-exception"]
        if index in lines:  # nbval compares only where this marker stands and the reference was run
            fresh.source += "\n# NBVAL_CHECK_OUTPUT"
            fresh.outputs, fresh.execution_count = [v4.new_output("stream", name="stdout", text=lines[index])], 1
        result.append(fresh)
    return v4.new_notebook(cells=result)


def run_cells(
    notebook, startup_code: str, root: Path, timeout_s: float, limits: Limits
) -> tuple[dict[int, dict], int | None, str]:
    """Run a notebook under nbval, in a kernel that runs ``startup_code`` first.

    Returns:
        The records by number of code cell, the cell left running (pytest never stops in one by itself, but a limit
        or an answer may end it there), and the limit that ended it.
    """
    from labutils.course.quick_nbformat import nbformat

    with tempfile.TemporaryDirectory(prefix="labutils-check-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / "notebook.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
        (folder / "sanitize.cfg").write_text(SANITIZER, encoding="ascii")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        startup = folder / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "00-guard.py").write_text(startup_code, encoding="utf-8")
        (folder / "tmp").mkdir()
        ended = run_contained(_command(timeout_s), folder=folder, env=_environment(root, folder), limits=limits)
        records, running = _read_records(folder / "report.jsonl")
        if not records and running is None:
            said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"pytest could not run the notebook (status {ended.status}): {said[-2000:]}")
    return records, running, ended.reason


def _command(timeout_s: float) -> list[str]:
    plugins = ["-p", "labutils.course.nbval_report", "-p", "nbval.plugin", "-p", "no:cacheprovider"]
    options = [
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-kernel-startup-timeout=300",
        f"--nbval-cell-timeout={timeout_s:g}",
    ]
    quiet = ["-q", "--color=no", "--tb=no", "-c", "pytest.ini", "--nbval-sanitize-with", "sanitize.cfg"]
    return [sys.executable, "-m", "pytest", *plugins, *options, *quiet, "notebook.ipynb"]


def _environment(root: Path, folder: Path) -> dict[str, str]:
    """The run's environment: nothing of the user's pytest, IPython or course settings reaches it."""
    dropped = ("PYTEST_", "IPYTHON", "JUPYTER_", "COV_", "COVERAGE_", "LABUTILS_HOME")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return kept | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), kept.get("PYTHONPATH", "")])),
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LABUTILS_REPORT": str(folder / "report.jsonl"),
        "LABUTILS_HOME": str(folder / "learner"),
        "LABUTILS_LANGUAGE": language(),
        "YOWASP_CACHE_DIR": str(tool_cache_dir().resolve()),
        "LABUTILS_MAX_PROCESSES": process_limit(),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "TMPDIR": str(folder / "tmp"),
        "TEMP": str(folder / "tmp"),
        "TMP": str(folder / "tmp"),
    }


def _read_records(path: Path) -> tuple[dict[int, dict], int | None]:
    """The cells that ended, and the one that had begun and not ended."""
    records, running = {}, None
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["event"] == "start":
            running = record["cell"]
        else:
            records[record["cell"]] = record
            running = None
    return records, running


def as_text(report: Report, name: str) -> str:
    """A report for the learner to read."""
    with speaking(report.language):
        count = {"right": sum(v.verdict == verdicts.RIGHT for v in report.verdicts), "count": len(report.verdicts)}
        lines = [f"{name} ({report.chapter}): " + translated("{right} of {count} exercises right", **count)]
        for verdict in report.verdicts:
            lines += _lines_of(verdict)
        note = translated("note")
    return "\n".join([*lines, *(f"  {note}: {text}" for text in report.notes)])


def _lines_of(verdict: Verdict) -> list[str]:
    mark = "✓" if verdict.verdict == verdicts.RIGHT else "✗"
    lines = [f"  {mark} {verdict.exercise}: {translated(verdict.verdict)}"]
    if verdict.hint:
        lines.append(f"      {translated('hint')}: {verdict.hint}")
    lines += [f"      {line.strip()}" for line in verdict.details.splitlines()[1:] if not verdicts.hint_of(line, "")]
    return [*lines, *([f"      {translated('note')}: {translated(verdict.note)}"] if verdict.note else [])]


def main(arguments: list[str]) -> int:
    """``python -m labutils.course.check NOTEBOOK ROOT TIMEOUT LIMITS OUT``: what `grade` starts, once per hand-in."""
    parser = argparse.ArgumentParser()
    for name in ("notebook", "root", "timeout", "limits", "out"):
        parser.add_argument(name)
    args = parser.parse_args(arguments)
    try:
        limits = Limits(**json.loads(args.limits))
        report = check_notebook(
            Path(args.notebook), Path(args.root), timeout_s=float(args.timeout) or None, limits=limits
        )
        result = report.as_dict()
    except UnusableError as error:
        result = {"unusable": str(error)}
    Path(args.out).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
