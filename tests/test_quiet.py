"""The gate before stored timings: an A/A race that must tie, and a bandwidth as before."""

import pytest

from labutils.measurement import quiet
from labutils.measurement.roofline import Roofline
from labutils.measurement.timing import Ratio

STEADY = Roofline(10e9, 100e9, threads=1, device="cpu", dtype="float32", working_set_bytes=2**28, samples={})


def test_a_a_ratio_is_of_one_function_with_an_interval_around_its_value():
    ratio = quiet.a_a_ratio(rounds=5)
    assert ratio.low <= ratio.value <= ratio.high


@pytest.mark.parametrize(
    ("ratio", "known", "words"),
    [
        (Ratio(1.0, 0.99, 1.01), 0.0, ""),
        (Ratio(1.0, 0.90, 1.01), 0.0, "against itself: 1.00x [0.90, 1.01]"),
        (Ratio(1.1, 1.00, 1.20), 0.0, "against itself"),
        (Ratio(1.0, 0.99, 1.01), 30e9, "30.0 GB/s here before"),
    ],
)
def test_why_busy_names_what_says_so(monkeypatch, ratio, known, words):
    from dataclasses import replace

    monkeypatch.setattr(quiet, "a_a_ratio", lambda: ratio)
    roof = replace(STEADY, known_bandwidth_bytes_per_s=known)
    monkeypatch.setattr(quiet, "measure_roofline", lambda seconds: roof)
    assert words in quiet.why_busy() and bool(quiet.why_busy()) == bool(words)
