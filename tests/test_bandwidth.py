"""Probes of the right size, one best rate a round, and a profile whose parts add up."""

import pytest
from tiny_models import tiny_model

from labutils.course.bench import bandwidth
from labutils.course.bench.bandwidth import BandwidthMeter, describe_time, probe_bytes, where_time_goes
from labutils.generation.fast_llama import FastLlama


@pytest.mark.parametrize(("weight_bytes", "size"), [(2**27, 2**27), (2**27 - 1, 90 * 2**20), (2**26 - 1, 0), (0, 0)])
def test_probe_bytes_reads_no_more_than_the_weights(weight_bytes, size):
    assert probe_bytes(weight_bytes) == size


def test_a_meter_keeps_the_best_rate_of_every_round(monkeypatch):
    rates = iter([3.0, 9.0, 5.0, 1.0, 2.0, 4.0, 8.0, 6.0, 7.0, 1.0, 1.0, 1.0, 10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(bandwidth, "_rate", lambda function, moved, device: next(rates))
    meter = BandwidthMeter([2**20, 0, 2**20], threads=[1, 2], more=lambda size: {"bytes:mine": (lambda: None, size)})
    assert list(meter.probes) == [2**20]
    meter.run_round()
    meter.run_round()
    assert meter.rounds == {2**20: [9.0, 10.0]}


def test_a_meter_measures_something():
    meter = BandwidthMeter([2**20], threads=[1])
    meter.run_round()
    assert meter.rounds[2**20][0] > 0
    assert meter.describe(2**20).startswith("bandwidth, 1 MB read: ")


def test_where_time_goes_adds_up_and_leaves_the_decoder_alone():
    fast = FastLlama(tiny_model("llama-gqa-tied"), max_length=8, matvec="torch")
    fast.length = 3
    parts = where_time_goes(fast, 1, tokens=5)
    assert fast.length == 3 and not any(isinstance(layer.qkv, bandwidth._Timed) for layer in fast.layers)
    assert list(parts) == ["qkv", "output", "gate_up", "down", "head", "between the matrices", "whole token"]
    weights = sum(size for _, size in parts.values())
    gains = (2 * len(fast.layers) + 1) * fast.final_gain.nbytes
    assert weights == fast.weight_bytes - gains
    assert all(0 < seconds <= parts["whole token"][0] for seconds, _ in parts.values())
    with pytest.raises(ValueError, match="must fit into max_length=8; got 9"):
        where_time_goes(fast, 1, tokens=9)


def test_describe_time_by_hand():
    parts = {"qkv": (0.001, 10**7), "between the matrices": (0.003, 0), "whole token": (0.004, 0)}
    lines = [" ".join(line.split()) for line in describe_time(parts, 2e10)]
    assert lines == [
        "qkv 1.000 ms 25% 10.0 MB at 10.0 GB/s",
        "between the matrices 3.000 ms 75%",
        "whole token 4.000 ms 100%",
        "at measured bandwidth 0.500 ms 12%",
    ]
    assert len(describe_time(parts, None)) == 3
