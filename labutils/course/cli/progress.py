"""Run a long command and show how far it is. Standard library only."""

import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SPARSE_S = 20.0  # seconds between two lines where the output is no terminal


@dataclass(frozen=True)
class Stage:
    """One step of several, as the user sees it."""

    number: int
    count: int
    title: str

    def __str__(self) -> str:
        return f"[{self.number}/{self.count}] {self.title}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and the end of what it said."""

    status: int
    tail: str


def pip_activity(line: str) -> str | None:
    """Says what a line of pip's output is about; None where it is about nothing new.

    >>> pip_activity("Collecting numpy>=2.0 (from labutils==0.1.0)")
    'numpy'
    >>> pip_activity("  Downloading torch-2.13.0-cp311-none-any.whl.metadata (29 kB)")
    >>> pip_activity("  Downloading torch-2.13.0-cp311-none-any.whl (191.8 MB)")
    'torch, 191.8 MB'
    >>> pip_activity("Installing collected packages: mpmath, torch")
    'writing 2 packages to the disk'
    >>> pip_activity("Installing collected packages: torch")
    'writing torch to the disk'
    """
    if found := re.match(r"\s*Collecting ([\w.-]+)", line):
        return found[1]
    if found := re.match(r"\s*Downloading (?:\S+/)?([A-Za-z0-9_.]+)-\S+(?<!\.metadata) \(([^)]+)\)", line):
        return f"{found[1]}, {found[2]}"
    if line.startswith("Installing collected packages:"):
        names = line.partition(":")[2].split(", ")
        return f"writing {f'{len(names)} packages' if len(names) > 1 else names[0].strip()} to the disk"
    return None


class Display:
    """Writes the progress: one line that renews itself on a terminal, sparse plain lines elsewhere."""

    def __init__(self, stage: Stage, out: TextIO) -> None:
        self.stage, self.out = stage, out
        self.live = out.isatty() and not os.environ.get("CI")
        self.start = self.shown = time.monotonic()
        if not self.live:
            self._line(f"{stage} ...")

    def _line(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def update(self, activity: str) -> None:
        """Shows the activity of the moment and the seconds since the stage began."""
        now = time.monotonic()
        if self.live:
            text = f"{self.stage}, {now - self.start:.0f} s: {activity}"
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", file=self.out, flush=True)
        elif now - self.shown >= SPARSE_S:
            self.shown = now
            self._line(f"      {now - self.start:.0f} s: {activity}")

    def close(self, status: int) -> None:
        """Says how the stage ended."""
        seconds = time.monotonic() - self.start
        verdict = f"done in {seconds:.0f} s" if status == 0 else f"failed after {seconds:.0f} s"
        if self.live:
            self.update(verdict)
            self._line("")
        else:
            self._line(f"      {verdict}")


def follow(
    command: Sequence[str | Path],
    *,
    stage: Stage,
    log: Path,
    environ: Mapping[str, str],
    cwd: Path,
    detail: Callable[[str], str] = str,
) -> Outcome:
    """Runs a command to its end: everything it says goes to the log, what it is at to the user (stderr).

    `detail` may add to an activity what only the caller can see, such as how many packages are written.
    """
    display = Display(stage, sys.stderr)
    tail: deque[str] = deque(maxlen=60)
    activity = "starting"
    log.parent.mkdir(parents=True, exist_ok=True)
    # close_fds=False: the set-up lock is inheritable, so that it holds as long as pip itself does.
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        close_fds=False,
    )
    try:
        with log.open("a", encoding="utf-8", buffering=1) as file:
            file.write(f"\n$ {' '.join(map(str, command))}\n")
            for line in lines_or_ticks(process):
                if line is not None:
                    file.write(line)
                    tail.append(line)
                    activity = pip_activity(line) or activity
                display.update(detail(activity))
        status = process.wait()
    finally:
        stop(process)
    display.close(status)
    return Outcome(status, "".join(tail))


def lines_or_ticks(process: subprocess.Popen, tick_s: float = 0.5) -> Iterator[str | None]:
    """Yields the lines a process prints, and None whenever it has been silent for `tick_s`."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=tick_s)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def stop(process: subprocess.Popen) -> None:
    """Ends a process that is still running, gently first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_attached(command: Sequence[str | Path], **options) -> int:
    """Runs a command on this terminal and returns its status; Ctrl-C reaches the command, which decides."""
    process = subprocess.Popen([str(part) for part in command], **options)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
