"""Where the time of our engine goes: matrices, attention, head, sampling and scheduler, as shares of a job."""

import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import numpy as np

from labutils.course.bench.serving_engines import Ours, drive
from labutils.generation.fast_llama import FastLlama


def profile(ours: Ours, job: dict) -> dict[str, float]:
    """Runs a job with clocks around the engine's parts and returns each part's share of the time.

    The matrices are timed afterwards, alone and with as many rows as each step had, since packed layers run in one call
    into C. What the layers took beyond that is attention, norms and the cache: 0 where calls one by one take longer.
    """
    engine, spent, rows = ours.engine, Counter(), Counter()
    model, scheduler = engine.model, engine.scheduler

    def read(step):
        rows[sum(chunk.end - chunk.start for chunk in step.chunks)] += 1
        return plain(step)

    plain = model.read
    clocked = {(model, "read"): read, (model, "logits"): model.logits}
    clocked |= {(scheduler, name): getattr(scheduler, name) for name in ("schedule", "complete")}
    clocked[engine, "_compute"] = engine._compute
    for (owner, name), function in clocked.items():
        setattr(owner, name, _clocked(function, name, spent))
    try:
        began = time.perf_counter()
        drive(ours, job)
        total = time.perf_counter() - began
    finally:
        for owner, name in clocked:
            delattr(owner, name)
    matrices = sum(matrices_s(model.decoder, count) * steps for count, steps in rows.items())
    parts = {
        "matrices": min(matrices, spent["read"]),
        "attention, norms, cache": max(spent["read"] - matrices, 0.0),
        "head": spent["logits"],
        "sampling": spent["_compute"] - spent["read"] - spent["logits"],
        "scheduler": spent["schedule"] + spent["complete"],
    }
    return {name: seconds / total for name, seconds in parts.items()}


def _clocked(function: Callable, name: str, spent: Counter) -> Callable:
    def run(*arguments):
        began = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spent[name] += time.perf_counter() - began

    return run


def matrices_s(decoder: FastLlama, rows: int) -> float:
    """Median seconds of all layers' matrices for so many rows."""
    width, samples = decoder.hidden.shape[1], []
    for _ in range(4):
        began = time.perf_counter()
        for layer in decoder.layers:
            x = np.ones((rows, width), np.float32)
            qkv = layer.qkv(x, decoder.matvec)
            heads = np.ascontiguousarray(qkv[:, : qkv.shape[1] - 2 * decoder.keys.shape[1] * decoder.keys.shape[3]])
            layer.output(heads, decoder.matvec)
            gate_up = layer.gate_up(x, decoder.matvec)
            layer.down(np.ascontiguousarray(gate_up[:, : gate_up.shape[1] // 2]), decoder.matvec)
        samples.append(time.perf_counter() - began)
    return median(samples[1:])
