"""The course's own environment, `.venv`: made on first use, left alone until its pins change.

Two files inside it say how it stands. `labutils-building` is there from the first moment of an installation, and
`labutils-stamp.json`, written last, says for which pins, Python and folder it was completed. An environment with the
first and without the second was never finished: the next call builds it anew. One with neither is somebody's own: it is
completed, never removed, unless it does not run at all. Which Python asks does not matter: a sound environment is never
given up because somebody called it with another one. Standard library only.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from labutils.course.cli.installation import AGAIN, Plan, SetupError, install, say
from labutils.course.cli.lock import locked
from labutils.course.cli.progress import run_attached

STAMP, MARK = "labutils-stamp.json", "labutils-building"
NO_VENV, GUARD = "LABUTILS_NO_VENV", "LABUTILS_RESTARTED"
OUR_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def venv_path(root: Path) -> Path:
    """The environment's folder."""
    return root / ".venv"


def python_path(root: Path) -> Path:
    """The environment's interpreter."""
    return venv_path(root) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def read_pins(root: Path, name: str) -> str:
    """The text of pyproject.toml or constraints.txt."""
    try:
        return (root / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SetupError(f"{root} has no {name}: clone the course again, or restore the file (git checkout)") from None


def requirements(root: Path, extras: str) -> list[str]:
    """The requirements that pyproject.toml names: the package's own and those of one extra."""
    project = tomllib.loads(read_pins(root, "pyproject.toml"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extras]]


def _optional_packages(root: Path) -> set[str]:
    """What some extra names and the set-up does not install."""
    extras = tomllib.loads(read_pins(root, "pyproject.toml"))["project"]["optional-dependencies"]
    named = {_package(requirement) for extra in extras.values() for requirement in extra}
    return named - {_package(requirement) for requirement in requirements(root, "lab")}


def _package(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def fingerprint(root: Path, extras: str) -> str:
    """A hash that changes when what has to be installed changes, and only then."""
    pins = [*requirements(root, extras), read_pins(root, "constraints.txt")]
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()


def read_stamp(root: Path) -> dict:
    """The stamp of a completed environment; empty where there is none."""
    try:
        stamp = json.loads((venv_path(root) / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(root: Path, extras: str, cuda: bool) -> None:
    """Declares the environment complete, in one step that cannot be seen half done."""
    python = python_inside(root)
    stamp = {"fingerprint": fingerprint(root, extras), "python": python, "root": str(root), "cuda": cuda}
    draft = venv_path(root) / (STAMP + ".draft")
    draft.write_text(json.dumps(stamp), encoding="utf-8")
    draft.replace(venv_path(root) / STAMP)
    (venv_path(root) / MARK).unlink(missing_ok=True)


def mark_unfinished(root: Path) -> None:
    """Declares the environment unfinished."""
    venv_path(root).mkdir(exist_ok=True)
    (venv_path(root) / MARK).touch()
    (venv_path(root) / STAMP).unlink(missing_ok=True)


def made_here(stamp: dict, root: Path) -> bool:
    """Tells whether a stamped environment still stands in the folder it was made for: its paths are absolute."""
    return os.path.exists(stamp.get("root", "")) and os.path.samefile(stamp["root"], root)


def stands(root: Path) -> bool:
    """Tells whether the environment's interpreter is there, without running it."""
    return python_path(root).exists() and (venv_path(root) / "pyvenv.cfg").exists()


def is_ready(root: Path, extras: str, cuda: bool) -> bool:
    """Compares the stamp with what is asked: no pip, no process."""
    pins, stamp = fingerprint(root, extras), read_stamp(root)
    return (
        stands(root)
        and stamp.get("fingerprint") == pins
        and (stamp.get("python") == OUR_PYTHON or not is_inside(root))
        and made_here(stamp, root)
        and (stamp.get("cuda", False) or not cuda)
    )


def is_inside(root: Path) -> bool:
    """Tells whether this very process runs in the environment."""
    return venv_path(root).exists() and os.path.samefile(sys.prefix, venv_path(root))


def python_inside(root: Path) -> str | None:
    """The version of the environment's Python, or None where it does not run or has no pip."""
    code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        result = subprocess.run([python_path(root), "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def why_rebuild(root: Path) -> str | None:
    """The reason to build an existing environment anew, or None where it can be used or completed."""
    folder, stamp = venv_path(root), read_stamp(root)
    if not os.path.lexists(folder):
        return None
    if not stamp and (folder / MARK).exists():
        return "An earlier set-up stopped halfway"
    if not stands(root):
        return "The environment in .venv is broken"
    if stamp and not made_here(stamp, root):
        return "The course's folder was moved or copied"
    version = python_inside(root)
    if stamp and version is None:
        return "The environment in .venv no longer runs"
    if stamp and version != stamp.get("python"):
        return f"The environment was made with Python {stamp.get('python')}, which has become {version}"
    if version is None or tuple(map(int, version.split("."))) < (3, 11):
        raise SetupError(
            f".venv was made by somebody else, with {'Python ' + version if version else 'no pip'}: move the folder "
            f".venv away, {AGAIN}"
        )
    return None


def discard(root: Path) -> None:
    """Moves the environment aside, in one step: an interruption leaves nothing that half works."""
    try:
        venv_path(root).rename(root / "build" / f"discarded-environment-{os.getpid()}")
    except OSError as error:
        raise SetupError(
            f"the old .venv cannot be removed ({error.strerror}): close JupyterLab and everything else that uses it, "
            f"{AGAIN}"
        ) from error


def sweep(root: Path) -> None:
    """Deletes what was moved aside, now or by a call that was stopped before it could."""
    for folder in (root / "build").glob("discarded-environment-*"):
        say("Deleting the old environment ...")
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def build(root: Path, extras: str, cuda: bool) -> None:
    """Makes, completes or replaces the environment; a choice of CUDA once made is kept."""
    cuda = cuda or read_stamp(root).get("cuda", False)
    if reason := why_rebuild(root):
        say(f"{reason}: building it anew.")
        discard(root)
    sweep(root)
    fresh = not venv_path(root).exists()
    if fresh:
        say("Setting up the course's environment in .venv: a few minutes, this once.")
    elif read_stamp(root):
        say("The course's pins have changed: bringing .venv up to date.")
    else:
        say("Installing what the course needs into the .venv that is there.")
    mark_unfinished(root)
    try:
        install(Plan(root, python_path(root), extras, cuda, fresh))
    except SetupError:
        if not fresh:  # pip rolls back what it cannot finish, so the next call need not start from nothing
            (venv_path(root) / MARK).unlink(missing_ok=True)
        raise
    write_stamp(root, extras, cuda)


def ensure_environment(root: Path, extras: str = "lab", cuda: bool = False) -> Path:
    """Returns the interpreter of a complete environment, at once where it stands already."""
    if not is_ready(root, extras, cuda):
        with locked(root):
            if not is_ready(root, extras, cuda):
                build(root, extras, cuda)
    return python_path(root)


def condemn(root: Path, package: str) -> bool:
    """Has the next call build the environment anew where a package that belongs to it is gone.

    The constraints pin the optional extras too; a package that only they name was never part of the environment.
    """
    pinned = f"\n{package.lower()}==" in read_pins(root, "constraints.txt").lower()
    if not (pinned and read_stamp(root) and is_inside(root)) or package.lower() in _optional_packages(root):
        return False
    mark_unfinished(root)
    return True


def require_packages(root: Path, extras: str = "lab") -> None:
    """Raises where an environment that somebody else made lacks a package."""
    missing = []
    for requirement in requirements(root, extras):
        name = _package(requirement)
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        command = f'{Path(sys.executable).name} -m pip install -e ".[{extras}]" -c constraints.txt'
        raise SetupError(f"this environment lacks {', '.join(missing)}: run {command} in {root}, {AGAIN}")


def activate(root: Path) -> None:
    """Lets everything that is started from here find the environment first, and speak UTF-8."""
    folder = str(python_path(root).parent)
    path = os.environ.get("PATH", "")
    if path.partition(os.pathsep)[0] != folder:
        os.environ["PATH"] = folder + os.pathsep + path
    os.environ["VIRTUAL_ENV"] = str(venv_path(root))
    os.environ["PYTHONUTF8"] = "1"


def replace_process(command: Sequence[str | Path]) -> None:
    """Goes on as another program; never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # exec would hand the terminal back too early there
        sys.exit(run_attached(command))
    os.execv(command[0], [str(part) for part in command])


def enter(root: Path, argv: Sequence[str], *, cuda: bool = False) -> None:
    """Returns inside a complete environment; outside, starts the same command again inside and never returns."""
    if os.environ.get(NO_VENV) == "1":
        require_packages(root)
        return
    python = ensure_environment(root, cuda=cuda)
    activate(root)
    if is_inside(root):
        os.environ.pop(GUARD, None)
        return
    if os.environ.get(GUARD) == str(python):
        raise SetupError(f"the Python in .venv does not run inside .venv: delete the folder .venv, {AGAIN}")
    os.environ[GUARD] = str(python)
    try:
        replace_process([python, "-m", "labutils", *argv])
    except OSError as error:
        mark_unfinished(root)
        raise SetupError(
            f"the Python in .venv cannot be started ({error.strerror}): run the same command again and it is built anew"
        ) from error
