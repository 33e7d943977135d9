"""Energy: counters that wrap, are reset, cannot be read or are too slow, and estimates that are called so."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.measurement import energy as module
from labutils.measurement.energy import (
    Counter,
    Energy,
    energy,
    estimate_by_counting,
    estimate_by_load,
    find_counters,
    idle_power,
    moved,
    nvml_counters,
    rapl_counters,
)


def rapl(root, name, microjoules, full_range=1_000_000, called="package-0"):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(called + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(str(full_range))


def scripted(*joules, refresh_s=1e-4, range_joules=None):
    """A counter that reads so, one value a reading; the last one stays."""
    values = itertools.chain(joules, itertools.repeat(joules[-1]))
    return Counter("a script", lambda: next(values), refresh_s, range_joules)


def test_two_packages_add_up_and_unwrap_their_children_and_the_platform_left_out(tmp_path):
    rapl(tmp_path, "intel-rapl:0", 900_000)
    rapl(tmp_path, "intel-rapl:1", 100_000, called="package-1")
    rapl(tmp_path, "intel-rapl:0:0", 5, called="core")
    rapl(tmp_path, "intel-rapl:2", 7, called="psys")
    found = rapl_counters(tmp_path)
    assert len(found[0]) == 2
    with energy(found) as spent:
        time.sleep(0.06)
        rapl(tmp_path, "intel-rapl:0", 100_000)  # wrapped: 0.9 J to 1.0 J, then 0.1 J
        rapl(tmp_path, "intel-rapl:1", 400_000, called="package-1")
        rapl(tmp_path, "intel-rapl:0:0", 999_999, called="core")
        rapl(tmp_path, "intel-rapl:2", 999_999, called="psys")
    assert spent.joules == pytest.approx(0.2 + 0.3)
    assert "2 packages" in str(spent) and "read every 1 s" in str(spent)


def test_long_region_may_wrap_more_than_once():
    counter = scripted(0.0, 6.0, 2.0, 8.0, 4.0, range_joules=10.0)  # 6 J each time, two wraps
    with energy(([counter], ""), every_s=0.02) as spent:
        time.sleep(0.2)
    assert spent.joules == pytest.approx(24.0)


def test_idle_power_is_measured_alike_and_subtracted():
    clock = time.perf_counter()
    counter = Counter("ten watts", lambda: 10 * (time.perf_counter() - clock), 1e-4)
    idle_w = idle_power(([counter], ""), seconds=0.1)
    assert idle_w == pytest.approx(10, rel=0.05)
    assert Energy(30.0, "x", 2.0, idle_w=10.0).above_idle_joules == 10.0
    assert Energy(30.0, "x", 2.0).above_idle_joules is None and "idle power included" in str(Energy(30.0, "x", 2.0))


@pytest.mark.parametrize(
    ("counter", "words"),
    [
        (scripted(500.0, 2.0), "a counter failed (an energy counter without a range cannot go backwards"),
        (
            scripted(500.0, 2.0, range_joules=262_143.0),
            "a counter failed (a counter moves by at most 2000 W, or it was",
        ),
        (scripted(0.0, 1.0, refresh_s=0.1), "the counter needs a region of at least 5 s; got 0.0"),
        (Counter("gone", lambda: int("?"), 1e-3), "a counter failed (invalid literal"),
    ],
    ids=["no range", "reset", "too short", "unreadable"],
)
def test_what_cannot_be_trusted_is_not_measured_and_says_why(counter, words):
    with energy(([counter], "")) as spent:
        time.sleep(0.06)
    assert spent.joules is None and spent.above_idle_joules is None
    assert str(spent).startswith(f"not measured: {words}")


def test_machine_without_a_counter_says_why(tmp_path):
    found = rapl_counters(tmp_path)
    assert found[0] == [] and idle_power(found) is None
    with energy(found) as spent:
        pass
    assert str(spent).startswith("not measured: no RAPL counter in")


def test_counter_that_only_root_may_read_hides_the_whole_sum(tmp_path, monkeypatch):
    rapl(tmp_path, "intel-rapl:0", 900_000)
    rapl(tmp_path, "intel-rapl:1", 100_000)
    read_text = type(tmp_path).read_text

    def guarded(path, *args, **settings):
        if path.name == "energy_uj" and path.parent.name.endswith(":1"):
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **settings)

    monkeypatch.setattr(type(tmp_path), "read_text", guarded)
    counters, why = rapl_counters(tmp_path)
    assert counters == [] and "only root may read" in why and "CVE-2020-8694" in why and "intel-rapl:1" in why


def test_folder_without_a_range_is_no_counter(tmp_path):
    rapl(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    assert "cannot be read" in rapl_counters(tmp_path)[1]


def test_nvml_counts_millijoules_of_the_gpu_that_torch_uses(monkeypatch):
    asked, readings = [], iter([0, 1_000, 7_500])
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "gpu",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(module.importlib, "import_module", lambda name: fake)
    counters, why = find_counters()
    assert asked == ["GPU-abc"] and not why and counters[0].refresh_s == 0.1
    monkeypatch.setattr(module, "LEAST_REFRESHES", 0)
    with energy((counters, why)) as spent:
        time.sleep(0.01)
    assert spent.joules == pytest.approx(6.5)


def test_gpu_without_nvml_or_without_a_counter_says_why(monkeypatch):
    assert torch.cuda.is_available() or nvml_counters() == ([], "no NVIDIA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    monkeypatch.setitem(module.importlib.sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in nvml_counters()[1]

    def refuse():
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(module.importlib, "import_module", lambda name: SimpleNamespace(nvmlInit=refuse))
    assert nvml_counters() == ([], "NVML has no energy counter here (Not Supported)")


def test_work_that_fails_stops_the_sampling_and_raises():
    with pytest.raises(KeyError), energy(([scripted(0.0, 1.0)], ""), every_s=0.01):
        raise KeyError
    assert "sample" not in {getattr(t, "_target", None) and t._target.__name__ for t in module.threading.enumerate()}


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 99), st.floats(0, 99))
def test_counter_never_moves_back(start, end):
    assert 0 <= moved(end, start, 100.0, seconds=1.0) <= 100


def test_estimates_by_hand():
    assert estimate_by_load(170.0, 3.0, 0.5) == 255.0
    assert estimate_by_counting(2e6, 3e6, pj_per_byte=100.0, pj_per_operation=4.6) == pytest.approx(213.8e-6)
    with pytest.raises(ValueError, match=r"load in \[0, 1\]; got 85.0, 1.0, 50"):
        estimate_by_load(85.0, 1.0, 50)
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        estimate_by_counting(-1, 0, pj_per_byte=1.0, pj_per_operation=1.0)
