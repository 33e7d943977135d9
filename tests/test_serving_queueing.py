"""Waiting times by formula, by hand and by simulation; what TTFT, ITL, TPOT and goodput count."""

import random
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.serving.queueing import (
    RequestTimes,
    bursty_arrivals,
    goodput,
    latency_badge,
    md1_wait_s,
    mean_in_system,
    mg1_wait_s,
    mm1_wait_s,
    poisson_arrivals,
    serve_in_order,
)

COUNT = 20_000


def simulated_wait(arrivals, service):
    served = serve_in_order(arrivals, service)
    return fmean(start - arrival for arrival, (start, _) in zip(arrivals, served, strict=True))


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_waits_of_the_formulas_are_those_of_a_simulation(busy):
    arrivals, rng = poisson_arrivals(busy, COUNT, seed=1), random.Random(2)
    exponential = [rng.expovariate(1.0) for _ in arrivals]
    two_point = [rng.choice([0.1, 1.9]) for _ in arrivals]  # E[S] = 1, E[S²] = (0.01 + 3.61) / 2
    assert simulated_wait(arrivals, exponential) == pytest.approx(mm1_wait_s(busy, 1.0), rel=0.1)
    assert simulated_wait(arrivals, [1.0] * COUNT) == pytest.approx(md1_wait_s(busy, 1.0), rel=0.1)
    assert simulated_wait(arrivals, two_point) == pytest.approx(mg1_wait_s(busy, 1.0, 1.81), rel=0.1)


def test_formulas_by_hand():
    # λ = 8/s, S = 0.1 s: ρ = 0.8; M/M/1: 0.8 · 0.1 / 0.2 = 0.4 s, M/D/1 half of it
    assert mm1_wait_s(8.0, 0.1) == pytest.approx(0.4)
    assert md1_wait_s(8.0, 0.1) == pytest.approx(0.2)
    assert mg1_wait_s(0.0, 1.0, 1.0) == 0.0


def test_poisson_gaps_have_the_spread_of_their_mean_and_bursts_keep_the_rate():
    arrivals = poisson_arrivals(4.0, COUNT, seed=3)
    gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.02)
    assert pvariance(gaps) == pytest.approx(0.25**2, rel=0.05)
    bursts = bursty_arrivals(4.0, COUNT, burst=10, seed=3)
    assert COUNT / bursts[-1] == pytest.approx(4.0, rel=0.05)
    assert len(bursts) == COUNT and len(set(bursts)) == COUNT // 10
    assert simulated_wait(bursts, [0.1] * COUNT) > 5 * simulated_wait(arrivals, [0.1] * COUNT)
    assert arrivals == poisson_arrivals(4.0, COUNT, seed=3) != poisson_arrivals(4.0, COUNT, seed=4)
    assert len(bursty_arrivals(1.0, 7, burst=3, seed=0)) == 7


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 5)), min_size=1, max_size=30))
def test_littles_law_holds_for_any_arrivals_and_services(jobs):
    arrivals, now = [], 0.0
    for gap, _ in jobs:
        now += gap
        arrivals.append(now)
    departures = [end for _, end in serve_in_order(arrivals, [seconds for _, seconds in jobs])]
    span = max(departures) - arrivals[0]
    stay = fmean(end - start for start, end in zip(arrivals, departures, strict=True))
    assert mean_in_system(arrivals, departures) == pytest.approx(len(jobs) / span * stay)


def test_a_convoy_forms_behind_one_long_service():
    ends = [end for _, end in serve_in_order([0.0, 0.1, 0.2, 0.3], [10.0, 0.1, 0.1, 0.1])]
    assert ends == pytest.approx([10.0, 10.1, 10.2, 10.3])


def test_the_first_token_counts_into_ttft_only():
    times = RequestTimes(10.0, (12.0, 12.1, 12.4))
    assert times.ttft_s == pytest.approx(2.0)
    assert times.itl_s == pytest.approx((0.1, 0.3))
    assert times.tpot_s == pytest.approx(0.2)
    assert times.latency_s == pytest.approx(times.ttft_s + 2 * times.tpot_s)
    assert RequestTimes(0.0, (1.0,)).tpot_s is None


def test_goodput_needs_both_objectives_and_counts_refusals():
    slow_start, slow_tokens = RequestTimes(0, (2.0, 2.1)), RequestTimes(0, (0.1, 1.1))
    good, single = RequestTimes(0, (0.1, 0.2)), RequestTimes(0, (0.1,))
    rate, share = goodput([slow_start, slow_tokens, good, single], duration_s=2, ttft_s=1, tpot_s=0.5, refused=4)
    assert (rate, share) == (1.0, 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mm1_wait_s(1.0, 1.0), "below utilization 1; got 1.000"),
        (lambda: mg1_wait_s(0.1, 1.0, 0.5), "E.S². ≥ E.S.²"),
        (lambda: mg1_wait_s(-1.0, 1.0, 1.0), "rate ≥ 0"),
        (lambda: poisson_arrivals(0.0, 1, seed=0), "rate must be positive"),
        (lambda: bursty_arrivals(1.0, 1, burst=0, seed=0), "burst at least 1"),
        (lambda: mean_in_system([], []), "every arrival departs once"),
        (lambda: mean_in_system([0.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: RequestTimes(0.0, ()), "a request needs tokens"),
        (lambda: RequestTimes(1.0, (0.5,)), "before its arrival"),
        (lambda: RequestTimes(0.0, (2.0, 1.0)), "out of order"),
        (lambda: goodput([], duration_s=1, ttft_s=1, tpot_s=1), "needs requests"),
        (lambda: goodput([RequestTimes(0, (1,))], duration_s=0, ttft_s=1, tpot_s=1), "positive duration"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_badge_by_hand():
    """Arrives at 10.0, is admitted at 10.25; tokens at 10.5, 10.625, 11.0: a mean gap of 0.5 / 2."""
    assert latency_badge(10.0, 10.25, [10.5, 10.625, 11.0]) == {"queue_s": 0.25, "ttft_s": 0.5, "per_token_s": 0.25}
    assert latency_badge(0.0, 0.0, [1.0]) == {"queue_s": 0.0, "ttft_s": 1.0, "per_token_s": None}


@pytest.mark.parametrize(("admitted_s", "token_s"), [(0.5, [2.0]), (2.5, [2.0]), (1.0, [])])
def test_badge_of_impossible_times_is_refused(admitted_s, token_s):
    with pytest.raises(ValueError, match="admission must lie between|a request needs tokens"):
        latency_badge(1.0, admitted_s, token_s)
