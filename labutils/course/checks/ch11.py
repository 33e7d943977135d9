"""Checks of chapter 11, first part: queues, and what a client feels."""

import math

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.serving.queueing import RequestTimes, serve_in_order


def _waits(arrivals, service_s):
    return [start - arrival for arrival, (start, _) in zip(arrivals, serve_in_order(arrivals, service_s), strict=True)]


def _latencies(arrivals, service_s):
    return [end - arrival for arrival, (_, end) in zip(arrivals, serve_in_order(arrivals, service_s), strict=True)]


def _after_previous(arrivals, service_s, *, idle=True, start=True):
    waits, free_s = [], 0.0
    for arrival, seconds in zip(arrivals, service_s, strict=True):
        waits.append(max(free_s - arrival, 0.0) if idle else free_s - arrival)
        free_s = (max(free_s, arrival) if start else arrival) + seconds
    return waits


def _negative(arrivals, service_s):
    return _after_previous(arrivals, service_s, idle=False)


def _from_arrival(arrivals, service_s):
    return _after_previous(arrivals, service_s, start=False)


def _never_idle(arrivals, service_s):
    free_s = [sum(service_s[:i]) for i in range(len(arrivals))]
    return [max(free - arrival, 0.0) for arrival, free in zip(arrivals, free_s, strict=True)]


@exercise("11.1")
def queue_waits(answer):
    """How long each request waits before one server takes it, first come, first served."""
    expect_function(
        answer,
        _waits,
        cases=cases_of(
            "arrivals service_s",
            ([0.0, 1.0, 9.0], [3.0, 2.0, 1.0]),
            ([0.5, 0.5, 0.5], [1.0, 2.0, 1.0]),
            ([1.0, 4.0, 4.5, 5.0, 20.0], [1.0, 3.0, 0.5, 6.0, 1.0]),
            ([2.0], [5.0]),
        ),
        mistakes=[
            (_latencies, "that is the whole latency: a wait ends when the service begins, not when it ends"),
            (_negative, "a wait is never negative: who finds the server free starts at once"),
            (_from_arrival, "a service that had to wait ends later: the server is free at START + seconds"),
            (_never_idle, "the server may have stood idle before: take the later of arrival and previous end"),
        ],
    )


def _rate(mean_s, second_moment, wait_s):
    return 2 * wait_s / (second_moment + 2 * wait_s * mean_s)


@exercise("11.2")
def highest_rate(answer):
    """The arrival rate at which the mean wait reaches a limit, by Pollaczek and Khinchine."""
    expect_function(
        answer,
        _rate,
        cases=cases_of(
            "mean_s second_moment wait_s", (1.0, 1.0, 0.5), (1.0, 2.0, 9.0), (0.2, 0.1, 0.05), (2.0, 9.0, 4.0)
        ),
        mistakes=[
            (
                lambda mean_s, second_moment, wait_s: 1 / mean_s,
                "at ρ = 1 nobody's wait is bounded: solve the formula for λ at this wait",
            ),
            (
                lambda mean_s, second_moment, wait_s: 2 * wait_s / second_moment,
                "the factor 1 - ρ holds λ too: multiply it out before you solve",
            ),
            (
                lambda mean_s, second_moment, wait_s: _rate(mean_s, mean_s**2, wait_s),
                "E[S²] is not E[S]²: the spread of the services counts",
            ),
            (
                lambda mean_s, second_moment, wait_s: wait_s / (second_moment + wait_s * mean_s),
                "the 2 below the fraction is lost: W = λ E[S²] / (2 (1 - ρ))",
            ),
        ],
    )


def _times(arrival_s, token_s):
    times = RequestTimes(arrival_s, tuple(token_s))
    return times.ttft_s, list(times.itl_s), times.tpot_s


def _times_wrong(*, first=False, per_token=False, whole=False, zero=False):
    def answer(arrival_s, token_s):
        ttft, gaps, tpot = _times(arrival_s, token_s)
        if first:
            gaps = [ttft, *gaps]
            tpot = sum(gaps) / len(gaps)
        if per_token:
            tpot = (token_s[-1] - token_s[0]) / len(token_s)
        if whole and tpot is not None:
            tpot = (token_s[-1] - arrival_s) / (len(token_s) - 1)
        return ttft, gaps, 0.0 if zero and tpot is None else tpot

    return answer


@exercise("11.3")
def client_times(answer):
    """Time to first token, the gaps between tokens, time per output token."""
    expect_function(
        answer,
        _times,
        cases=cases_of(
            "arrival_s token_s",
            (1.0, [1.5, 1.6, 1.8]),
            (0.0, [4.0, 4.1, 4.3, 4.4]),
            (2.0, [2.5]),
        ),
        mistakes=[
            (_times_wrong(first=True), "TTFT was counted into ITL: the wait for the first token is no gap between two"),
            (_times_wrong(zero=True), "a single token has no gap, so its TPOT is None: 0 would flatter the average"),
            (_times_wrong(per_token=True), "n tokens have n - 1 gaps between them: divide by n - 1"),
            (_times_wrong(whole=True), "TPOT begins at the first token: the queue and the prefill belong to TTFT"),
        ],
    )


def _good(times, ttft_s, tpot_s, *, both=all, strict=False, refused=True):
    def good(pair):
        ttft, tpot = pair
        if strict:
            return both([ttft < ttft_s, (tpot or 0.0) < tpot_s])
        return both([ttft <= ttft_s, (tpot or 0.0) <= tpot_s])

    answered = [pair for pair in times if pair is not None]
    return sum(map(good, answered)) / (len(times) if refused else len(answered))


def _good_wrong(**change):
    return lambda times, ttft_s, tpot_s: _good(times, ttft_s, tpot_s, **change)


def _mean_is_good(times, ttft_s, tpot_s):
    answered = [pair for pair in times if pair is not None]
    means = [sum(pair[i] or 0.0 for pair in answered) / len(answered) for i in (0, 1)]
    return float(means[0] <= ttft_s and means[1] <= tpot_s)


@exercise("11.4")
def good_share(answer):
    """The share of all requests that meet both objectives."""
    times = [(0.2, 0.03), (0.9, 0.02), (0.5, 0.05), (0.4, 0.08), (1.2, 0.09), None, (0.3, None), None]
    expect_function(
        answer,
        _good,
        cases=cases_of(
            "times ttft_s tpot_s",
            (times, 0.5, 0.05),
            (times, 1.0, 0.04),
            ([(0.1, 0.01), (0.3, 0.2), (0.2, 0.02)], 0.25, 0.1),
        ),
        mistakes=[
            (_good_wrong(refused=False), "a refused request was not served well: it counts in the denominator"),
            (_good_wrong(both=any), "a good request meets BOTH objectives"),
            (_good_wrong(strict=True), "a time equal to the objective is good: <="),
            (_mean_is_good, "a mean hides who waited: judge each request, then count"),
        ],
    )


def _by_waves(lengths, slots):
    return sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))


def _by_slots(lengths, slots, *, gap=0):
    free = [0] * slots
    for length in lengths:
        first = free.index(min(free))
        free[first] += length + (gap if free[first] else 0)
    return max(free)


def _steps(lengths, slots):
    return _by_waves(lengths, slots), _by_slots(lengths, slots)


@exercise("11.5")
def steps_needed(answer):
    """Decode steps for all answers: with static batches, and with continuous batching."""
    expect_function(
        answer,
        _steps,
        cases=cases_of(
            "lengths slots",
            ([2, 8, 2, 8], 2),
            ([5, 1, 1, 1, 9], 2),
            ([3, 3, 3], 3),
            ([10, 2, 3, 4, 1, 7, 2], 3),
            ([4], 2),
        ),
        mistakes=[
            (
                lambda lengths, slots: (_by_waves(lengths, slots), math.ceil(sum(lengths) / slots)),
                "that is what full slots would need: at the end slots stand empty, so follow each slot",
            ),
            (
                lambda lengths, slots: (_by_waves(sorted(lengths), slots), _by_slots(lengths, slots)),
                "a server cannot sort by lengths that it does not know yet: take the answers as they come",
            ),
            (
                lambda lengths, slots: (_by_waves(lengths, slots), _by_slots(lengths, slots, gap=1)),
                "the next request enters in the very next step: no step passes between",
            ),
            (
                lambda lengths, slots: (sum(lengths), _by_slots(lengths, slots)),
                "the answers of a batch are made together: a batch takes as many steps as its longest answer",
            ),
        ],
    )
