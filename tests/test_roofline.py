"""Roofline: the formula by hand, probes that count what they move, and shares that cannot exceed 100%."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.measurement import roofline
from labutils.measurement.roofline import (
    ProbeError,
    Roofline,
    arithmetic_intensity,
    bandwidth_probes,
    describe_share,
    flops_probes,
    measure_roofline,
    share_of_peak,
)


def hand_made() -> Roofline:
    return Roofline(10e9, 100e9, threads=1, device="cpu", dtype="float32", working_set_bytes=2**28, samples={})


def test_attainable_by_hand():
    roof = hand_made()
    assert roof.ridge_flop_per_byte == 10
    assert roof.attainable_flops_per_s(0.5) == 5e9
    assert roof.attainable_flops_per_s(10) == 100e9
    assert roof.attainable_flops_per_s(1000) == 100e9


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4))
def test_attainable_grows_with_intensity_and_stays_below_both_roofs(a, b):
    roof = hand_made()
    low, high = sorted((a, b))
    assert roof.attainable_flops_per_s(low) <= roof.attainable_flops_per_s(high) <= roof.flops_per_s
    assert roof.attainable_flops_per_s(a) <= a * roof.bandwidth_bytes_per_s * (1 + 1e-9)


def test_arithmetic_intensity_of_a_matrix_vector_product_is_half():
    assert arithmetic_intensity(2 * 64 * 64, 4 * 64 * 64) == 0.5


def test_share_over_the_peak_is_a_probe_error_not_a_triumph():
    assert share_of_peak(8.0, 10.0) == 0.8
    assert share_of_peak(10.0, 10.0) == 1.0
    with pytest.raises(ProbeError, match="probe error: 112% of the measured peak"):
        share_of_peak(11.2, 10.0)
    assert describe_share(8.0, 10.0) == "80%"
    assert describe_share(11.2, 10.0) == "probe error (112%)"


def test_bandwidth_probes_count_the_bytes_they_touch():
    probes = bandwidth_probes(2**20, device="cpu", dtype=torch.float32)
    assert {moved for _, moved in probes.values()} == {2**20}
    assert probes["bytes:sum"][0]().item() == 2**18
    assert probes["bytes:dot"][0]().item() == 2**17
    assert probes["bytes:matvec"][0]().shape == (2**18 // 1024,)
    assert len(probes) >= 3


def test_flops_probes_count_two_n_cubed():
    function, flop = flops_probes(device="cpu", dtype=torch.float32, sizes=(8,))["flops:matmul8"]
    assert flop == 2 * 8 * 8 * 8
    assert function().shape == (8, 8)


def test_working_set_is_several_caches(monkeypatch):
    monkeypatch.setattr(roofline, "last_level_cache_bytes", lambda: 32 * 2**20)
    assert roofline.probe_working_set_bytes("cpu") == 256 * 2**20
    monkeypatch.setattr(roofline, "last_level_cache_bytes", lambda: 2**20)
    assert roofline.probe_working_set_bytes("cpu") == 64 * 2**20


@pytest.mark.parametrize(("text", "expected"), [("32768K", 32 * 2**20), ("8M\n", 8 * 2**20), ("", 0), ("512", 512)])
def test_cache_size_is_parsed(text, expected):
    assert roofline._parse_size(text) == expected


def test_measure_roofline_takes_the_best_of_all_probes(monkeypatch):
    monkeypatch.setattr(roofline, "last_level_cache_bytes", lambda: 2**20)
    roof = measure_roofline(0.01, working_set_bytes=2**21, matmul_sizes=(32,))
    of_memory = [r for name, rates in roof.samples.items() if name.startswith("bytes:") for r in rates]
    assert roof.bandwidth_bytes_per_s == max(of_memory)
    assert roof.flops_per_s == max(roof.samples["flops:matmul32"])
    assert all(len(rates) >= 5 for rates in roof.samples.values())
    assert (roof.threads, roof.device, roof.dtype) == (torch.get_num_threads(), "cpu", "float32")
    assert "GB/s" in str(roof)


def test_bandwidth_doubts_itself_when_best_median_or_memory_disagree(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    steady = replace(hand_made(), samples={"bytes:sum": (10e9, 9.9e9, 9.8e9), "bytes:copy": (1e9, 1e9, 1e9)})
    assert steady.median_bandwidth_bytes_per_s == 9.9e9 and steady.doubt == ""
    shaken = replace(steady, samples={"bytes:sum": (10e9, 5e9, 5e9)})
    assert "differ by more than a fifth" in shaken.doubt and shaken.doubt in str(shaken)
    assert roofline.known_bandwidth(30e9, device="cpu") == 0.0
    assert roofline.known_bandwidth(10e9, device="cpu") == 30e9
    assert roofline.known_bandwidth(10e9, device="cuda") == 0.0
    (tmp_path / roofline.KNOWN_NAME).write_text("torn", encoding="utf-8")
    assert roofline.known_bandwidth(10e9, device="cpu") == 0.0
    assert "measured 30.0 GB/s here before" in replace(steady, known_bandwidth_bytes_per_s=30e9).doubt


def test_only_the_default_working_set_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "last_level_cache_bytes", lambda: 2**20)
    measure_roofline(0.01, working_set_bytes=2**21, matmul_sizes=(32,))
    assert not (tmp_path / roofline.KNOWN_NAME).exists()
    monkeypatch.setattr(roofline, "probe_working_set_bytes", lambda device: 2**22)
    first = measure_roofline(0.01, matmul_sizes=(32,))
    assert measure_roofline(0.01, matmul_sizes=(32,)).known_bandwidth_bytes_per_s == first.bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: measure_roofline(0), "seconds must be positive; got 0"),
        (lambda: measure_roofline(1, working_set_bytes=4096), "twice the last-level cache"),
        (lambda: share_of_peak(1.0, 0.0), "must be positive"),
        (lambda: arithmetic_intensity(1, 0), "must be positive; got 1 and 0"),
        (lambda: hand_made().attainable_flops_per_s(0), "must be positive; got 0"),
    ],
)
def test_roofline_bad_input_states_the_rule(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()
