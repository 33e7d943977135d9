"""Reading a profile: which kernels ran when, what was copied, and how long the device waited for the next launch.

`torch.profiler` writes a trace in Chrome's format: events with a category, a start and a duration in microseconds. On a
GPU, kernels and copies have categories of their own. On a CPU a "kernel" is an operator that Python calls and that
touches numbers, and the gaps between them are Python and bookkeeping, such as views.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from labutils.measurement.timing import synchronize

KERNELS, COPIES, LAUNCHES = {"kernel"}, {"gpu_memcpy", "gpu_memset"}, {"cuda_runtime", "cuda_driver"}
# fmt: off
BOOKKEEPING = {f"aten::{name}" for name in (
    "view", "as_strided", "reshape", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "split", "chunk", "narrow", "unbind",
)}
# fmt: on


@dataclass(frozen=True)
class Event:
    """Something that ran: its name, its start, counted from the first event, and how long it took."""

    name: str
    start_s: float
    seconds: float

    @property
    def end_s(self) -> float:
        """When it was over."""
        return self.start_s + self.seconds


@dataclass(frozen=True)
class Timeline:
    """A profile in order of time.

    Attributes:
        device: `cuda` where the trace holds a GPU's kernels, else `cpu`.
        kernels: what computed.
        copies: what moved memory between host and device, or filled it.
        launches: the host's calls that queued work; empty on a CPU.
    """

    device: str
    kernels: tuple[Event, ...]
    copies: tuple[Event, ...]
    launches: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        """From the first event's start to the last one's end."""
        events = (*self.kernels, *self.copies, *self.launches)
        return max((e.end_s for e in events), default=0.0) - min((e.start_s for e in events), default=0.0)

    @property
    def busy_s(self) -> float:
        """How long at least one kernel or copy ran."""
        return sum(end - start for start, end in merged((*self.kernels, *self.copies)))

    @property
    def gap_share(self) -> float:
        """Share of the time in which the device had nothing to do.

        Raises:
            ValueError: when nothing ran.
        """
        if not self.seconds:
            raise ValueError("a timeline must hold an event that took time; got none")
        return 1 - self.busy_s / self.seconds

    def gaps(self) -> list[tuple[float, float]]:
        """(start, seconds) of each wait between kernels or copies."""
        work = merged((*self.kernels, *self.copies))
        return [(end, after[0] - end) for (_, end), after in zip(work, work[1:], strict=False)]

    def longest_kernels(self, count: int = 5) -> list[tuple[str, float, int]]:
        """(name, seconds, calls) of the kernels that took most time together."""
        seconds, calls = Counter(), Counter()
        for kernel in self.kernels:
            seconds[kernel.name] += kernel.seconds
            calls[kernel.name] += 1
        return [(name, its, calls[name]) for name, its in seconds.most_common(count)]

    def __str__(self) -> str:
        return (
            f"{self.seconds * 1e3:.3g} ms on {self.device}: {len(self.kernels)} kernels, {len(self.copies)} copies, "
            f"busy {self.busy_s / self.seconds:.0%}, waiting {self.gap_share:.0%}"
        )


def merged(events: Sequence[Event]) -> list[tuple[float, float]]:
    """The times in which at least one event ran, as (start, end) without overlaps.

    >>> merged([Event("a", 0.0, 2.0), Event("b", 1.0, 2.0), Event("c", 5.0, 1.0)])
    [(0.0, 3.0), (5.0, 6.0)]
    """
    spans: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda e: e.start_s):
        if spans and event.start_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], event.end_s))
        else:
            spans.append((event.start_s, event.end_s))
    return spans


def explained_shares(
    seconds: float, *, moved_bytes: float, flop: float, bytes_per_s: float, flops_per_s: float
) -> dict[str, float]:
    """Which share of a time its bytes explain at the measured bandwidth, and which its arithmetic; the rest is neither.

    What is left went into launches, Python and kernels too small to fill the device. Memory and arithmetic overlap, so
    the larger of the two is taken off.

    >>> shares = explained_shares(0.01, moved_bytes=4e7, flop=2e7, bytes_per_s=1e10, flops_per_s=1e11)
    >>> {what: round(share, 2) for what, share in shares.items()}
    {'memory': 0.4, 'arithmetic': 0.02, 'neither': 0.6}

    Raises:
        ValueError: for a number that is not positive.
    """
    if min(seconds, moved_bytes, flop, bytes_per_s, flops_per_s) <= 0:
        raise ValueError(f"seconds, bytes, FLOP and rates must be positive; got {seconds}, {moved_bytes}, {flop}")
    memory, arithmetic = moved_bytes / bytes_per_s / seconds, flop / flops_per_s / seconds
    return {"memory": memory, "arithmetic": arithmetic, "neither": max(0.0, 1 - max(memory, arithmetic))}


def read_trace(trace: dict) -> Timeline:
    """A timeline from a parsed Chrome trace.

    Raises:
        ValueError: when the trace holds neither kernels nor operators.
    """
    events = [e for e in trace.get("traceEvents", []) if e.get("ph") == "X" and "dur" in e]
    kernels = [e for e in events if e.get("cat") in KERNELS]
    copies = [e for e in events if e.get("cat") in COPIES]
    launches = [e for e in events if e.get("cat") in LAUNCHES and "Launch" in e["name"]] if kernels else []
    if not kernels:
        operators = _outermost([e for e in events if e.get("cat") == "cpu_op"])
        kernels = [e for e in operators if e["name"] not in BOOKKEEPING]
    if not kernels:
        raise ValueError("a trace must hold kernels or operators; got none")
    start = min(e["ts"] for e in (*kernels, *copies, *launches))

    def as_events(found: list[dict]) -> tuple[Event, ...]:
        ordered = sorted(found, key=lambda e: e["ts"])
        return tuple(Event(e["name"], (e["ts"] - start) * 1e-6, e["dur"] * 1e-6) for e in ordered)

    on_gpu = any(e.get("cat") in KERNELS for e in kernels)
    return Timeline("cuda" if on_gpu else "cpu", as_events(kernels), as_events(copies), as_events(launches))


def profile(function: Callable[[], object], *, device: str | torch.device = "cpu", calls: int = 5) -> Timeline:
    """The quickest of some calls, after a warm-up: a call that others interrupted would show their time as waiting.

    Profiling itself costs time: read shares, not milliseconds.

    Raises:
        ValueError: when no call is asked for.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1; got {calls}")
    function()
    return min((_profile_once(function, device) for _ in range(calls)), key=lambda timeline: timeline.seconds)


def _profile_once(function: Callable[[], object], device: str | torch.device) -> Timeline:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.device(device).type == "cuda" else [])
    old = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"  # otherwise the profiler writes two lines of its own into the notebook
    try:
        with profiler(activities=activities) as recorded:
            function()
            synchronize(device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            return read_trace(json.loads(path.read_text(encoding="utf-8")))
    finally:
        os.environ.pop("KINETO_LOG_LEVEL")
        if old is not None:
            os.environ["KINETO_LOG_LEVEL"] = old


def _outermost(operators: list[dict]) -> list[dict]:
    """Operators that no other one has called: those that begin after the last one kept on their thread is over."""
    ends: dict[object, float] = {}
    kept = []
    for e in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= ends.get(e["tid"], float("-inf")):
            ends[e["tid"]] = e["ts"] + e["dur"]
            kept.append(e)
    return kept
