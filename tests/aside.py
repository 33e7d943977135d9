"""Packages installed beside the environment, for one test session: what must not stand in it while learners work."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from labutils.course.cli.installation import UNREACHABLE, pip_environment


def install_aside(folder: Path, pins: Sequence[str], *, dependencies: bool = False) -> None:
    """Installs packages into a folder, by themselves or with all that they need; skips where no index is reached."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder)]
    result = subprocess.run(
        [*command, *([] if dependencies else ["--no-deps"]), *pins],
        env=pip_environment(os.environ),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    if result.returncode and re.search(UNREACHABLE, result.stderr):
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stderr


def triton_there() -> bool:
    """Whether Triton can be imported; asked without importing it."""
    return importlib.util.find_spec("triton") is not None
