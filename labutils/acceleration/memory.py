"""Will it fit? Weights, cache and batch by arithmetic, and an out-of-memory error that leaves the device usable."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from labutils.measurement.limits import memory_limit_bytes
from labutils.measurement.resources import kv_bytes_per_position

RESERVE = 0.08  # of a device: its context, the allocator's rounding, activations of a step
LINE_BYTES = 64  # a CPU's cache line


class DoesNotFit(RuntimeError):
    """A model, a cache or a batch was larger than the device's memory; the message says what would fit."""


@dataclass(frozen=True)
class Need:
    """Bytes of a decoding model: weights once, the cache for each text.

        total = parameters · bits / 8 + batch · positions · bytes per position

    >>> llama2 = Need(parameters=6.74e9, weight_bits=16, position_bytes=2**19, positions=4096, batch=1)
    >>> round(llama2.weight_bytes / 1e9, 2), round(llama2.cache_bytes / 1e9, 2)
    (13.48, 2.15)
    """

    parameters: float
    weight_bits: float
    position_bytes: int
    positions: int
    batch: int = 1

    def __post_init__(self) -> None:
        smallest = min(self.parameters, self.weight_bits, self.position_bytes, self.positions, self.batch)
        if smallest <= 0:
            raise ValueError(f"every size must be positive; got {smallest}")

    @classmethod
    def of(cls, model: torch.nn.Module, *, positions: int, batch: int = 1) -> Need:
        """What a Hugging Face model needs in its own dtype; tied weights count once."""
        parameter = next(model.parameters())
        size = parameter.element_size()
        count = sum(p.numel() for p in model.parameters())
        return cls(count, 8 * size, kv_bytes_per_position(model.config, element_bytes=size), positions, batch)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights."""
        return self.parameters * self.weight_bits / 8

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of all sequences."""
        return self.batch * self.positions * self.position_bytes

    @property
    def total_bytes(self) -> float:
        """Weights and caches."""
        return self.weight_bytes + self.cache_bytes

    def largest_batch(self, memory_bytes: float) -> int:
        """How many sequences of this length fit beside the weights; 0 where not even one does."""
        free = usable(memory_bytes) - self.weight_bytes
        return max(int(free // (self.positions * self.position_bytes)), 0)

    def longest_text(self, memory_bytes: float) -> int:
        """How many positions each text of the batch may have; 0 where the weights alone are too large."""
        free = usable(memory_bytes) - self.weight_bytes
        return max(int(free // (self.batch * self.position_bytes)), 0)

    def fitting_bits(self, memory_bytes: float) -> int | None:
        """The largest of 16, 8 and 4 bits a weight that fits beside these caches; None where none does."""
        free = usable(memory_bytes) - self.cache_bytes
        return next((bits for bits in (16, 8, 4) if self.parameters * bits / 8 <= free), None)


def usable(memory_bytes: float) -> float:
    """What is left for weights and caches once the reserve is taken off."""
    return memory_bytes * (1 - RESERVE)


def what_fits(need: Need, memory_bytes: float) -> str:
    """The arithmetic in one sentence each: what is asked for, what is there, and what would fit."""
    lines = [
        f"asked for: {need.weight_bytes / 1e9:.2f} GB of weights + {need.cache_bytes / 1e9:.2f} GB of cache "
        f"({need.batch} x {need.positions} positions) = {need.total_bytes / 1e9:.2f} GB; "
        f"usable: {usable(memory_bytes) / 1e9:.2f} GB"
    ]
    if need.total_bytes <= usable(memory_bytes):
        return f"{lines[0]}: it fits"
    batch, text = need.largest_batch(memory_bytes), need.longest_text(memory_bytes)
    bits = need.fitting_bits(memory_bytes)
    lines += [f"would fit: a batch of {batch} at this length"] if batch else []
    lines += [f"would fit: {text} positions at this batch"] if text else []
    lines += [f"would fit: {bits}-bit weights"] if bits and bits < need.weight_bits else []
    lines += _two_changes(need, memory_bytes) if len(lines) == 1 else []
    return "; ".join(lines if len(lines) > 1 else [*lines, "would fit: a smaller model only"])


def _two_changes(need: Need, memory_bytes: float) -> list[str]:
    """Smaller weights and a smaller batch, or one shorter text, where no change alone is enough."""
    found = []
    for bits in (b for b in (8, 4) if b < need.weight_bits):
        lighter = replace(need, weight_bits=bits)
        batch, text = lighter.largest_batch(memory_bytes), replace(lighter, batch=1).longest_text(memory_bytes)
        rest = f"a batch of {batch} at this length" if batch else f"one text of {text} positions"
        found += [f"would fit: {bits}-bit weights and {rest}"] if batch or text else []
    return found


def channels_bytes_per_s(channels: int, transfers_per_s: float) -> float:
    """What memory channels carry at most, in bytes/s: 64 bits at each transfer (DDR4-3200: 3.2e9 transfers a second).

    Raises:
        ValueError: For a number that is not positive.

    >>> channels_bytes_per_s(2, 3.2e9)
    51200000000.0
    """
    if min(channels, transfers_per_s) <= 0:
        raise ValueError(f"channels and transfers_per_s must be positive; got {channels} and {transfers_per_s}")
    return channels * transfers_per_s * 8


def threads_to_saturate(channels: int, transfers_per_s: float, lines: int, latency_s: float) -> int:
    """How many threads fill the memory channels, when each waits for a few cache lines at once.

        ceil(channels · transfers/s · 8 / (lines · 64 / latency))

    Little's law (Little 1961): what is on its way = rate · time on the way.

    Raises:
        ValueError: For a size that is not positive.

    >>> threads_to_saturate(2, 3.2e9, 12, 80e-9)
    6
    """
    if min(lines, latency_s) <= 0:
        raise ValueError(f"lines and latency_s must be positive; got {lines} and {latency_s}")
    return math.ceil(channels_bytes_per_s(channels, transfers_per_s) / (lines * LINE_BYTES / latency_s))


def memory_bytes(device: str | torch.device = "cpu") -> int:
    """All memory of a device: a GPU's own, or what this process' container may use of the host's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    total = psutil.virtual_memory().total
    return min(total, memory_limit_bytes() or total)


@contextmanager
def memory_guard(explain: Callable[[], str], *, device: str | torch.device = "cpu") -> Iterator[None]:
    """Turns "out of memory" into `DoesNotFit` with an explanation, after everything of the block was let go.

    The error's traceback keeps every frame, and every frame keeps its tensors: catching it frees nothing. So the
    frames are cleared, the garbage is collected, and CUDA's cached blocks are handed back.

    Raises:
        DoesNotFit: in place of PyTorch's OutOfMemoryError; other errors pass.
    """
    message = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    if message is not None:
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        raise DoesNotFit(f"{message} {explain()}")
