"""Timing: medians by hand, the interval's properties, interleaving that really interleaves."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.measurement import timing
from labutils.measurement.timing import Timing, bootstrap_interval, measure, measure_interleaved, paired_ratio, quantile

positive = st.floats(1e-6, 1e3)
rounds = st.lists(st.tuples(positive, positive), min_size=5, max_size=20)


def fixed(*samples: float) -> Timing:
    return Timing("f", samples, warmup=1, device="cpu", threads=1)


def test_median_by_hand():
    assert fixed(5.0, 1.0, 2.0, 9.0, 3.0).median_s == 3.0


def test_quantile_by_hand():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.0) == 1.0
    assert quantile([4.0, 1.0, 3.0, 2.0], 1.0) == 4.0


@settings(deadline=None, max_examples=30)
@given(st.lists(positive, min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_equals_torch(values, fraction):
    reference = torch.quantile(torch.tensor(values, dtype=torch.float64), fraction).item()
    assert quantile(values, fraction) == pytest.approx(reference, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(positive, min_size=5, max_size=20))
def test_bootstrap_interval_lies_within_the_samples_and_repeats_itself(samples):
    low, high = bootstrap_interval(samples, resamples=50)
    assert min(samples) <= low <= high <= max(samples)
    assert (low, high) == bootstrap_interval(samples, resamples=50)


def test_bootstrap_interval_covers_the_true_median_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 15, generator=generator).tolist()
    hits = sum(low <= 0 <= high for low, high in (bootstrap_interval(d, resamples=200) for d in draws))
    assert 0.88 <= hits / 200 <= 1.0


def test_bootstrap_interval_is_wider_for_more_confidence():
    samples = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    narrow, wide = (bootstrap_interval(samples, confidence=c) for c in (0.5, 0.99))
    assert wide[0] < narrow[0] and narrow[1] < wide[1]


@settings(deadline=None, max_examples=30)
@given(rounds)
def test_paired_ratio_is_the_ratio_of_medians_and_lies_in_its_interval(pairs):
    numerator, denominator = zip(*pairs, strict=True)
    ratio = paired_ratio(numerator, denominator, resamples=50)
    assert ratio.value == pytest.approx(statistics.median(numerator) / statistics.median(denominator))
    assert ratio.low <= ratio.high


def test_paired_ratio_cancels_a_disturbance_shared_by_a_round():
    disturbance = [1.0, 5.0, 1.0, 3.0, 9.0, 1.0, 2.0]
    ratio = paired_ratio([3.0 * d for d in disturbance], [1.5 * d for d in disturbance])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_measure_interleaved_runs_rounds_and_rotates_who_goes_first():
    calls = []
    timings = measure_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=5, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert [len(t.samples_s) for t in timings.values()] == [5, 5]


def test_measure_interleaved_times_the_function_and_not_its_preparation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def take(seconds: float) -> None:
        now[0] += seconds

    timings = measure_interleaved(
        {"a": lambda: take(2.0), "b": lambda: take(3.0)}, before=lambda name: take(100.0), calls_per_sample=4
    )
    assert timings["a"].samples_s == (2.0,) * 7
    assert timings["b"].median_s == 3.0


def test_measure_interleaved_waits_for_the_device_before_and_after_each_sample(monkeypatch):
    events = []
    monkeypatch.setattr(timing, "synchronize", lambda device: events.append("sync"))
    measure(lambda: events.append("call"), repeats=5, warmup=1)
    assert events == ["call"] + ["sync", "call", "sync"] * 5


def test_a_gpu_is_timed_by_its_own_clock_with_one_wait_before_and_one_after(monkeypatch):
    """A fake device: a queue with a clock of its own, which goes on only when a kernel runs."""
    clock, seen = [0.0], []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at_ms = clock[0]
            seen.append("event")

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, last):
            return last.at_ms - self.at_ms

    def kernel():
        clock[0] += 50.0
        seen.append("launch")

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "synchronize", lambda device: seen.append("wait"))
    assert timing.sample_seconds(kernel, "cuda", 3) == pytest.approx(0.05)
    assert seen == ["wait", "event", "launch", "launch", "launch", "event", "wait"]


def test_measure_reports_threads_warmup_and_device():
    result = measure(lambda: None, name="nothing", repeats=5, warmup=3)
    assert (result.threads, result.warmup, result.device) == (torch.get_num_threads(), 3, "cpu")
    assert "nothing" in str(result) and "3 warm-up" in str(result)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: measure(lambda: None, repeats=4), "at least 5 repeats; got 4"),
        (lambda: measure_interleaved({}), "at least one function"),
        (lambda: measure(lambda: None, warmup=0), "at least 1; got 0"),
        (lambda: fixed(1.0, 2.0), "at least 5 repeats; got 2"),
        (lambda: bootstrap_interval([1.0] * 5, confidence=1.0), "strictly between 0 and 1; got 1.0"),
        (lambda: paired_ratio([1.0] * 5, [1.0] * 6), "same rounds; got 5 and 6"),
        (lambda: paired_ratio([1.0] * 5, [1.0] * 4 + [0.0]), "must be positive; got 0.0"),
        (lambda: quantile([], 0.5), "needs values"),
    ],
)
def test_timing_bad_input_states_the_rule(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()
