"""Queues before engines: arrivals, waiting times by formula and by simulation, and what a client feels.

Times are in seconds, rates in requests/s. A server is busy for the share ρ = λ E[S] of the time, for arrivals at rate λ
that take S each; at ρ ≥ 1 its queue grows without end.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean


@dataclass(frozen=True)
class RequestTimes:
    """When a request arrived, and when each of its tokens was handed out.

    >>> times = RequestTimes(1.0, (1.5, 1.6, 1.8))
    >>> round(times.ttft_s, 3), [round(gap, 3) for gap in times.itl_s], round(times.tpot_s, 3)
    (0.5, [0.1, 0.2], 0.15)

    Raises:
        ValueError: Without a token, or for times that run backwards.
    """

    arrival_s: float
    token_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.token_s or any(b < a for a, b in zip((self.arrival_s, *self.token_s), self.token_s, strict=False)):
            raise ValueError(f"a request needs tokens, none of them before its arrival or out of order; got {self}")

    @property
    def ttft_s(self) -> float:
        """Time to first token: the wait in the queue and the prefill."""
        return self.token_s[0] - self.arrival_s

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Inter-token latencies: the gaps between tokens. The first token's wait is not one of them."""
        return tuple(b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Time per output token: the mean gap, (last - first) / (tokens - 1); None for a single token.

        Where a step makes several tokens, as in speculative decoding, ITL measures steps and TPOT measures tokens.
        """
        return fmean(self.itl_s) if self.itl_s else None

    @property
    def latency_s(self) -> float:
        """From arrival to last token."""
        return self.token_s[-1] - self.arrival_s


def latency_badge(arrival_s: float, admitted_s: float, token_s: Sequence[float]) -> dict[str, float | None]:
    """What an answer took, in three numbers that share nothing but the wait, which is part of the first token's time.

    queue = admitted - arrival; TTFT = first token - arrival; time per token = (last - first) / (tokens - 1), or None
    for a single token.

    >>> latency_badge(1.0, 1.25, [1.5, 1.75, 2.5])
    {'queue_s': 0.25, 'ttft_s': 0.5, 'per_token_s': 0.5}

    Raises:
        ValueError: Without a token, or for times that run backwards.
    """
    times = RequestTimes(arrival_s, tuple(token_s))
    if not arrival_s <= admitted_s <= token_s[0]:
        raise ValueError(f"admission must lie between arrival and first token; got {admitted_s} in {times}")
    return {"queue_s": admitted_s - arrival_s, "ttft_s": times.ttft_s, "per_token_s": times.tpot_s}


def goodput(
    requests: Sequence[RequestTimes], *, duration_s: float, ttft_s: float, tpot_s: float, refused: int = 0
) -> tuple[float, float]:
    """Requests/s that meet both objectives, and their share of all requests (DistServe, arXiv:2401.09670).

    >>> goodput([RequestTimes(0, (0.2, 0.3)), RequestTimes(0, (3.0, 3.1))], duration_s=4, ttft_s=1, tpot_s=0.2)
    (0.25, 0.5)

    Args:
        requests: The answered ones.
        duration_s: How long the run took.
        ttft_s: The longest time to first token that is good.
        tpot_s: The longest time per output token that is good.
        refused: Requests turned away; none of them is good.

    Raises:
        ValueError: Without a request, or for a duration that is not positive.
    """
    if duration_s <= 0 or not len(requests) + refused:
        raise ValueError(f"goodput needs requests and a positive duration; got {len(requests)} in {duration_s} s")
    good = sum(r.ttft_s <= ttft_s and (r.tpot_s or 0.0) <= tpot_s for r in requests)
    return good / duration_s, good / (len(requests) + refused)


def poisson_arrivals(rate: float, count: int, *, seed: int) -> list[float]:
    """Arrival times of many independent clients: the gaps are exponential with mean 1 / rate."""
    return bursty_arrivals(rate, count, burst=1, seed=seed)


def bursty_arrivals(rate: float, count: int, *, burst: int, seed: int) -> list[float]:
    """The same mean rate, but `burst` requests at a time: bursts are Poisson arrivals at rate / burst.

    Raises:
        ValueError: If the rate is not positive, the burst is below 1, or the count is negative.
    """
    if rate <= 0 or burst < 1 or count < 0:
        raise ValueError(f"rate must be positive, burst at least 1, count at least 0; got {rate}, {burst}, {count}")
    rng = random.Random(seed)
    starts = accumulate(rng.expovariate(rate / burst) for _ in range(-(-count // burst)))
    return [start for start in starts for _ in range(burst)][:count]


def serve_in_order(arrivals: Sequence[float], service_s: Sequence[float]) -> list[tuple[float, float]]:
    """First come, first served by one server: (start, end) of each request; start = max(arrival, previous end).

    >>> serve_in_order([0.0, 1.0, 9.0], [3.0, 2.0, 1.0])
    [(0.0, 3.0), (3.0, 5.0), (9.0, 10.0)]
    """
    served, free_s = [], 0.0
    for arrival_s, seconds in zip(arrivals, service_s, strict=True):
        start_s = max(arrival_s, free_s)
        free_s = start_s + seconds
        served.append((start_s, free_s))
    return served


def mg1_wait_s(rate: float, mean_s: float, second_moment: float) -> float:
    """Mean wait before service, λ E[S²] / (2 (1 - ρ)), for Poisson arrivals and any service time.

    Pollaczek and Khinchine's formula. Variance counts: one long prompt makes all that queue behind it wait.

    >>> mg1_wait_s(0.5, 1.0, 1.0)
    0.5

    Raises:
        ValueError: If the server cannot keep up (ρ ≥ 1), or the moments are none.
    """
    busy = rate * mean_s
    if not (rate >= 0 and mean_s > 0 and mean_s**2 <= second_moment * (1 + 1e-12)):
        raise ValueError(f"rate ≥ 0, E[S] > 0 and E[S²] ≥ E[S]² must hold; got {rate}, {mean_s}, {second_moment}")
    if busy >= 1:
        raise ValueError(f"a queue settles only below utilization 1; got {busy:.3f}")
    return rate * second_moment / (2 * (1 - busy))


def mm1_wait_s(rate: float, mean_s: float) -> float:
    """Mean wait in M/M/1, ρ E[S] / (1 - ρ): exponential service times, E[S²] = 2 E[S]².

    >>> [round(mm1_wait_s(busy, 1.0), 2) for busy in (0.5, 0.9, 0.99)]
    [1.0, 9.0, 99.0]
    """
    return mg1_wait_s(rate, mean_s, 2 * mean_s**2)


def md1_wait_s(rate: float, mean_s: float) -> float:
    """Mean wait in M/D/1, ρ E[S] / (2 (1 - ρ)): every service takes the same time, so half of M/M/1's wait.

    >>> round(md1_wait_s(0.9, 1.0), 2)
    4.5
    """
    return mg1_wait_s(rate, mean_s, mean_s**2)


def mean_in_system(arrivals: Sequence[float], departures: Sequence[float]) -> float:
    """Requests there at once, averaged over the time from the first arrival to the last departure.

    Little's law says that it is λ W: the arrival rate times the mean time in the system, whatever the order of service.
    This counts heads and integrates, so the law can be tested with it.

    >>> mean_in_system([0.0, 1.0], [3.0, 4.0])
    1.5

    Raises:
        ValueError: If there is nothing, or arrivals and departures differ in number.
    """
    if not arrivals or len(arrivals) != len(departures):
        raise ValueError(f"every arrival departs once; got {len(arrivals)} and {len(departures)}")
    came, went = sorted(arrivals), sorted(departures)
    times = sorted([*came, *went])
    spans = zip(times, times[1:], strict=False)
    area = sum((end - start) * (bisect_right(came, start) - bisect_right(went, start)) for start, end in spans)
    return area / (times[-1] - times[0])
