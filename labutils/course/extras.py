"""Optional heavy packages, installed when a chapter needs them. Standard library only."""

import subprocess
import sys
import tomllib
from pathlib import Path

from labutils.course.setup_cell import is_missing

ROOT = Path(__file__).resolve().parents[2]


def missing_packages(name: str, root: Path = ROOT) -> list[str]:
    """The requirements of one extra of pyproject.toml that this environment does not meet.

    Raises:
        ValueError: when pyproject.toml has no such extra.
    """
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if name not in extras:
        raise ValueError(f"name must be an extra of pyproject.toml ({', '.join(extras)}); got {name!r}")
    return [requirement for requirement in extras[name] if is_missing(requirement)]


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
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *missing, *pins]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines()[::-1] if line.startswith("ERROR")), "pip failed")
        print(f"the extra {name!r} could not be installed, and what needs it is left out: {reason}")
    return result.returncode == 0
