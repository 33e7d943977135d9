r"""Grade a folder of hand-ins: each checked in a process of its own, into a table with points and hints.

**A hand-in runs as code, with your rights.** Each runs in a process group of its own with limits on time,
memory, processes, disk and output, so that no accident spoils another grade, and its answers are moved into
the course's own notebook. That is no jail: code that means harm can read, change and delete your files, use the
network, tell lies about its own verdict (it runs in the same process as its check), or outlive its end by
clearing its environment. All hand-ins are read before the first one runs, and a change to the course's own files
stops the grading. Grade strangers' work as a user without rights or secrets, in a container without a network:

    docker run --rm --network none --read-only --tmpfs /tmp --memory 8g --pids-limit 256 --cap-drop ALL \
        --user 65534 -v "$PWD":/course:ro -v "$PWD"/hand-ins:/hand-ins:ro -v "$PWD"/grades:/grades -w /course \
        IMAGE python -m labutils grade /hand-ins --out /grades
"""

import csv
import hashlib
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from labutils.course import verdicts
from labutils.course.contained import Limits, run_contained
from labutils.course.hand_in import SIZE_LIMIT_BYTES, reference_folder
from labutils.lab.language import language
from labutils.lab.paths import readable, written_whole

COLUMNS = ("hand_in", "chapter", "exercise", "verdict", "points", "hint", "note", "seconds")
UNUSABLE = "unusable"
GRACE_S = 15.0  # the run's own limits act first: they know the guilty exercise, and spare the others
PARSE_MEMORY_BYTES = 1 << 30  # what reading the hand-in may take, beside what its run may


@dataclass(frozen=True)
class Options:
    """How to grade."""

    root: Path
    timeout_s: float | None = None
    limits: Limits = Limits(time_s=900.0)
    jobs: int = 1


def grade(folder: Path, out: Path, options: Options, say=print) -> list[dict]:
    """Grade every notebook below a folder; write ``grades.csv`` and ``summary.md`` into ``out``.

    What was graded before is taken from ``out/results`` as long as neither the hand-in nor the
    course's side has changed, so a grading that was stopped goes on where it was.

    Returns:
        The table: one row per hand-in and exercise, or one that says why a hand-in is unusable.
    """
    hand_ins = {path: _content(path) for path in find_hand_ins(folder, out)}  # read before one can overwrite another
    (out / "results").mkdir(parents=True, exist_ok=True)
    fingerprint = course_fingerprint(options)

    def graded(path: Path) -> list[dict]:
        name = readable(path.relative_to(folder))
        result = _stored_or_new(path, hand_ins[path], out / "results", fingerprint, options)
        say(f"{name}: {_one_line(result)}")
        return rows(name, result)

    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        table = [row for part in pool.map(graded, hand_ins) for row in part]
    write_csv(out / "grades.csv", table)
    _write(out / "summary.md", summary(table))
    for path in [path for path, content in hand_ins.items() if _content(path) != content]:
        said = "was changed while grading; its grade is of what it was before"
        say(f"warning: {readable(path.relative_to(folder))} {said}")
    return table


def find_hand_ins(folder: Path, out: Path) -> list[Path]:
    """All ``.ipynb`` below a folder, in order; folders that are links are not entered."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=False):
        left_out = {name for name in folders if Path(place, name).resolve() == out.resolve()} | {".ipynb_checkpoints"}
        folders[:] = sorted(set(folders) - left_out)
        found += [Path(place, name) for name in names if name.lower().endswith(".ipynb")]
    return sorted(found)


def course_fingerprint(options: Options) -> str:
    """A hash of all that a grade depends on beside the hand-in: references, checks, limits."""
    digest = hashlib.sha256(repr((options.timeout_s, asdict(options.limits), language())).encode())
    folder, _ = reference_folder(options.root)
    package = options.root / "labutils"
    files = [*folder.glob("*.ipynb"), *package.rglob("*.py"), *package.rglob("*.po"), *options.root.glob("*.py")]
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _content(path: Path) -> bytes | str:
    """What a hand-in holds, or why it is not read."""
    if path.is_symlink():
        return "a symbolic link: hand in the file itself"
    if not path.is_file() or path.stat().st_size > SIZE_LIMIT_BYTES:
        return f"not a file of at most {SIZE_LIMIT_BYTES // 10**6} MB"
    return path.read_bytes()


def _stored_or_new(path: Path, content: bytes | str, results: Path, fingerprint: str, options: Options) -> dict:
    if isinstance(content, str):
        return {UNUSABLE: content, "seconds": 0.0}
    key = hashlib.sha256(fingerprint.encode() + os.fsencode(path.name) + b"\0" + content).hexdigest()
    store = results / f"{key[:32]}.json"
    try:
        stored = json.loads(store.read_text(encoding="utf-8"))
        return stored if UNUSABLE in stored or stored["verdicts"] is not None else {}
    except (OSError, ValueError, KeyError, TypeError):
        result = check_contained(path.name, content, options)
        if course_fingerprint(options) != fingerprint:
            raise RuntimeError(
                f"the course's own files changed while {path} ran: grade again with a fresh copy"
            ) from None
        _write(store, json.dumps(result, ensure_ascii=False, indent=1))
        return result


def check_contained(file_name: str, content: bytes, options: Options) -> dict:
    """Check one hand-in in a process of its own; whatever happens there, this returns a result."""
    begin = time.monotonic()
    inner = options.limits
    outer = replace(
        inner,
        time_s=inner.time_s + 60,
        memory_bytes=inner.memory_bytes + PARSE_MEMORY_BYTES,
        processes=inner.processes + 8,
        grace_s=GRACE_S,
    )
    with tempfile.TemporaryDirectory(prefix="labutils-grade-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        copy = folder / file_name
        copy.write_bytes(content)
        out = folder / "result.json"
        arguments = [str(copy), str(options.root), str(options.timeout_s or 0), json.dumps(asdict(inner)), str(out)]
        path_of_modules = os.pathsep.join(filter(None, [str(options.root), os.environ.get("PYTHONPATH", "")]))
        env = {
            **os.environ,
            "PYTHONPATH": path_of_modules,
            "PYTHONUTF8": "1",
            "TMPDIR": name,
            "TEMP": name,
            "TMP": name,
        }
        command = [sys.executable, "-m", "labutils.course.check", *arguments]
        ended = run_contained(command, folder=folder, env=env, limits=outer)
        result = _read_result(out, ended.reason)
    return result | {"seconds": round(time.monotonic() - begin, 1)}


def _read_result(path: Path, reason: str) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if UNUSABLE in result or result["verdicts"]:
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {UNUSABLE: f"its check was ended by the limit on {reason}" if reason else "its check ended without a result"}


def rows(name: str, result: dict) -> list[dict]:
    """A result as rows of the table."""
    base = dict.fromkeys(COLUMNS, "") | {"hand_in": name, "seconds": result.get("seconds", "")}
    if UNUSABLE in result:
        return [base | {"verdict": UNUSABLE, "points": 0, "hint": verdicts.tidy(result[UNUSABLE], 200)}]
    table = []
    for verdict in result["verdicts"]:
        points = int(verdict["verdict"] == verdicts.RIGHT)
        note = "; ".join(filter(None, [verdict["note"], *result.get("notes", [])[:2]]))
        row = {key: verdict[key] for key in ("exercise", "verdict", "hint")}
        table.append(base | row | {"chapter": result["chapter"], "points": points, "note": note})
    return table


def write_csv(path: Path, table: list[dict]) -> None:
    """The table for a spreadsheet: UTF-8 with a mark that Excel needs, and no cell that it would run."""
    with written_whole(path) as new, open(new, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({key: _harmless(value) for key, value in row.items()} for row in table)


def _harmless(value):
    """A text that a spreadsheet does not take for a formula."""
    if isinstance(value, str):
        value = verdicts.tidy(value).replace("\n", " | ")
        return f"'{value}" if value.lstrip().startswith(("=", "+", "-", "@")) else value
    return value


def summary(table: list[dict]) -> str:
    """The grades of each hand-in, and the mistakes that the class made most, as Markdown."""
    by_hand_in: dict[str, list[dict]] = {}
    for row in table:
        by_hand_in.setdefault(row["hand_in"], []).append(row)
    lines = [
        "# Grades",
        "",
        "| hand-in | chapter | points | of | not right | notes |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for name, part in by_hand_in.items():
        wrong = ", ".join(
            f"{row['exercise'].split(' ')[0]} {row['verdict']}".strip() for row in part if not row["points"]
        )
        note = "check deleted or changed" if any(verdicts.CHEATED in row["note"] for row in part) else ""
        cells = [name, part[0]["chapter"], sum(row["points"] for row in part), len(part), wrong, note]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, "", *_common_mistakes(table), ""])


def _common_mistakes(table: list[dict]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for row in table:
        if row["verdict"] == verdicts.WRONG:
            counts[row["exercise"], row["hint"]] = counts.get((row["exercise"], row["hint"]), 0) + 1
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    lines = [f"- {count} × {exercise}: {hint}" for (exercise, hint), count in most]
    return ["## Most common mistakes", "", *lines] if lines else []


def _one_line(result: dict) -> str:
    if UNUSABLE in result:
        return f"unusable ({verdicts.tidy(result[UNUSABLE], 120)})"
    right = sum(verdict["verdict"] == verdicts.RIGHT for verdict in result["verdicts"])
    return f"{right} of {len(result['verdicts'])} right ({result.get('seconds', 0)} s)"


def _write(path: Path, text: str) -> None:
    with written_whole(path) as new:
        new.write_text(text, encoding="utf-8")
