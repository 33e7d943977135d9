"""What reading costs at best: bandwidth probes that run between a benchmark's rounds, and where a token's time goes."""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from labutils.course.bench.table import Row
from labutils.generation.fast_llama import FastLlama
from labutils.measurement.roofline import bandwidth_probes
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import quantile, sample_seconds

Probes = dict[str, tuple[Callable[[], object], int]]  # name: what to run, and the bytes that it moves
SMALLEST_BYTES = 2**26  # less may lie in a core's own cache
LARGEST_BYTES = 2**32  # more tells no more, and a dot product of CUDA takes 2^31 numbers at most


def calls_on(device: str | torch.device) -> int:
    """How many calls make a sample: on a GPU a single one is over before the next launch."""
    return 20 if torch.device(device).type == "cuda" else 1


def probe_bytes(weight_bytes: float) -> int:
    """How much a probe reads that stands beside these weights; 0 where they are too few to speak of memory.

    A size that the cache is said to have tells little on a shared machine, so the probe reads as much as the technique
    does: the next power of the root of 2 below, since less is read at least as fast, and 4 GiB at most.

    >>> probe_bytes(820e6) / 2**20, probe_bytes(23e6), probe_bytes(30e9) / 2**30
    (724.0, 0, 4.0)
    """
    size = min(int(2 ** (math.floor(2 * math.log2(max(weight_bytes, 1))) / 2)), LARGEST_BYTES)
    return size // 2**20 * 2**20 if size >= SMALLEST_BYTES else 0


class BandwidthMeter:
    """Probes of several sizes, whose best rate counts in each round.

    Args:
        sizes: Bytes to read; 0 stands for no probe.
        threads: Thread counts to try.
        more: Further probes of a size.
        device: Whose memory is read.

    Attributes:
        rounds: Size to the best rate of each round, in bytes/s.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        threads: Sequence[int],
        more: Callable[[int], Probes] = lambda size: {},
        device: str | torch.device = "cpu",
    ) -> None:
        self.threads, self.device = threads, device
        self.probes = {
            size: bandwidth_probes(size, device=device, dtype=torch.float32) | more(size)
            for size in sorted(set(sizes) - {0})
        }
        self.rounds: dict[int, list[float]] = {size: [] for size in self.probes}

    def run_round(self) -> None:
        """Runs every probe once with every thread count."""
        for size, probes in self.probes.items():
            rates = []
            for count in self.threads:
                with thread_count(count):
                    rates += [_rate(function, moved, self.device) for function, moved in probes.values()]
            self.rounds[size].append(max(rates))

    def describe(self, size: int) -> str:
        """One line on what was reached."""
        low, middle, high = (quantile(self.rounds[size], q) / 1e9 for q in (0, 0.5, 1))
        return f"bandwidth, {size / 1e6:.0f} MB read: {middle:.1f} GB/s, rounds from {low:.1f} to {high:.1f}"


def _rate(function: Callable[[], object], moved_bytes: int, device: str | torch.device) -> float:
    return moved_bytes / sample_seconds(function, device, calls_on(device))


class _Timed:
    """A fused matrix that notes how long its products take."""

    def __init__(self, matrix: Callable, spent: list[float]) -> None:
        self.matrix, self.spent = matrix, spent

    def __call__(self, x, matvec: str):
        began = time.perf_counter()
        y = self.matrix(x, matvec)
        self.spent.append(time.perf_counter() - began)
        return y


def where_time_goes(fast: FastLlama, token: int, *, tokens: int = 32) -> dict[str, tuple[float, int]]:
    """Profiles decoding: what each kind of matrix takes of a token, and what is left between them.

    Returns:
        Part to (seconds a token, the median over tokens; bytes of its weights). `between the matrices` is the whole
        token less its matrices: norms, attention, gates, Python. A product's timer costs well under a microsecond.
        Packed layers, too, are taken one by one here, so that each can be seen.

    Raises:
        ValueError: If the decoder has no room for so many tokens.
    """
    if tokens > fast.max_length:
        raise ValueError(f"tokens must fit into max_length={fast.max_length}; got {tokens}")
    spent: dict[str, list[float]] = defaultdict(list)
    timed = copy.copy(fast)
    timed.few_tokens = None  # which takes all layers in one call
    kinds = ("qkv", "output", "gate_up", "down")
    timed.layers = [replace(layer, **{k: _Timed(getattr(layer, k), spent[k]) for k in kinds}) for layer in fast.layers]
    timed.head = _Timed(fast.head, spent["head"])
    timed.length = 0
    token_ids, whole = torch.tensor([token]), []
    for _ in range(tokens):
        began = time.perf_counter()
        timed.decode_one_token(token_ids)
        whole.append(time.perf_counter() - began)
    sizes = {kind: sum(getattr(layer, kind).nbytes for layer in fast.layers) for kind in kinds}
    sizes["head"] = fast.head.nbytes
    parts = {kind: (_a_token(spent[kind], tokens), size) for kind, size in sizes.items()}
    matrices = [sum(its) for its in zip(*(_by_token(spent[kind], tokens) for kind in sizes), strict=True)]
    rest = [all_ - its for all_, its in zip(whole, matrices, strict=True)]
    return parts | {"between the matrices": (quantile(rest, 0.5), 0), "whole token": (quantile(whole, 0.5), 0)}


def _by_token(seconds: list[float], tokens: int) -> list[float]:
    each = len(seconds) // tokens
    return [sum(seconds[i * each : (i + 1) * each]) for i in range(tokens)]


def _a_token(seconds: list[float], tokens: int) -> float:
    return quantile(_by_token(seconds, tokens), 0.5)


def report_time(fast: FastLlama, token: int, row: Row) -> str:
    """Where a token's time goes in a measured technique, with its own number of threads, beside its bandwidth."""
    tokens = min(32, fast.max_length)
    with thread_count(row.threads):
        parts = where_time_goes(fast, token, tokens=tokens)
    share = row.bandwidth_share
    peak = share and row.tokens_per_s * row.bytes_per_token / share
    head = f"where a token's time goes in {row.technique}, {row.threads} threads, the median of {tokens} tokens"
    return "\n".join(["", head, *describe_time(parts, peak)])


def describe_time(parts: dict[str, tuple[float, int]], bandwidth_bytes_per_s: float | None) -> list[str]:
    """The profile as lines, each part with its share of the token and the rate at which its weights were read."""
    whole, lines = parts["whole token"][0], []
    for name, (seconds, size) in parts.items():
        rate = f" {size / 1e6:6.1f} MB at {size / seconds / 1e9:5.1f} GB/s" if size else ""
        lines.append(f"  {name:<22}{seconds * 1e3:8.3f} ms {seconds / whole:>5.0%}{rate}")
    if bandwidth_bytes_per_s:
        floor = sum(size for _, size in parts.values()) / bandwidth_bytes_per_s
        lines.append(f"  {'at measured bandwidth':<22}{floor * 1e3:8.3f} ms {floor / whole:>5.0%}")
    return lines
