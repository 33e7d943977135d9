"""Energy: read from a counter, or not stated; what is computed from a data sheet is called an estimate.

RAPL (Intel and AMD processors) counts microjoules, refreshes about every millisecond, and starts again at
`max_energy_range_uj`. Since CVE-2020-8694, a side channel, most systems let only root read it, and virtual machines
have none. NVML (NVIDIA GPUs since Volta) counts millijoules and refreshes every 20 to 100 ms.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from labutils.measurement.resources import NOT_MEASURED

POWERCAP = Path("/sys/class/powercap")
MAX_WATTS = 2_000.0  # of one counter: a faster one was reset, not used up
LEAST_REFRESHES = 50  # both ends of a region are late by up to one refresh: 2% each of so many
# Horowitz, ISSCC 2014, figure 1.1.9: rough costs in 45 nm at 0.9 V, in pJ. Memory is stated for 64 bits.
HOROWITZ_PJ = {
    "DRAM, a byte": (1300 / 8, 2600 / 8),
    "1 MB cache, a byte": (100 / 8, 100 / 8),
    "float32 multiply and add": (3.7 + 0.9, 3.7 + 0.9),
    "int8 multiply, int32 add": (0.2 + 0.1, 0.2 + 0.1),
}


@dataclass(frozen=True)
class Counter:
    """One energy counter: joules so far, seconds between refreshes, and where it starts again (None: nowhere)."""

    source: str
    read_joules: Callable[[], float]
    refresh_s: float
    range_joules: float | None = None


Found = tuple[list[Counter], str]  # the counters, or why there are none


@dataclass
class Energy:
    """Energy of a region in joules, or None and why. A TDP times seconds is not a measurement.

    >>> print(Energy(why="no counter"), "|", Energy(30.0, "RAPL", 2.0, idle_w=5.0, every_s=1.0))
    not measured: no counter | 20.00 J above idle (30.00 J − 5.00 W × 2.00 s; RAPL, read every 1 s)
    """

    joules: float | None = None
    source: str = NOT_MEASURED
    seconds: float = 0.0
    idle_w: float | None = None
    every_s: float | None = None
    why: str = ""

    @property
    def above_idle_joules(self) -> float | None:
        """What the work added: joules − idle power · seconds; None where one of them was not measured."""
        return None if self.joules is None or self.idle_w is None else self.joules - self.idle_w * self.seconds

    def __str__(self) -> str:
        if self.joules is None:
            return f"{NOT_MEASURED}: {self.why}" if self.why else NOT_MEASURED
        rate = f", read every {self.every_s:g} s" if self.every_s else ""
        if self.above_idle_joules is None:
            return f"{self.joules:.2f} J, idle power included ({self.source}, {self.seconds:.2f} s{rate})"
        parts = f"{self.joules:.2f} J − {self.idle_w:.2f} W × {self.seconds:.2f} s"
        return f"{self.above_idle_joules:.2f} J above idle ({parts}; {self.source}{rate})"


def find_counters(device: str | None = None, *, powercap: Path = POWERCAP) -> Found:
    """The counters of "cpu" or "cuda", or the reason why there are none; by default of the GPU where there is one."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return nvml_counters() if kind == "cuda" else rapl_counters(powercap)


def rapl_counters(powercap: Path = POWERCAP) -> Found:
    """One counter for each processor package.

    Children of a package (`intel-rapl:0:1`) are inside it, and "psys" holds the packages: both would count twice. Where
    one package cannot be read, none is: the rest would look like the whole.
    """
    folders = [f for f in sorted(powercap.glob("intel-rapl:*")) if f.name.count(":") == 1]
    try:
        packages = [f for f in folders if not (f / "name").exists() or (f / "name").read_text().strip() != "psys"]
        counters = [_rapl_counter(folder, len(packages)) for folder in packages]
    except PermissionError as error:
        return [], f"only root may read {error.filename} here (CVE-2020-8694)"
    except (OSError, ValueError) as error:
        return [], f"a RAPL counter cannot be read ({error})"
    return counters, "" if counters else f"no RAPL counter in {powercap} (virtual machine, container, other processor)"


def _rapl_counter(folder: Path, packages: int) -> Counter:
    def read() -> float:
        return int((folder / "energy_uj").read_text()) / 1e6

    read()
    full = int((folder / "max_energy_range_uj").read_text()) / 1e6
    return Counter(f"RAPL, {packages} package{'s' * (packages > 1)}, processor alone", read, 1e-3, full)


def nvml_counters() -> Found:
    """The first GPU's counter; it counts the whole board, and not the processor that feeds it."""
    if not torch.cuda.is_available():
        return [], "no NVIDIA GPU"
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return [], "NVML needs the package nvidia-ml-py (pip install nvidia-ml-py)"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        counter = Counter("NVML, GPU alone", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.1)
        counter.read_joules()
    except Exception as error:  # NVMLError of whichever version; an old GPU has no counter
        return [], f"NVML has no energy counter here ({error})"
    return [counter], ""


@dataclass
class _Meter:
    """Adds up what counters moved, reading by reading, so that a long region may wrap more than once."""

    counters: Sequence[Counter]
    joules: float = 0.0
    why: str = ""
    last: list[tuple[float, float]] = field(default_factory=list)  # of each counter: clock, reading

    def read_(self) -> None:
        if self.why:
            return
        try:
            now = [(time.perf_counter(), counter.read_joules()) for counter in self.counters]
            for counter, (then, start), (clock, end) in zip(self.counters, self.last or now, now, strict=True):
                self.joules += moved(end, start, counter.range_joules, clock - then + counter.refresh_s)
        except Exception as error:  # whatever a driver raises: nothing is stated then
            self.why = f"a counter failed ({error})"
        else:
            self.last = now


@contextmanager
def energy(found: Found | None = None, *, idle_w: float | None = None, every_s: float = 1.0) -> Iterator[Energy]:
    """Measures the energy of a `with` block, neighbours on the same device included.

    Args:
        found: from `find_counters`, which is asked by default.
        idle_w: power while nothing ran, from `idle_power` just before.
        every_s: seconds between two readings.

    A region shorter than 50 refreshes of its slowest counter, one whose counter was reset or failed, and one without
    counters all end as "not measured", with the reason.
    """
    counters, why = find_counters() if found is None else found
    why = why or "no counter" * (not counters)
    meter, stop, reading = _Meter(counters, why=why), threading.Event(), Energy(idle_w=idle_w, every_s=every_s)

    def sample() -> None:
        while not stop.wait(every_s):
            meter.read_()

    thread = threading.Thread(target=sample, daemon=True)
    meter.read_()
    began = time.perf_counter()
    thread.start()
    try:
        yield reading
    finally:
        stop.set()
        thread.join()
        reading.seconds = time.perf_counter() - began
        meter.read_()
        least = LEAST_REFRESHES * max((counter.refresh_s for counter in counters), default=0)
        if not meter.why and reading.seconds < least:
            meter.why = f"the counter needs a region of at least {least:g} s; got {reading.seconds:.3g} s"
        reading.why = meter.why
        if not meter.why:
            reading.joules, reading.source = meter.joules, counters[0].source


def idle_power(found: Found, seconds: float = 2.0) -> float | None:
    """Mean watts while this process sleeps; None where energy is not measured. Measure it just before the work."""
    with energy(found) as spent:
        time.sleep(seconds if found[0] else 0.0)
    return None if spent.joules is None else spent.joules / spent.seconds


def moved(end: float, start: float, counter_range: float | None, seconds: float) -> float:
    """How many joules a counter moved in so many seconds, given that it may have started again once.

    >>> moved(5.0, 90.0, 100.0, seconds=1.0)
    15.0

    Raises:
        ValueError: If the counter was reset: it went back and has no range, or moved faster than any device can.
    """
    if end < start and counter_range is None:
        raise ValueError(f"an energy counter without a range cannot go backwards; got {start} then {end}")
    joules = end - start + (counter_range if end < start else 0.0)
    if joules > MAX_WATTS * seconds:
        raise ValueError(f"a counter moves by at most {MAX_WATTS:g} W, or it was reset; got {joules / seconds:.3g} W")
    return joules


def estimate_by_load(tdp_w: float, seconds: float, load: float) -> float:
    """Joules that nobody measured: TDP · load · seconds.

    codecarbon 2 and 3 compute so where there is no counter: with the process's share of all cores, or with half of
    the TDP, and 85 W where the processor is unknown (`external/hardware.py`). A TDP is what the cooling must bear.

    >>> estimate_by_load(85.0, 2.0, 0.5)
    85.0

    Raises:
        ValueError: For a negative power or time, or a load outside 0 to 1.
    """
    if tdp_w < 0 or seconds < 0 or not 0 <= load <= 1:
        raise ValueError(f"power and time must not be negative, load in [0, 1]; got {tdp_w}, {seconds}, {load}")
    return tdp_w * load * seconds


def estimate_by_counting(
    moved_bytes: float, operations: float, *, pj_per_byte: float, pj_per_operation: float
) -> float:
    """Joules that nobody measured: bytes · pJ + operations · pJ, the prices of one technology (`HOROWITZ_PJ`: 45 nm).

    >>> estimate_by_counting(1e9, 1e9, pj_per_byte=200.0, pj_per_operation=4.6)
    0.2046

    Raises:
        ValueError: For a negative number.
    """
    if min(moved_bytes, operations, pj_per_byte, pj_per_operation) < 0:
        raise ValueError(f"counts and prices must not be negative; got {moved_bytes}, {operations}")
    return (moved_bytes * pj_per_byte + operations * pj_per_operation) * 1e-12
