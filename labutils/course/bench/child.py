"""A program in a process of its own that is stopped, except while it answers.

Thread pools spin: in one process, or awake beside another engine, an engine slows the others down. So each is a child
that gets SIGSTOP when it has answered and SIGCONT when it is asked. A question and its answer are a line of JSON each.

A child leads a process group of its own in its parent's session. So the system wakes and ends it when its parent dies:
that is what becomes of stopped groups that nobody is left to wake. It becomes of those that have stopped by then,
so a child counts as stopped when the system says so and not when the signal is sent.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from labutils.lab.paths import ROOT


class Child:
    """A child process that prints a line when it is ready, and then a line for each line it reads.

    Raises:
        RuntimeError: When it ends instead; with the last line of what it complained about.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child lives
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.complaints}
        self.process = subprocess.Popen(
            command, text=True, env={**os.environ, **(environment or {})}, process_group=0, **pipes
        )
        self._line()
        self._stop()

    def ask(self, question: object) -> object:
        """Wakes the child, asks, and stops it when it has answered."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which the next line tells
            print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = json.loads(self._line())
        self._stop()
        return answer

    def close(self) -> None:
        """Ends the child and what it has started."""
        if self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()
        self.complaints.close()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.complaints.seek(0)
            words = self.complaints.read().decode(errors="replace").strip().splitlines() or [""]
            raise RuntimeError(f"a child must answer; it ended with code {code}: {words[-1][:200]}")
        return line

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):  # not on macOS before Python 3.13
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which the next line tells
            os.killpg(self.process.pid, number)


def environment(threads: int) -> dict[str, str]:
    """What every engine is started with: so many threads, no network, and vLLM in its own process alone."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **{f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")},
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "GGML_NO_BACKTRACE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def start(engine: str, told: dict, threads: int, stack: ExitStack, *, python: str = "") -> Child:
    """An engine in a process of its own, ended with the stack; `python` is that of another environment."""
    command = [python or sys.executable, "-m", "labutils.course.bench.engines", json.dumps([engine, told])]
    child = Child(command, environment=environment(threads))
    stack.callback(child.close)
    return child
