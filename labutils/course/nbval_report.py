"""A pytest plugin beside nbval: writes down how each cell went, and stops at a dead or endless one.

nbval waits out the whole cell timeout when a kernel has died, and goes on after an endless loop in a
kernel that may still be busy. Here both end the run at once; `labutils.course.check` then starts again
without the cell that did it. Records go to ``$LABUTILS_REPORT``, one JSON object a line, so that what is
known survives whatever happens to this process. pytest loads this plugin first, so that nbval finds nbformat imported.
"""

import json
import os
import queue
import time

import pytest

from labutils.course import quick_nbformat  # noqa: F401  # two seconds a check

LIMIT = 4000  # characters of any one text in a record
POLL_S = 0.5
OUTPUT_TIMEOUT_S = 20


class KernelDiedError(RuntimeError):
    """The kernel's process has ended while a cell was running."""


def pytest_configure(config) -> None:
    """Make nbval notice a dead kernel."""
    from nbval.kernel import RunningKernel

    RunningKernel.await_reply = _await_reply


def pytest_itemcollected(item) -> None:
    """Give a busy machine longer than nbval's 5 s for the outputs of a cell that has ended."""
    item.output_timeout = OUTPUT_TIMEOUT_S


def _await_reply(kernel, msg_id: str, timeout: float | None = None) -> None:
    """As nbval's own, but looks twice a second whether the kernel still lives."""
    end = time.monotonic() + (timeout if timeout is not None else float("inf"))
    while True:
        try:
            message = kernel.get_message("shell", timeout=min(POLL_S, max(0.0, end - time.monotonic())))
        except queue.Empty:
            if not kernel.is_alive():
                raise KernelDiedError("the kernel died while this cell was running") from None
            if time.monotonic() >= end:
                raise
            continue
        if message["parent_header"].get("msg_id") == msg_id:
            return


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write down which cell begins."""
    _write({"event": "start", "cell": int(nodeid.rsplit(" ", 1)[-1])})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write down how a cell went."""
    report = yield
    if call.when == "call" or report.failed:
        record = _record(item, call, report)
        _write(record)
        if record["fatal"]:
            item.session.shouldstop = f"cell {item.cell_num}: {record['fatal']}"
    return report


def _record(item, call, report) -> dict:
    outputs = item.test_outputs or []
    error = next((out for out in outputs if out.get("output_type") == "error"), {})
    printed = "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")
    return {
        "event": "end",
        "cell": item.cell_num,
        "passed": report.passed,
        "message": "" if call.excinfo is None else _short(call.excinfo.value),
        "ename": _short(error.get("ename", "")),
        "evalue": _short(error.get("evalue", "")),
        "stdout": printed[-LIMIT:],
        "fatal": _fatal(item, call),
    }


def _fatal(item, call) -> str:
    """'timeout' or 'dead' when no further cell can run in this kernel."""
    if item.parent.timed_out:
        return "timeout"
    kernel = item.parent.kernel
    is_dead = isinstance(getattr(call.excinfo, "value", None), KernelDiedError)
    return "dead" if is_dead or kernel is None or not kernel.is_alive() else ""


def _short(value) -> str:
    return str(value)[:LIMIT]


def _write(record: dict) -> None:
    with open(os.environ["LABUTILS_REPORT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
