"""Timing that cannot fool its user: warm-up, synchronisation, interleaved repeats, median, interval.

Three rules, each against a mistake that people really make:

* *Interleave.* A machine gets hotter, a neighbour starts a job: measuring all of A and then all of B
  blames B for it. Here every round runs every function once, and each round starts with another one.
* *Keep the samples.* A mean of two runs cannot say how sure it is. At least five rounds are enforced, and
  a percentile bootstrap (Efron 1979) turns them into an interval.
* *Pair by round.* A slow round slows all its functions, so a ratio is resampled by round, not by function.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MIN_REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """The raw seconds of one function, one sample per round, and how they were taken."""

    name: str
    samples_s: tuple[float, ...]
    warmup: int
    device: str
    threads: int

    def __post_init__(self) -> None:
        check_repeats(len(self.samples_s))

    @property
    def median_s(self) -> float:
        """Median seconds of one call."""
        return statistics.median(self.samples_s)

    @property
    def interval_s(self) -> tuple[float, float]:
        """95% bootstrap interval of the median, in seconds."""
        return bootstrap_interval(self.samples_s)

    def __str__(self) -> str:
        low, high = self.interval_s
        return (
            f"{self.name}: {self.median_s * 1e3:.3g} ms [{low * 1e3:.3g}, {high * 1e3:.3g}] "
            f"({len(self.samples_s)} rounds, {self.warmup} warm-up, {self.device}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''})"
        )


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians and its 95% bootstrap interval, resampled by round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def check_repeats(repeats: int) -> None:
    """Refuses a measurement of fewer than five rounds.

    Raises:
        ValueError: If `repeats` is below 5.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"a timing needs at least {MIN_REPEATS} repeats; got {repeats}")


def synchronize(device: str | torch.device = "cpu") -> None:
    """Waits for the device's queue: a CUDA or MPS call returns before its work is done."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def quantile(values: Sequence[float], fraction: float) -> float:
    """Returns the linearly interpolated quantile of unsorted `values`.

    Raises:
        ValueError: If `values` is empty or `fraction` is outside [0, 1].

    >>> quantile([30.0, 10.0, 20.0], 0.75)
    25.0
    """
    if not values or not 0 <= fraction <= 1:
        raise ValueError(f"a quantile needs values and a fraction in [0, 1]; got {len(values)} values, {fraction}")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def bootstrap_interval(
    samples: Sequence[float],
    *,
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of `statistic` over `samples`.

    Draw n samples with replacement, take the statistic, repeat; the interval is the middle `confidence`
    share of what came out (Efron 1979). It knows only the spread within this run, not tomorrow's machine.

    Raises:
        ValueError: If there are fewer than five samples or `confidence` is outside (0, 1).

    >>> bootstrap_interval([2.0, 2.0, 2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    check_repeats(len(samples))
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    rng = random.Random(seed)
    drawn = [statistic(rng.choices(samples, k=len(samples))) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    return quantile(drawn, tail), quantile(drawn, 1 - tail)


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    calls_per_sample: int = 1,
    before: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Times several functions in rounds: every round calls each once and starts with another one.

    Args:
        functions: Name to function; called without arguments, its result is dropped.
        repeats: Rounds, at least 5.
        warmup: Untimed calls of each function beforehand (caches, allocators, lazy compilation).
        device: Synchronised before and after every sample.
        calls_per_sample: Calls inside one sample, for functions near the clock's resolution.
        before: Called with the name before every sample, untimed (set threads, reset a cache).

    Returns:
        One `Timing` per name; sample i of each was taken in round i.

    Raises:
        ValueError: If `repeats` is below 5, `functions` is empty, or a count is too small.
    """
    check_repeats(repeats)
    if not functions:
        raise ValueError("at least one function is needed; got none")
    if warmup < 1 or calls_per_sample < 1:
        raise ValueError(f"warmup and calls_per_sample must be at least 1; got {warmup} and {calls_per_sample}")
    prepare = before or (lambda name: None)
    for name, function in functions.items():
        prepare(name)
        for _ in range(warmup):
            function()
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    threads: dict[str, int] = {}
    for round_index in range(repeats):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            prepare(name)
            threads[name] = torch.get_num_threads()
            samples[name].append(sample_seconds(functions[name], device, calls_per_sample))
    return {name: Timing(name, tuple(s), warmup, str(device), threads[name]) for name, s in samples.items()}


def measure(function: Callable[[], object], *, name: str = "function", **settings) -> Timing:
    """Times one function; see `measure_interleaved` for the settings.

    >>> measure(lambda: sum(range(10)), repeats=5).warmup
    2
    """
    return measure_interleaved({name: function}, **settings)[name]


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, resamples: int = 1000) -> Ratio:
    """Returns the ratio of two medians, with a bootstrap interval that resamples whole rounds.

    ratio = median(numerator) / median(denominator); both are resampled with the *same* round indices, so
    a disturbance that hit both functions in a round cancels.

    Raises:
        ValueError: If the lengths differ, are below 5, or a denominator is not positive.

    >>> print(paired_ratio([2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0]))
    2.00x [2.00, 2.00]
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"paired samples come from the same rounds; got {len(numerator)} and {len(denominator)}")
    if min(denominator, default=1.0) <= 0:
        raise ValueError(f"the denominator's samples must be positive; got {min(denominator)}")
    low, high = bootstrap_interval(
        range(len(numerator)), statistic=_ratio_over_rounds(numerator, denominator), resamples=resamples
    )
    return Ratio(statistics.median(numerator) / statistics.median(denominator), low, high)


def difference_is_sure(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the bootstrap intervals of two medians lie apart: samples of different runs cannot be paired.

    >>> difference_is_sure([1.0] * 5, [2.0] * 5), difference_is_sure([1.0, 2.0, 3.0, 4.0, 5.0], [4.0] * 5)
    (True, False)
    """
    (low, high), (other_low, other_high) = bootstrap_interval(first), bootstrap_interval(second)
    return high < other_low or other_high < low


def _ratio_over_rounds(numerator: Sequence[float], denominator: Sequence[float]) -> Callable[[Sequence[int]], float]:
    def ratio(rounds: Sequence[int]) -> float:
        return statistics.median(numerator[i] for i in rounds) / statistics.median(denominator[i] for i in rounds)

    return ratio


def sample_seconds(function: Callable[[], object], device: str | torch.device = "cpu", calls: int = 1) -> float:
    """Seconds of one call, the mean of some calls in a row, once the device's queue is empty.

    On a CUDA device its own clock is read, by an event before the calls and one after them: the host's clock would add
    a launch and a wait. The CUDA half was not run on a GPU.
    """
    synchronize(device)
    if torch.device(device).type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls
