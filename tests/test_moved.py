"""Names from before the three rooms: an older notebook of a learner runs on."""

import os
import subprocess
import sys

import pytest

from labutils.course.moved import MOVED, keep_old_names

OLD_CELLS = """
import sys
from labutils.course.setup_cell import ready
ready("00_start_here")
import labutils.lab.language as now
import labutils.language as before
from labutils.checks import ch00
from labutils.models.load import load_model
import labutils.course.checks.ch00
assert before is now and ch00 is labutils.course.checks.ch00
assert now.__spec__.name == "labutils.lab.language"
assert load_model.__module__ == "labutils.lab.models.load"
"""


def test_an_older_notebook_runs_on(tmp_path):
    environ = {**os.environ, "LABUTILS_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", OLD_CELLS], check=True, timeout=120, env=environ)


def test_a_name_that_never_was_stays_an_error():
    keep_old_names()
    for name in ("labutils.modelz", "labutils.models.nothing"):
        with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[2]):
            __import__(name)


def test_every_former_folder_is_somewhere():
    from importlib.util import find_spec

    assert all(find_spec(f"labutils.{new}") for new in MOVED.values())
