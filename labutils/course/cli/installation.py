"""What the set-up installs, from where, and what to do when it fails. Standard library only."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from labutils.course.cli.progress import Outcome, Stage, follow

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STEERING = ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
CPU_DISK_BYTES, CUDA_DISK_BYTES = 4e9, 12e9
AGAIN = "then run the same command again"


class SetupError(Exception):
    """The set-up cannot go on; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Plan:
    """What to install into which environment."""

    root: Path
    python: Path
    extras: str
    cuda: bool
    fresh: bool  # there is no environment yet

    @property
    def folder(self) -> Path:
        """The environment itself."""
        return self.python.parents[1]

    @property
    def log(self) -> Path:
        """Where everything that pip says is kept."""
        return self.root / "build" / "install.log"


def say(text: str) -> None:
    """Tells the user a sentence, beside whatever the command itself prints."""
    print(text, file=sys.stderr, flush=True)


def has_nvidia_gpu() -> bool:
    """Tells whether an NVIDIA driver is there, without asking it anything."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def wants_cpu_torch(cuda: bool, environ: Mapping[str, str]) -> bool:
    """Only Linux's default torch carries CUDA; a user who steers pip or asks for CUDA decides for herself."""
    steered = any(environ.get(name) for name in STEERING)
    return sys.platform == "linux" and not cuda and not steered and not has_nvidia_gpu()


def pip_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Lets pip ask nothing, colour nothing and write into the environment only."""
    clean = {name: value for name, value in environ.items() if name not in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX")}
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "NO_COLOR": "1"}
    return {**clean, **quiet, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}


def pinned_torch(root: Path) -> str:
    """Reads the line `torch==…` of constraints.txt."""
    found = re.search(r"^torch==\S+", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return found[0] if found else "torch"


def require_disk(root: Path, needed_bytes: float) -> None:
    """Raises before a download that could not be stored."""
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < needed_bytes:
        raise SetupError(
            f"setting up needs about {needed_bytes / 1e9:.0f} GB of free disk and {root} has "
            f"{free_bytes / 1e9:.1f} GB: free some space, {AGAIN}"
        )


UNREACHABLE = (
    r"name resolution|NewConnectionError|Failed to establish a new connection|Network is unreachable|getaddrinfo"
    r"|ConnectTimeoutError|Read timed out|nodename nor servname|ProxyError|Connection refused|ConnectionResetError"
)
FAILURES = (
    (
        r"No space left on device|Errno 28|not enough space on the disk",
        f"the disk is full: free some space (or set TMPDIR to a folder on a larger disk), {AGAIN}",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        f"the network's certificate is not trusted: set PIP_CERT to your organisation's certificate file, {AGAIN}",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the pins of constraints.txt contradict each other here: restore pyproject.toml and constraints.txt "
        f"(git checkout), {AGAIN}",
    ),
    (
        UNREACHABLE,
        "the package index cannot be reached: connect to the network (or name a mirror in PIP_INDEX_URL, or a folder "
        f"of wheels in PIP_FIND_LINKS), {AGAIN}",
    ),
    (
        r"Permission denied|Errno 13|Access is denied",
        f"a file cannot be written: close whatever uses .venv and correct the folder's permissions, {AGAIN}",
    ),
    (
        r"No matching distribution found",
        f"a package has no version for Python {sys.version_info[0]}.{sys.version_info[1]} on this machine (the newest "
        f"Python and Intel Macs lack some): install Python 3.11, 3.12 or 3.13 on a supported system, {AGAIN} with it",
    ),
)


def explain(output: str) -> str:
    """Finds the one sentence for a failed installation."""
    for pattern, sentence in FAILURES:
        if re.search(pattern, output):
            return sentence
    return f"installing failed for a reason that is shown above: correct it, {AGAIN}"


def count_packages(plan: Plan) -> int:
    """Counts the packages that stand complete in the environment."""
    return sum(
        1 for pattern in ("lib/python*", "Lib") for _ in plan.folder.glob(f"{pattern}/site-packages/*.dist-info")
    )


def pip(plan: Plan, stage: Stage, *arguments: str) -> Outcome:
    """Runs the environment's own pip; Python compiles what is really imported, later, which saves half the time."""
    before = count_packages(plan)

    def detail(activity: str) -> str:
        several = re.match(r"writing \d+ packages", activity)
        return f"{activity}, {count_packages(plan) - before} done" if several else activity

    command = [plan.python, "-m", "pip", "install", "--no-compile", *arguments]
    environ = pip_environment(os.environ)
    return follow(command, stage=stage, log=plan.log, environ=environ, cwd=plan.root, detail=detail)


def require(outcome: Outcome, plan: Plan) -> None:
    """Raises, with the last lines of the log before it, where a stage failed."""
    if outcome.status == 0:
        return
    for line in outcome.tail.rstrip().splitlines()[-12:]:
        say(f"    {line}")
    raise SetupError(f"{explain(outcome.tail)} (full log: {plan.log.relative_to(plan.root)})")


def make_venv(plan: Plan, stage: Stage) -> None:
    """Makes the bare environment from the Python that runs this, or from the one behind it."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python comes without the venv module: on Debian and Ubuntu run "
            f"'sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv', {AGAIN}"
        )
    base = getattr(sys, "_base_executable", None) or sys.executable
    command = [base, "-m", "venv", plan.folder]
    require(follow(command, stage=stage, log=plan.log, environ=pip_environment(os.environ), cwd=plan.root), plan)


def has_cpu_torch(plan: Plan) -> bool:
    """Tells whether the CPU build of torch is what the environment holds."""
    return any(plan.folder.glob("lib/python*/site-packages/torch-*+cpu.dist-info"))


def install_torch(plan: Plan, stage: Stage, *, cpu: bool) -> None:
    """Takes torch from the index of CPU builds, or replaces the CPU build by the default one."""
    pin = pinned_torch(plan.root)
    if not cpu:
        require(pip(plan, stage, "--force-reinstall", "--no-deps", pin), plan)
        return
    options = ("--no-deps", "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "15")
    if pip(plan, stage, *options, pin).status != 0:
        say(
            f"The index of CPU builds ({CPU_INDEX}) cannot serve: the default index does, whose torch brings CUDA "
            "along, a download of several GB more."
        )
        require_disk(plan.root, CUDA_DISK_BYTES)


def install(plan: Plan) -> None:
    """Makes the environment where there is none and installs everything that the pins name."""
    cpu = wants_cpu_torch(plan.cuda, os.environ)
    swap = plan.cuda and has_cpu_torch(plan)
    titles = ["making .venv"] * plan.fresh + ["installing torch"] * (cpu or swap) + ["installing the other packages"]
    stages = {title: Stage(number, len(titles), title) for number, title in enumerate(titles, 1)}
    plan.log.parent.mkdir(exist_ok=True)
    plan.log.write_text("", encoding="utf-8")
    if plan.cuda and sys.platform != "linux":
        say("--cuda chooses a build on Linux only: elsewhere install torch into .venv as https://pytorch.org says.")
    if plan.fresh:
        large = plan.cuda or (sys.platform == "linux" and has_nvidia_gpu())
        require_disk(plan.root, CUDA_DISK_BYTES if large else CPU_DISK_BYTES)
        make_venv(plan, stages["making .venv"])
    if cpu or swap:
        install_torch(plan, stages["installing torch"], cpu=cpu)
    last = stages["installing the other packages"]
    require(pip(plan, last, "-e", f".[{plan.extras}]", "-c", "constraints.txt"), plan)
