"""Progress: in the kernel, on disk, as text and as a widget."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from labutils.course import checks
from labutils.course import progress as module
from labutils.course.checks import core

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path / "learner"))
    for name, value in (("RESULTS", {}), ("LISTENERS", []), ("EXERCISES", ["97.1 a", "97.2 b", "98.1 c"])):
        monkeypatch.setattr(core, name, value)
        monkeypatch.setattr(checks, name, value)
    monkeypatch.setattr(module, "_VIEWS", [])
    monkeypatch.setattr(module, "_CHAPTER", {"number": ""})
    return tmp_path / "learner"


def test_standing_counts_only_the_chapter():
    module.begin("97_name")
    core._record("97.1 a", True)
    core._record("97.2 b", False)
    assert module.standing() == {"97.1 a": True, "97.2 b": False}
    assert module.summary().splitlines()[0] == "1 of 2 exercises passed"
    assert module.standing("98") == {"98.1 c": None}


@pytest.mark.parametrize("number", ["4", "6"])
def test_standing_knows_every_exercise_of_a_real_chapter_in_order_before_any_is_tried(number):
    """In a process of its own: here, other tests have imported the checks already."""
    code = f"from labutils.course.progress import standing; print(*standing('{number}'), sep='\\n')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    (source,) = (ROOT / "notebooks" / "source").glob(f"0{number}_*.py")
    asked = re.findall(r"^# ## Exercise ([\d.]+): (\w+)", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(asked) > 8 and shown.splitlines() == [f"{order} {name}" for order, name in asked]


def test_progress_is_kept_for_the_next_kernel(home):
    module.begin("97_name")
    core._record("97.1 a", True)
    core.RESULTS.clear()
    assert module.standing()["97.1 a"] is True
    assert json.loads((home / "progress.json").read_text(encoding="utf-8"))["97.1 a"]["passed"] is True


def test_what_was_passed_before_begin_is_kept_too(home):
    core._record("97.1 a", True)
    module.begin("97_name")
    assert module.load()["97.1 a"]["passed"] is True


def test_a_later_failure_shows_but_does_not_undo_the_kept_pass():
    module.begin("97_name")
    core._record("97.1 a", True)
    core._record("97.1 a", False)
    assert module.standing()["97.1 a"] is False
    assert module.load()["97.1 a"]["passed"] is True


@pytest.mark.parametrize("content", ["", "[1]", '{"97.1 a": 3}', '{"97.1 a": {"passed": "yes"}}', "{"])
def test_a_broken_file_is_as_none(home, content):
    home.mkdir()
    (home / "progress.json").write_text(content, encoding="utf-8")
    module.begin("97_name")
    assert module.standing() == {"97.1 a": None, "97.2 b": None}
    core._record("97.1 a", True)
    assert module.load()["97.1 a"]["passed"] is True


def test_a_folder_that_cannot_be_written_stops_nobody(home):
    home.write_text("a file, not a folder", encoding="utf-8")
    module.begin("97_name")
    core._record("97.1 a", True)
    assert module.standing()["97.1 a"] is True


def test_two_kernels_never_leave_half_a_file(home):
    home.mkdir()
    threads = [threading.Thread(target=module._store, args=(f"9.{i} x", True)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((home / "progress.json").read_text(encoding="utf-8"))
    assert [path.name for path in home.iterdir()] == ["progress.json"]


def test_progress_is_plain_text_outside_a_notebook(capsys):
    module.begin("97_name")
    core._record("97.2 b", True)
    module.progress()
    assert capsys.readouterr().out.startswith("1 of 2 exercises passed\n  · 97.1 a")


def test_bar_follows_the_checks():
    module.begin("97_name")
    bar = module._bar("")
    assert (bar.value, bar.max) == (0, 2)
    core._record("97.2 b", True)
    assert bar.value == 1


def test_text_in_a_notebook_follows_the_checks(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, **options):
        shown.append(data["text/plain"] if options else "bar")
        return Handle()

    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    module.begin("97_name")
    module.progress()
    core._record("97.1 a", True)
    assert [text.splitlines()[0] for text in shown] == [
        "0 of 2 exercises passed",
        "bar",
        "1 of 2 exercises passed",
    ]


def test_begin_twice_listens_once():
    module.begin("97_name")
    module.begin("97_name")
    assert len(core.LISTENERS) == 1
