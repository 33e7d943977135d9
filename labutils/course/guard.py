"""What a kernel that runs a hand-in begins with: limits on output, files and processes, answers kept apart.

Runs inside the hand-in's own process, so it holds off accidents, not attacks: see `labutils.course.grade`.
"""

import contextlib
import json
import os
import sys

from labutils.course.isolation import Isolation

OUTPUT_LIMIT = 1_000_000  # characters that one cell may print
FILE_LIMIT_BYTES = 1 << 30
SPARE_PROCESSES = 512  # threads count as well


class OutputTooLargeError(RuntimeError):
    """A cell printed more than `OUTPUT_LIMIT` characters."""


def install(shell, answers: dict[str, str], is_solution: bool) -> None:
    """Guard the kernel of an IPython shell; its startup file calls this with the course's EXERCISE cells."""
    limit_resources()
    isolation = Isolation(shell.user_ns, answers, is_solution)
    budget, streams = {"left": OUTPUT_LIMIT}, (sys.stdout, sys.stderr)
    for stream in streams:
        stream.write = _limited(stream.write, budget)

    def with_streams(function):
        """An answer may have set `sys.stdout = None`: without it the kernel never says that the cell has ended."""

        def run(*args, **kwargs):
            sys.stdout, sys.stderr = streams
            return function(*args, **kwargs)

        return run

    def begin(info) -> None:
        budget.update(left=OUTPUT_LIMIT)
        isolation.before_cell(info.raw_cell)

    def end(result) -> None:
        isolation.after_cell(result.info.raw_cell)

    shell.events.register("pre_run_cell", begin)
    shell.events.register("post_run_cell", with_streams(end))
    shell.showtraceback = with_streams(shell.showtraceback)
    shell.display_trap.hook = with_streams(shell.displayhook)
    shell.ask_exit = sys.exit  # else exit() ends the kernel a tenth of a second later, in the cell of another answer
    shell.kernel.session.pack = _packing_any_text(shell.kernel.session.pack)


def _packing_any_text(pack):
    """A kernel's message that holds half an emoji cannot be sent, and the cell would never end: `?` goes in its place.

    >>> _packing_any_text(lambda message: message["text"].encode())({"text": "a" + chr(0xD83D)})
    b'{"text": "a?"}'
    """

    def packed(message) -> bytes:
        try:
            return pack(message)
        except UnicodeEncodeError:
            from jupyter_client.jsonutil import json_default

            return json.dumps(message, default=json_default, ensure_ascii=False).encode("utf-8", "replace")

    return packed


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
