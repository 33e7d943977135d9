"""What a kernel that runs a hand-in begins with: limits on output, files and processes.

Runs inside the hand-in's own process, so it holds off accidents, not attacks: see `labutils.course.grade`.
"""

import contextlib
import os
import sys

OUTPUT_LIMIT = 1_000_000  # characters that one cell may print
FILE_LIMIT_BYTES = 1 << 30
SPARE_PROCESSES = 512  # threads count as well


class OutputTooLargeError(RuntimeError):
    """A cell printed more than `OUTPUT_LIMIT` characters."""


def install(shell) -> None:
    """Guard the kernel of an IPython shell; its startup file calls this."""
    limit_resources()
    budget = {"left": OUTPUT_LIMIT}
    shell.events.register("pre_run_cell", lambda *_: budget.update(left=OUTPUT_LIMIT))
    for stream in (sys.stdout, sys.stderr):
        stream.write = _limited(stream.write, budget)


def _limited(write, budget: dict):
    def limited(text: str) -> int:
        budget["left"] -= len(text)
        if budget["left"] < 0:
            raise OutputTooLargeError(f"a cell may print {OUTPUT_LIMIT} characters; this one prints more")
        return write(text)

    return limited


def limit_resources() -> None:
    """Limit this process and its children where the platform can: file size, core files, processes."""
    with contextlib.suppress(ImportError):
        import resource

        wanted = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": FILE_LIMIT_BYTES}
        if os.environ.get("LABUTILS_MAX_PROCESSES"):
            wanted["RLIMIT_NPROC"] = int(os.environ["LABUTILS_MAX_PROCESSES"])
        for name, value in wanted.items():
            with contextlib.suppress(AttributeError, ValueError, OSError):
                _, hard = resource.getrlimit(getattr(resource, name))
                least = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(getattr(resource, name), (least, least))


def process_limit() -> str:
    """How many processes and threads the user may have while a hand-in runs; "" where it cannot be set."""
    import psutil

    if not hasattr(os, "getuid") or os.getuid() == 0:  # the limit counts per user, and spares root
        return ""
    mine = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        if process.info["uids"] and process.info["uids"].real == os.getuid():
            mine += process.info["num_threads"] or 1
    return str(mine + SPARE_PROCESSES)
