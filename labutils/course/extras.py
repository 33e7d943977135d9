"""Optional heavy packages, installed when a chapter needs them. Standard library only."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from labutils.course.setup_cell import is_missing

ROOT = Path(__file__).resolve().parents[2]
ALONE = frozenset({"applications"})  # only their files are used: what they require stays away
JAX_DRIVERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
KEPT = frozenset({"triton"})  # a CUDA build of torch brings its own and works with no other: any version is left alone


def missing_packages(name: str, root: Path = ROOT) -> list[str]:
    """The requirements of one extra of pyproject.toml that this environment does not meet.

    Raises:
        ValueError: when pyproject.toml has no such extra.
    """
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if name not in extras:
        raise ValueError(f"name must be an extra of pyproject.toml ({', '.join(extras)}); got {name!r}")
    missing = [requirement for requirement in extras[name] if is_missing(requirement)]
    return [r for r in missing if not _fits_accelerator(r) and not _is_kept(r)]


def _fits_accelerator(requirement: str) -> bool:
    """Whether it is about a JAX built for this host's TPU or GPU: pip would replace it, and leave its driver behind."""
    return requirement.startswith("jax") and _is_installed("jax") and any(map(_is_installed, JAX_DRIVERS))


def _is_installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


def _is_kept(requirement: str) -> bool:
    name = re.match(r"[\w.-]+", requirement)[0]
    return name in KEPT and not is_missing(name)


def install_extra(name: str, root: Path = ROOT) -> bool:
    """Installs what an extra needs and this environment lacks; tells whether all of it is there now.

    In the course's own `.venv` the versions are those of constraints.txt; elsewhere (Colab) the host's own packages
    decide. A failure is one printed sentence, not an error: the chapter goes on without.

    Raises:
        ValueError: when pyproject.toml has no such extra.
    """
    missing = missing_packages(name, root)
    if not missing:
        return True
    print(f"installing {', '.join(missing)} ...", flush=True)
    pins = ["-c", str(root / "constraints.txt")] if Path(sys.prefix).resolve() == (root / ".venv").resolve() else []
    alone = ["--no-deps"] if name in ALONE else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *alone,
        *missing,
        *pins,
    ]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines()[::-1] if line.startswith("ERROR")), "pip failed")
        print(f"the extra {name!r} could not be installed, and what needs it is left out: {reason}")
    return result.returncode == 0


def install_packages(*names: str) -> bool:
    """Installs Debian packages that are missing, where apt-get needs no password; tells whether all are there now.

    Where it cannot, that is one printed sentence, not an error: the chapter goes on without.
    """
    missing = [name for name in names if not _has_package(name)]
    if not missing:
        return True
    if shutil.which("apt-get") is None or getattr(os, "geteuid", lambda: 1)() != 0:
        print(f"what needs {' and '.join(missing)} is left out; on Debian: sudo apt-get install {' '.join(missing)}")
        return False
    print(f"installing {', '.join(missing)} ...", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing]):
        subprocess.run(command, env=quiet, capture_output=True, check=False)
    left = [name for name in missing if not _has_package(name)]
    if left:
        print(f"apt-get could not install {', '.join(left)}, and what needs it is left out")
    return not left


def _has_package(name: str) -> bool:
    """Whether dpkg knows a package as installed; False where there is no dpkg."""
    if shutil.which("dpkg-query") is None:
        return False
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout == "installed"
