"""The roofline of this machine, measured: how many bytes and how many FLOP it really moves in a second.

A kernel that does I = FLOP / bytes of work per byte can reach at most

    attainable = min(peak FLOP/s, I * bandwidth)

(Williams, Waterman, Patterson 2009, "Roofline"). A datasheet's peak is somebody else's machine: here both
roofs come from several probes, the best of which counts, on a working set several times the last-level cache. A busy
neighbour can spoil even the best for seconds, so the median is kept beside it, and the best that this machine ever
showed is remembered in the learner's folder: `Roofline.doubt` says in a sentence when the three disagree.
"""

from __future__ import annotations

import glob
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from labutils.lab.paths import learner_dir
from labutils.measurement.timing import sample_seconds

DEFAULT_CACHE_BYTES = 32 * 2**20
CACHE_MULTIPLE = 8
BUSY = 1.2  # one bandwidth over another that should equal it: from here on something else used the memory
KNOWN_NAME = "bandwidths.jsonl"


class ProbeError(ValueError):
    """A share of a measured peak came out above 100%: the probe, or the byte count, is wrong."""


@dataclass(frozen=True)
class Roofline:
    """Two measured roofs and every sample behind them.

    `samples` maps a probe's name to its rates, in bytes/s for names that begin with `bytes:` and in
    FLOP/s for names that begin with `flops:`.
    """

    bandwidth_bytes_per_s: float
    flops_per_s: float
    threads: int
    device: str
    dtype: str
    working_set_bytes: int
    samples: dict[str, tuple[float, ...]]
    known_bandwidth_bytes_per_s: float = 0.0  # the best of earlier measurements like this one, 0 if there are none

    @property
    def median_bandwidth_bytes_per_s(self) -> float:
        """Median of the samples of the probe that gave the best one; the best itself without samples."""
        probes = [rates for name, rates in self.samples.items() if name.startswith("bytes:")]
        return statistics.median(max(probes, key=max)) if probes else self.bandwidth_bytes_per_s

    @property
    def doubt(self) -> str:
        """Why this bandwidth may be too low, in one sentence; empty if nothing says so.

        >>> roof = Roofline(10e9, 1e12, 1, "cpu", "float32", 2**28, {}, known_bandwidth_bytes_per_s=30e9)
        >>> roof.doubt
        'measured 30.0 GB/s here before: the machine is busy now, or something limits it'
        """
        if self.known_bandwidth_bytes_per_s > BUSY * self.bandwidth_bytes_per_s:
            known = f"{self.known_bandwidth_bytes_per_s / 1e9:.1f} GB/s"
            return f"measured {known} here before: the machine is busy now, or something limits it"
        if self.bandwidth_bytes_per_s > BUSY * self.median_bandwidth_bytes_per_s:
            return "best and median differ by more than a fifth: something else used the memory meanwhile"
        return ""

    @property
    def ridge_flop_per_byte(self) -> float:
        """Intensity at which the two roofs meet: below it a kernel waits for memory."""
        return self.flops_per_s / self.bandwidth_bytes_per_s

    def attainable_flops_per_s(self, intensity_flop_per_byte: float) -> float:
        """Returns min(peak FLOP/s, intensity * bandwidth).

        Raises:
            ValueError: If the intensity is not positive.
        """
        if intensity_flop_per_byte <= 0:
            raise ValueError(f"arithmetic intensity must be positive; got {intensity_flop_per_byte}")
        return min(self.flops_per_s, intensity_flop_per_byte * self.bandwidth_bytes_per_s)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        rates = f"{self.bandwidth_bytes_per_s / 1e9:.1f} GB/s (median {self.median_bandwidth_bytes_per_s / 1e9:.1f})"
        where = f"({self.device}, {self.dtype}, {threads}, working set {self.working_set_bytes / 1e6:.0f} MB)"
        doubt = f"; {self.doubt}" if self.doubt else ""
        return f"{rates}, {self.flops_per_s / 1e9:.1f} GFLOP/s {where}{doubt}"


def arithmetic_intensity(flop: float, moved_bytes: float) -> float:
    """Returns FLOP per byte moved.

    A matrix-vector product does 2 FLOP per fp32 weight of 4 bytes:

    >>> arithmetic_intensity(2 * 1024 * 1024, 4 * 1024 * 1024)
    0.5

    Raises:
        ValueError: If a count is not positive.
    """
    if flop <= 0 or moved_bytes <= 0:
        raise ValueError(f"FLOP and bytes must be positive; got {flop} and {moved_bytes}")
    return flop / moved_bytes


def share_of_peak(achieved: float, peak: float) -> float:
    """Returns achieved / peak, and refuses to celebrate more than 100%.

    >>> share_of_peak(8e9, 10e9)
    0.8

    Raises:
        ProbeError: If the share is above 1: the working set sat in a cache, the bytes were counted wrongly,
            or the probe ran while the machine was busy. None of these is a fast program.
        ValueError: If a rate is negative or the peak is not positive.
    """
    if achieved < 0 or peak <= 0:
        raise ValueError(f"rates must be positive; got achieved {achieved} and peak {peak}")
    share = achieved / peak
    if share > 1:
        raise ProbeError(
            f"probe error: {share:.0%} of the measured peak; a share above 100% is a wrong probe, not a fast program"
        )
    return share


def describe_share(achieved: float, peak: float) -> str:
    """Returns the share for a table's cell: `80%`, or `probe error (112%)`.

    >>> describe_share(11.2, 10.0)
    'probe error (112%)'
    """
    try:
        return f"{share_of_peak(achieved, peak):.0%}"
    except ProbeError:
        return f"probe error ({achieved / peak:.0%})"


def last_level_cache_bytes() -> int:
    """Returns the size of the largest CPU cache the kernel reports, or 32 MiB where it reports none."""
    sizes = [_parse_size(Path(p).read_text()) for p in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max(sizes, default=DEFAULT_CACHE_BYTES) or DEFAULT_CACHE_BYTES


def probe_working_set_bytes(device: str | torch.device = "cpu") -> int:
    """Returns a working set of eight last-level caches on a CPU (64 MiB to 1 GiB), of 1 GiB on a GPU."""
    if torch.device(device).type != "cpu":
        return 2**30
    return min(max(CACHE_MULTIPLE * last_level_cache_bytes(), 2**26), 2**30)


def bandwidth_probes(
    working_set_bytes: int, *, device: str | torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable, int]]:
    """Returns probe name to (function, bytes it moves): a sum, a dot, a copy and a matrix-vector product.

    No probe is best everywhere: one library's sum beats its own dot product, and a copy counts the byte read and
    the byte written. All of them share one buffer of `working_set_bytes`.
    """
    size = working_set_bytes // dtype.itemsize // 2048 * 2048
    buffer = torch.ones(size, device=device, dtype=dtype)
    first, second = buffer[: size // 2], buffer[size // 2 :]
    matrix, vector = buffer.view(-1, 1024), torch.ones(1024, device=device, dtype=dtype)
    moved = size * dtype.itemsize
    return {
        "bytes:sum": (lambda: buffer.sum(), moved),
        "bytes:dot": (lambda: torch.dot(first, second), moved),
        "bytes:copy": (lambda: second.copy_(first), moved),
        "bytes:matvec": (lambda: torch.mv(matrix, vector), moved),
    }


def flops_probes(
    *, device: str | torch.device, dtype: torch.dtype, sizes: tuple[int, ...]
) -> dict[str, tuple[Callable, int]]:
    """Returns probe name to (function, FLOP): square matrix products, 2 n^3 FLOP each."""
    probes = {}
    for n in sizes:
        a, b = torch.ones(n, n, device=device, dtype=dtype), torch.ones(n, n, device=device, dtype=dtype)
        probes[f"flops:matmul{n}"] = (lambda a=a, b=b: a @ b, 2 * n**3)
    return probes


def measure_roofline(
    seconds: float = 2.0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    working_set_bytes: int | None = None,
    matmul_sizes: tuple[int, ...] | None = None,
) -> Roofline:
    """Measures both roofs with PyTorch's current thread count: every probe in turn, until the time is up.

    Args:
        seconds: Rough time for all probes; at least five rounds run whatever it says.
        device: Where to measure.
        dtype: Element type of the probes.
        working_set_bytes: Bytes the memory probes walk through; default eight last-level caches.
        matmul_sizes: Square matrices for the FLOP roof; default 512 and 1024, on a GPU 4096 and 8192.

    Raises:
        ValueError: If `seconds` is not positive, or the working set would fit twice into the cache.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    on_cpu, comparable = torch.device(device).type == "cpu", working_set_bytes is None
    working_set_bytes = working_set_bytes or probe_working_set_bytes(device)
    if on_cpu and working_set_bytes < 2 * last_level_cache_bytes():
        rule = f"the working set must be at least twice the last-level cache ({last_level_cache_bytes()} bytes)"
        raise ValueError(f"{rule}; got {working_set_bytes}")
    sizes = matmul_sizes or ((512, 1024) if on_cpu else (4096, 8192))
    probes = bandwidth_probes(working_set_bytes, device=device, dtype=dtype) | flops_probes(
        device=device, dtype=dtype, sizes=sizes
    )
    with torch.inference_mode():
        samples = _run_probes(probes, seconds, device)
    best = best_rate(samples, "bytes:")
    return Roofline(
        bandwidth_bytes_per_s=best,
        flops_per_s=best_rate(samples, "flops:"),
        threads=torch.get_num_threads(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        working_set_bytes=working_set_bytes,
        samples=samples,
        known_bandwidth_bytes_per_s=known_bandwidth(best, device=str(device)) if comparable else 0.0,
    )


def known_bandwidth(measured_bytes_per_s: float, *, device: str) -> float:
    """Remembers a measured bandwidth and returns the best of the earlier ones of this device and thread count, or 0.

    They stand in `bandwidths.jsonl` in the learner's folder, a line each; where that cannot be read or written, nothing
    is known.
    """
    path = learner_dir() / KNOWN_NAME
    key = {"device": device, "threads": torch.get_num_threads(), "host": platform.node()}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        earlier = [entry["bytes_per_s"] for entry in map(json.loads, lines) if key.items() <= entry.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(key | {"bytes_per_s": measured_bytes_per_s}) + "\n")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0.0
    return max(earlier, default=0.0)


def best_rate(samples: dict[str, tuple[float, ...]], kind: str) -> float:
    """Returns the best sample of all probes whose name begins with `kind`.

    The best, not the median: a roof is what the machine *can* do, and every disturbance only lowers a sample.

    >>> best_rate({"bytes:sum": (3.0, 5.0), "bytes:copy": (4.0,), "flops:matmul": (9.0,)}, "bytes:")
    5.0
    """
    return max(rate for name, rates in samples.items() if name.startswith(kind) for rate in rates)


def _run_probes(
    probes: dict[str, tuple[Callable, int]], seconds: float, device: str | torch.device
) -> dict[str, tuple[float, ...]]:
    rates: dict[str, list[float]] = {name: [] for name in probes}
    for function, _ in probes.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates[next(iter(rates))]) < 5:
        for name, (function, amount) in probes.items():
            rates[name].append(amount / sample_seconds(function, device))
    return {name: tuple(r) for name, r in rates.items()}


def _parse_size(text: str) -> int:
    text = text.strip()
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)
