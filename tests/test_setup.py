"""The set-up for real, with a project so small that it needs nothing from the network."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labutils.course.cli import environment

REPOSITORY = Path(__file__).resolve().parents[1]
BACKEND = """
import os, time, zipfile

METADATA = "Metadata-Version: 2.1\\nName: labutils\\nVersion: 0.1.0\\nProvides-Extra: lab\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def get_requires_for_build_editable(settings=None):
    return []

def build_editable(folder, settings=None, metadata=None):
    if os.path.exists("slowly"):
        time.sleep(15)
    name, info = "labutils-0.1.0-py3-none-any.whl", "labutils-0.1.0.dist-info"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("labutils.pth", os.getcwd())
        wheel.writestr(info + "/METADATA", METADATA)
        wheel.writestr(info + "/WHEEL", WHEEL)
        wheel.writestr(info + "/RECORD", "")
    return name
"""
TINY_PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "labutils"
version = "0.1.0"
dependencies = []
[project.optional-dependencies]
lab = []
"""
COMMAND = """
import sys
HELP, NEEDS_ENVIRONMENT, PASSES_ON = "say where this runs", True, True
def add_arguments(parser): pass
def run(args):
    print(sys.prefix, args.rest)
    return 7
"""


@pytest.fixture
def tiny_course(tmp_path):
    folder = tmp_path / "a course"  # a space, as in many a Windows user's name
    (folder / "labutils" / "course" / "cli").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(REPOSITORY / "labutils" / name, folder / "labutils" / name)
    for name in ("__init__", "main", "environment", "installation", "lock", "progress"):
        shutil.copy(REPOSITORY / "labutils" / "course" / "cli" / f"{name}.py", folder / "labutils" / "course" / "cli")
    (folder / "labutils" / "course" / "cli" / "test.py").write_text(COMMAND, encoding="utf-8")
    (folder / "pyproject.toml").write_text(TINY_PROJECT, encoding="utf-8")
    (folder / "constraints.txt").write_text("", encoding="utf-8")
    (folder / "backend.py").write_text(BACKEND, encoding="utf-8")
    return folder


def outside(folder, *, wait=True):
    """Runs `python -m labutils test x` as a user would, with the Python behind this environment."""
    environ = {**os.environ, "PIP_FIND_LINKS": str(folder), "PIP_NO_INDEX": "1"}
    environ.pop(environment.NO_VENV, None)
    base = getattr(sys, "_base_executable", sys.executable)
    options = {"cwd": folder, "env": environ, "stdin": subprocess.DEVNULL, "encoding": "utf-8"}
    command = [base, "-m", "labutils", "test", "x"]
    if not wait:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    return subprocess.run(command, capture_output=True, timeout=300, **options)


@pytest.mark.slow
def test_set_up_for_real_then_at_once_then_broken_then_again(tiny_course):
    venv = environment.venv_path(tiny_course)
    first = outside(tiny_course)
    assert first.returncode == 7, first.stderr
    assert first.stdout.strip() == f"{venv} ['x']"
    assert "[2/2] installing the other packages" in first.stderr

    start = time.perf_counter()
    second = outside(tiny_course)
    assert (second.returncode, second.stderr) == (7, "")
    assert time.perf_counter() - start < 5

    environment.python_path(tiny_course).unlink()
    third = outside(tiny_course)
    assert third.returncode == 7, third.stderr
    assert third.stderr.startswith("The environment in .venv is broken: building it anew.")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_set_up_recovers_from_a_kill_in_the_middle(tiny_course):
    (tiny_course / "slowly").touch()
    killed = outside(tiny_course, wait=False)
    log = tiny_course / "build" / "install.log"
    deadline = time.monotonic() + 300
    while not (log.exists() and "metadata" in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, "pip never got to the package"
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tiny_course / "slowly").unlink()
    recovered = outside(tiny_course)
    assert recovered.returncode == 7, recovered.stderr
    assert "waiting for it" in recovered.stderr  # for the pip that outlived the call which had started it
    assert "stopped halfway" in recovered.stderr
