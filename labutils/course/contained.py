"""Run a command in a process group of its own, under limits, and leave nothing of it behind."""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.2
DISK_EVERY = 5  # polls between two looks at the folder's size
TOKEN = "LABUTILS_CONTAINED"


@dataclass(frozen=True)
class Limits:
    """What one run may use, and for how long it may use more; checked a few times a second, on every platform."""

    time_s: float = 1800.0
    memory_bytes: int = 8 << 30
    processes: int = 48
    disk_bytes: int = 1 << 30
    grace_s: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a contained command ended: its status, and which limit ended it ("" for none)."""

    status: int
    reason: str


def run_contained(command: list[str], *, folder: Path, env: dict[str, str], limits: Limits) -> Ended:
    """Run ``command`` in ``folder``; its output goes to ``folder/output.txt``.

    Whatever it started is ended with it: descendants seen while it ran, and processes that still
    carry its token in their environment.
    """
    token = uuid.uuid4().hex
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**env, TOKEN: ":".join(filter(None, [env.get(TOKEN, ""), token]))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **_own_group(),
        )
    seen = {member.pid: member for member in _family(process.pid)}
    try:
        reason = _watch(process, folder, limits, seen)
    finally:
        _end(process, seen, token)
    return Ended(process.wait(), reason)


def _own_group() -> dict:
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _watch(process, folder: Path, limits: Limits, seen: dict) -> str:
    """Wait for the end, or for a limit; return the limit's name."""
    begin = within = time.monotonic()
    used_bytes, polls = 0, 0
    while process.poll() is None:
        family = _family(process.pid)
        seen.update({member.pid: member for member in family})
        if polls % DISK_EVERY == 0:
            used_bytes = folder_bytes(folder)
        reason, now = _beyond(limits, time.monotonic() - begin, family, used_bytes), time.monotonic()
        within = within if reason else now
        if reason and now - within >= limits.grace_s:
            return reason
        polls += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    return ""


def _beyond(limits: Limits, seconds: float, family: list[psutil.Process], used_bytes: int) -> str:
    """The limit that is passed, or ""."""
    if seconds > limits.time_s:
        return "time"
    if len(family) > limits.processes:
        return "processes"
    if sum(map(_memory, family)) > limits.memory_bytes:
        return "memory"
    return "disk" if used_bytes > limits.disk_bytes else ""


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _end(process, seen: dict, token: str) -> None:
    """Stop, then kill, everything that the command started; three rounds against quick forkers."""
    for _ in range(3):
        members = {member.pid: member for member in [*seen.values(), *_bearers(token)]}
        for member in members.values():
            with contextlib.suppress(psutil.Error):
                for child in member.children(recursive=True):
                    seen[child.pid] = child
                    _kill(child)
            _kill(member)
        if not _bearers(token):
            break
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    end = time.monotonic() + 10  # killed is not yet gone, least of all on a busy machine
    while time.monotonic() < end and any(_lives(member) for member in seen.values()):
        time.sleep(POLL_S)


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # psutil tells a process from a later one with the same id
        process.kill()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _bearers(token: str) -> list[psutil.Process]:
    """The living processes that carry the token: also those whose parents have ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if _lives(process) and token in process.environ().get(TOKEN, ""):
                found.append(process)
    return found
