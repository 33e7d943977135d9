"""Which exercises are done: in the running kernel, and kept from one session to the next."""

import contextlib
import datetime
import importlib
import json
import pkgutil
import re
import sys

from labutils.course import checks
from labutils.lab.language import translated
from labutils.lab.paths import learner_dir, written_whole

_CHAPTER = {"number": ""}  # of the notebook that this kernel runs; set by `begin`
_VIEWS: list = []  # functions that draw the newest state again


def begin(stem: str) -> None:
    """Listen to this kernel's checks as those of notebook ``stem``; the set-up cell calls it."""
    _CHAPTER["number"] = str(int(stem[:2]))
    if _on_result not in checks.LISTENERS:
        checks.LISTENERS.append(_on_result)
    for name, is_right in checks.RESULTS.items():
        _store(name, is_right)


def _on_result(name: str, is_right: bool) -> None:
    _store(name, is_right)
    for draw in _VIEWS:
        draw()


def load() -> dict[str, dict]:
    """The kept state: ``{"0.1 tokens_per_second": {"passed": true, "at": "2026-01-31T12:00:00"}}``."""
    try:
        state = json.loads((learner_dir() / "progress.json").read_text(encoding="utf-8"))
        return {name: entry for name, entry in state.items() if isinstance(entry["passed"], bool)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _store(name: str, is_right: bool) -> None:
    """Keep a result. What was once passed stays passed; a folder that cannot be written stops nobody."""
    state = load()
    if state.get(name, {}).get("passed"):
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    state[name] = {"passed": is_right, "at": now}
    with contextlib.suppress(OSError), written_whole(learner_dir() / "progress.json") as new:
        new.write_text(json.dumps(state, indent=1, ensure_ascii=False, sort_keys=True), encoding="utf-8")


def standing(chapter: str = "") -> dict[str, bool | None]:
    """Each exercise of a chapter by number: passed, tried without success, or (None) not tried yet."""
    chapter = chapter or _CHAPTER["number"]
    if chapter:
        _define(chapter)
    kept = {name: entry["passed"] for name, entry in load().items()} | checks.RESULTS
    names = sorted({*checks.EXERCISES, *kept}, key=lambda name: (_numbers(name), name))
    return {name: kept.get(name) for name in names if not chapter or name.split(".")[0] == chapter}


def _define(chapter: str) -> None:
    """Imports all modules that hold a chapter's checks, so that its exercises are known."""
    for module in pkgutil.iter_modules(checks.__path__):
        if module.name.startswith(f"ch{int(chapter):02d}"):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"labutils.course.checks.{module.name}")


def _numbers(name: str) -> list[int]:
    """[6, 12] of "6.12 nvfp4_gemv"."""
    return [int(digits) for digits in re.findall(r"\d+", name.partition(" ")[0])]


def summary(chapter: str = "") -> str:
    """The standing in plain text, one line per exercise."""
    state = standing(chapter)
    marks = {True: "✓", False: "✗", None: "·"}
    words = {True: "", False: f"  ({translated('not right yet')})", None: f"  ({translated('not tried yet')})"}
    done = sum(1 for value in state.values() if value)
    lines = [translated("{done} of {count} exercises passed", done=done, count=len(state))]
    return "\n".join([*lines, *(f"  {marks[value]} {name}{words[value]}" for name, value in state.items())])


def progress(chapter: str = "") -> None:
    """Show which exercises are passed: in a notebook a text and a bar that follow the checks.

    Args:
        chapter: Its number, such as "2"; by default that of this notebook.
    """
    if not _in_notebook():
        print(summary(chapter))
        return
    from IPython.display import display

    text = display({"text/plain": summary(chapter)}, raw=True, display_id=True)
    _watch(lambda: text.update({"text/plain": summary(chapter)}, raw=True))
    with contextlib.suppress(ImportError):
        display(_bar(chapter))


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _watch(draw) -> None:
    """Draw again at each check; only the newest views live on."""
    _VIEWS[:] = [*_VIEWS[-7:], draw]


def _bar(chapter: str):
    """A bar that follows the checks; made of what ipywidgets 7.7 and 8 share."""
    import ipywidgets

    bar = ipywidgets.IntProgress(value=0, min=0, max=1, description=translated("passed"))

    def draw() -> None:
        state = standing(chapter)
        bar.max, bar.value = max(len(state), 1), sum(1 for value in state.values() if value)

    draw()
    _watch(draw)
    return bar
