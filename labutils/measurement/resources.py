"""What a run costs besides time: peak memory, and the bytes that one token makes the machine read."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from labutils.lab.layers.architecture import layer_caches
from labutils.measurement.limits import PROC_SELF, status_bytes

NOT_MEASURED = "not measured"


@dataclass
class PeakMemory:
    """High-water marks of a region, in bytes; None means "not measured". Filled when the region ends."""

    host_bytes: int | None = None
    host_source: str = NOT_MEASURED
    cuda_bytes: int | None = None

    def __str__(self) -> str:
        parts = [f"host {_megabytes(self.host_bytes)} ({self.host_source})"]
        return ", ".join(parts + ([f"cuda {_megabytes(self.cuda_bytes)}"] if self.cuda_bytes is not None else []))


@contextmanager
def peak_memory(proc: Path = PROC_SELF) -> Iterator[PeakMemory]:
    """Measures the peak resident memory of the whole process inside a `with` block, and CUDA's peak.

    Linux keeps a high-water mark (`VmHWM`) that writing 5 to `clear_refs` resets (proc(5)), so the peak is
    exact. Elsewhere the mark of `getrusage` only ever grows: it counts when the block raised it, and is
    "not measured" when it did not.

    >>> with peak_memory() as peak:
    ...     _ = bytearray(1000)
    >>> peak.cuda_bytes is None or peak.cuda_bytes >= 0
    True
    """
    peak = PeakMemory()
    resettable = _reset_high_water(proc)
    before = None if resettable else _rusage_peak_bytes()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield peak
    finally:
        if torch.cuda.is_available():
            peak.cuda_bytes = torch.cuda.max_memory_allocated()
        if resettable:
            peak.host_bytes, peak.host_source = status_bytes("VmHWM", proc), "VmHWM, reset at entry"
        elif before is not None and (after := _rusage_peak_bytes()) > before:
            peak.host_bytes, peak.host_source = after, "ru_maxrss, raised inside the region"


def weight_bytes_read(model: torch.nn.Module) -> int:
    """Returns the bytes of weights that one decoding step reads.

    That is every parameter and every stored buffer (packed codes, scales) except embedding tables, of which a step
    reads a single row, unless the output layer shares the table (tied embeddings) and so reads all of it. Dense
    models only: a mixture of experts reads fewer.

    >>> embedding, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    >>> weight_bytes_read(torch.nn.Sequential(embedding, head))
    176
    """
    tables = {id(m.weight): m for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    shared = {id(p) for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)}
    total = 0
    for parameter in model.parameters():
        row_only = id(parameter) in tables and id(parameter) not in shared
        total += (parameter.shape[-1] if row_only else parameter.numel()) * parameter.element_size()
    return total + sum(buffer.numel() * buffer.element_size() for buffer in stored_buffers(model))


def stored_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """The buffers that a checkpoint would hold, each once: codes and scales, but no tables made anew at each start."""
    found = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return list(found.values())


def kv_bytes_per_position(config, *, element_bytes: int = 4) -> int:
    """Returns the KV cache's bytes per position: 2 (key, value) x layers x KV heads x head size x element.

    Grouped-query attention stores `num_key_value_heads`, not `num_attention_heads`. Where a configuration does not say
    what is stored (multi-query, latent attention), it is measured on one token (`layer_caches`).

    Raises:
        ValueError: Where no such number exists: layers with a sliding window, for which `kv_cache_bytes` counts, or
            with other states than keys and values.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    >>> kv_bytes_per_position(config)
    6144
    """
    windows = {layer.window for layer in layer_caches(config)} - {None}
    if windows:
        rule = "only layers that keep every position have bytes per position (kv_cache_bytes counts the others)"
        raise ValueError(f"{rule}; got {type(config).__name__}, which keeps {min(windows)} positions in some layers")
    return kv_cache_bytes(config, 1, element_bytes=element_bytes)


def kv_cache_bytes(config, positions: int, *, element_bytes: int = 4) -> int:
    """Returns the KV cache's bytes after `positions` tokens; a layer with a sliding window keeps window − 1 of them.

    >>> from transformers import MistralConfig
    >>> sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    >>> config = MistralConfig(**sizes, sliding_window=8)
    >>> kv_cache_bytes(config, 5), kv_cache_bytes(config, 24), 2 * 2 * 2 * 16 * 4 * 7
    (2560, 3584, 3584)

    Raises:
        ValueError: If `positions` is negative, or a layer keeps other states than keys and values.
    """
    if positions < 0:
        raise ValueError(f"positions must not be negative; got {positions}")
    return element_bytes * sum(layer.numbers(positions) for layer in layer_caches(config))


def _reset_high_water(proc: Path) -> bool:
    try:
        (proc / "clear_refs").write_text("5")
        return status_bytes("VmHWM", proc) is not None
    except OSError:
        return False


def _rusage_peak_bytes() -> int | None:
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _megabytes(amount: int | None) -> str:
    return NOT_MEASURED if amount is None else f"{amount / 1e6:.0f} MB"
