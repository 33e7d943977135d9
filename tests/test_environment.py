"""The environment: made once, left alone, brought up to date, repaired, entered. Nothing is installed here."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from labutils.course.cli import environment, lock
from labutils.course.cli.installation import Plan, SetupError

PYPROJECT = """[project]
dependencies = ["torch>=2.9"]
[project.optional-dependencies]
lab = ["pytest>=8"]
gpu = ["triton>=3"]
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "course"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (folder / "constraints.txt").write_text("# tested\nfoo==1.0\ntorch==2.13.0\ntriton==3.7.1\n", encoding="utf-8")
    return folder


@pytest.fixture
def installs(monkeypatch):
    """Replaces the installation by one that makes the few files that count, and records its plans."""
    plans = []

    def fake_install(plan):
        plans.append(plan)
        plan.python.parent.mkdir(parents=True, exist_ok=True)
        plan.python.write_text("", encoding="utf-8")
        (plan.python.parents[1] / "pyvenv.cfg").write_text("", encoding="utf-8")

    monkeypatch.setattr(environment, "install", fake_install)
    monkeypatch.setattr(environment, "python_inside", lambda root: environment.OUR_PYTHON)
    return plans


def no_process(*args, **kwargs):
    raise AssertionError(f"a process was started: {args}")


# --- made once, left alone ---------------------------------------------------------------------------------------


def test_ensure_environment_installs_once_and_then_starts_no_process(root, installs, monkeypatch):
    python = environment.ensure_environment(root)
    assert python == environment.python_path(root)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr(environment, "python_inside", no_process)
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True]


def test_ensure_environment_ignores_pyproject_changes_that_install_nothing(root, installs):
    environment.ensure_environment(root)
    (root / "pyproject.toml").write_text(PYPROJECT + "[tool.ruff]\nline-length = 80\n", encoding="utf-8")
    environment.ensure_environment(root)
    assert len(installs) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [("pyproject.toml", PYPROJECT.replace("pytest>=8", "pytest>=9")), ("constraints.txt", "torch==2.14.0\n")],
)
def test_ensure_environment_updates_in_place_when_a_pin_changes(root, installs, capsys, name, text):
    environment.ensure_environment(root)
    (environment.venv_path(root) / "keep").touch()
    (root / name).write_text(text, encoding="utf-8")
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, False]
    assert (environment.venv_path(root) / "keep").exists()
    assert "pins have changed" in capsys.readouterr().err


def test_ensure_environment_remembers_the_choice_of_cuda(root, installs):
    environment.ensure_environment(root)
    environment.ensure_environment(root, cuda=True)
    environment.ensure_environment(root)
    (root / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    environment.ensure_environment(root)
    assert [plan.cuda for plan in installs] == [False, True, True]


# --- broken and half-made ----------------------------------------------------------------------------------------


def break_python(root):
    environment.python_path(root).unlink()


def break_config(root):
    (environment.venv_path(root) / "pyvenv.cfg").unlink()


def change_python(root):
    change_stamp(root, python="3.10", fingerprint="older pins, so that the environment is looked at")


def change_folder(root):
    change_stamp(root, root=str(root.parent))


def lose_stamp_in_installation(root):
    environment.mark_unfinished(root)


def change_stamp(course, **fields):
    path = environment.venv_path(course) / environment.STAMP
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_python, "is broken"),
        (break_config, "is broken"),
        (change_python, "which has become"),
        (change_folder, "moved or copied"),
        (lose_stamp_in_installation, "stopped halfway"),
    ],
)
def test_ensure_environment_builds_a_damaged_one_anew(root, installs, capsys, damage, sentence):
    environment.ensure_environment(root)
    (environment.venv_path(root) / "remains").touch()
    damage(root)
    environment.ensure_environment(root)
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, True]
    assert not (environment.venv_path(root) / "remains").exists()
    assert not list((root / "build").glob("discarded*"))
    assert sentence in capsys.readouterr().err


def test_ensure_environment_keeps_a_sound_one_whichever_python_asks(root, installs, monkeypatch):
    environment.ensure_environment(root)
    monkeypatch.setattr(environment, "OUR_PYTHON", "3.99")
    environment.ensure_environment(root)
    assert len(installs) == 1


def test_ensure_environment_notices_inside_that_its_own_python_has_changed(root, installs, monkeypatch):
    environment.ensure_environment(root)
    monkeypatch.setattr(sys, "prefix", str(environment.venv_path(root)))
    monkeypatch.setattr(environment, "OUR_PYTHON", "3.99")
    monkeypatch.setattr(environment, "python_inside", lambda root: "3.99")
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, True]


def raising(error, *, after=None):
    def install(plan):
        if after:
            after(plan)
        raise error

    return install


def test_ensure_environment_recovers_from_an_interruption(root, installs, monkeypatch, capsys):
    working = environment.install
    monkeypatch.setattr(environment, "install", raising(KeyboardInterrupt(), after=working))
    with pytest.raises(KeyboardInterrupt):
        environment.ensure_environment(root)
    monkeypatch.setattr(environment, "install", working)
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, True]
    assert "stopped halfway" in capsys.readouterr().err


def test_ensure_environment_starts_afresh_after_a_failed_first_installation(root, installs, monkeypatch):
    working = environment.install
    monkeypatch.setattr(environment, "install", raising(SetupError("no network"), after=working))
    with pytest.raises(SetupError, match="no network"):
        environment.ensure_environment(root)
    monkeypatch.setattr(environment, "install", working)
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, True]


def test_ensure_environment_keeps_the_old_one_when_an_update_fails(root, installs, monkeypatch):
    environment.ensure_environment(root)
    (root / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    working = environment.install
    monkeypatch.setattr(environment, "install", raising(SetupError("no network")))
    with pytest.raises(SetupError):
        environment.ensure_environment(root)
    monkeypatch.setattr(environment, "install", working)
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, False]


def test_ensure_environment_completes_somebody_elses_and_deletes_nothing(root, installs):
    installs_into = environment.venv_path(root)
    environment.install(Plan(root, environment.python_path(root), "lab", cuda=False, fresh=True))
    (installs_into / "theirs").touch()
    environment.ensure_environment(root)
    assert installs[-1].fresh is False
    assert (installs_into / "theirs").exists()


@pytest.mark.parametrize(("version", "words"), [("3.9", "with Python 3.9"), (None, "with no pip")])
def test_ensure_environment_refuses_somebody_elses_that_cannot_serve(root, installs, monkeypatch, version, words):
    environment.install(Plan(root, environment.python_path(root), "lab", cuda=False, fresh=True))
    monkeypatch.setattr(environment, "python_inside", lambda root: version)
    with pytest.raises(SetupError, match=words):
        environment.ensure_environment(root)
    assert environment.python_path(root).exists()


def test_ensure_environment_says_when_the_old_one_is_in_use(root, installs, monkeypatch):
    environment.ensure_environment(root)
    break_python(root)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "in use")))
    with pytest.raises(SetupError, match="close JupyterLab"):
        environment.ensure_environment(root)


def test_ensure_environment_sweeps_what_a_killed_call_left(root, installs):
    leftover = root / "build" / "discarded-environment-1" / "lib"
    leftover.mkdir(parents=True)
    environment.ensure_environment(root)
    assert not leftover.parent.exists()


def test_ensure_environment_names_a_missing_file(tmp_path):
    with pytest.raises(SetupError, match="has no pyproject.toml"):
        environment.ensure_environment(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_ensure_environment_says_when_the_folder_is_read_only(root, installs):
    root.chmod(0o500)
    with pytest.raises(SetupError, match="a folder of your own"):
        environment.ensure_environment(root)


def test_ensure_environment_says_when_it_cannot_write(root, installs):
    (root / "build").write_text("a file where a folder has to be", encoding="utf-8")
    with pytest.raises(SetupError, match="cannot write in"):
        environment.ensure_environment(root)


def test_two_calls_install_once(root, installs, capsys):
    with lock.locked(root):
        thread = threading.Thread(target=environment.ensure_environment, args=(root,), daemon=True)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive() and installs == []
        environment.build(root, "lab", cuda=False)
    thread.join(timeout=10)
    assert len(installs) == 1
    assert "waiting" in capsys.readouterr().err


def test_condemn_has_the_next_call_build_anew(root, installs, monkeypatch):
    environment.ensure_environment(root)
    monkeypatch.setattr(sys, "prefix", str(environment.venv_path(root)))
    assert not environment.condemn(root, "unknown")  # not one of the pins: not the environment's fault
    assert not environment.condemn(root, "triton")  # pinned, but an extra brings it: the set-up never did
    assert environment.condemn(root, "torch")
    environment.ensure_environment(root)
    assert [plan.fresh for plan in installs] == [True, True]


# --- going on inside ---------------------------------------------------------------------------------------------


@pytest.fixture
def restarts(monkeypatch):
    commands = []
    monkeypatch.setattr(environment, "replace_process", commands.append)
    for name in (environment.NO_VENV, environment.GUARD):
        monkeypatch.delenv(name, raising=False)
    for name in ("PATH", "VIRTUAL_ENV", "PYTHONUTF8", environment.GUARD):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return commands


def test_enter_restarts_the_command_inside(root, installs, restarts):
    environment.enter(root, ["check", "a notebook.ipynb"])
    python = environment.python_path(root)
    assert restarts == [[python, "-m", "labutils", "check", "a notebook.ipynb"]]
    assert os.environ["PATH"].startswith(str(python.parent))
    assert os.environ["PYTHONUTF8"] == "1"


def test_enter_goes_on_when_inside_already(root, installs, restarts, monkeypatch):
    environment.ensure_environment(root)
    monkeypatch.setattr(sys, "prefix", str(environment.venv_path(root)))
    environment.enter(root, ["doctor"])
    assert restarts == []


def test_enter_never_restarts_forever(root, installs, restarts):
    environment.enter(root, ["doctor"])
    with pytest.raises(SetupError, match=r"delete the folder \.venv"):
        environment.enter(root, ["doctor"])


def test_enter_condemns_a_python_that_cannot_be_started(root, installs, restarts, monkeypatch):
    monkeypatch.setattr(environment, "replace_process", raising(OSError(8, "Exec format error")))
    with pytest.raises(SetupError, match="built anew"):
        environment.enter(root, ["doctor"])
    assert not environment.is_ready(root, "lab", cuda=False)


def test_enter_takes_another_environment_when_told_to(root, restarts, monkeypatch):
    monkeypatch.setenv(environment.NO_VENV, "1")
    monkeypatch.setattr(environment, "ensure_environment", no_process)
    environment.enter(root, ["doctor"])
    (root / "pyproject.toml").write_text(PYPROJECT.replace("torch", "no-such-package"), encoding="utf-8")
    with pytest.raises(SetupError, match="lacks no-such-package"):
        environment.enter(root, ["doctor"])
