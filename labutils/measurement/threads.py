"""The best thread count, found by measuring: OpenMP threads that outnumber the free cores can cost tenfold."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from labutils.measurement.limits import available_cores
from labutils.measurement.timing import Timing, measure_interleaved


@dataclass(frozen=True)
class ThreadChoice:
    """The thread count with the lowest median, and the timings of all candidates."""

    threads: int
    timings: dict[int, Timing]

    def __str__(self) -> str:
        rows = ", ".join(f"{count}: {timing.median_s * 1e3:.3g} ms" for count, timing in self.timings.items())
        return f"{self.threads} thread{'s' if self.threads > 1 else ''} ({rows})"


def thread_candidates(cores: int) -> tuple[int, ...]:
    """Returns the powers of two up to `cores`, and `cores` itself.

    >>> thread_candidates(6)
    (1, 2, 4, 6)

    Raises:
        ValueError: If `cores` is below 1.
    """
    if cores < 1:
        raise ValueError(f"cores must be at least 1; got {cores}")
    powers = [2**i for i in range(cores.bit_length()) if 2**i < cores]
    return (*powers, cores)


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Runs a block with `threads` threads in PyTorch, and in NumPy's BLAS where threadpoolctl is installed.

    Raises:
        ValueError: If `threads` is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    old = torch.get_num_threads()
    limits = _blas_limits(threads)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(old)
        if limits is not None:
            limits.restore_original_limits()


def best_thread_count(
    function: Callable[[], object],
    *,
    candidates: Sequence[int] | None = None,
    repeats: int = 5,
    warmup: int = 1,
) -> ThreadChoice:
    """Times `function` with each thread count, interleaved, and returns the fastest; restores the old count.

    Raises:
        ValueError: If there is no candidate, one is below 1, or `repeats` is below 5.
    """
    counts = tuple(dict.fromkeys(candidates if candidates is not None else thread_candidates(available_cores())))
    if not counts or min(counts) < 1:
        raise ValueError(f"thread candidates must be at least 1, and one is needed; got {counts}")

    def prepare(name: str) -> None:
        torch.set_num_threads(int(name))
        _blas_limits(int(name))
        function()  # the pool is resized by the first call, which would otherwise be paid by the sample

    with thread_count(torch.get_num_threads()):
        timings = measure_interleaved(
            {str(n): function for n in counts}, repeats=repeats, warmup=warmup, before=prepare
        )
    by_count = {n: timings[str(n)] for n in counts}
    return ThreadChoice(min(counts, key=lambda n: by_count[n].median_s), by_count)


def sets_numpy_threads() -> bool:
    """Tells whether `thread_count` reaches NumPy's BLAS; otherwise that keeps its own count, unknown to PyTorch."""
    return importlib.util.find_spec("threadpoolctl") is not None


def _blas_limits(threads: int):
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return None
    return threadpool_limits(threads, user_api="blas")
