"""`bench gpu`: the ladder on a GPU, or on a CPU with what it has of it: speed, bandwidth and equality of every rung.

All rungs are timed interleaved, one decoding step at a fixed position. The CUDA half was not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from labutils.acceleration.ladder import NAMES, Device, climb
from labutils.acceleration.memory import DoesNotFit, Need, memory_bytes, memory_guard, what_fits
from labutils.bench.subject import QUALITY_BYTES, Subject
from labutils.bench.table import Row
from labutils.data.corpus import Document, stdlib_documents
from labutils.generation.decode import prefill
from labutils.measurement.ledger import Record
from labutils.measurement.resources import kv_bytes_per_position, weight_bytes_read
from labutils.measurement.roofline import ProbeError, Roofline, measure_roofline, share_of_peak
from labutils.measurement.timing import Timing, measure_interleaved
from labutils.models.evaluate_text import bits_per_byte
from labutils.models.ladder import Accelerated, Equality, accelerate, check_equal

BASE = NAMES[0]
FITS_IN_CACHE = "weights fit into the cache: no share of memory bandwidth"


@dataclass(frozen=True)
class Settings:
    """How much to measure, and where."""

    device: str = "cpu"
    rounds: int = 7
    compile: bool = True


def bench_gpu(subject: Subject, settings: Settings = Settings(), *, say: Callable[[str], None] = print) -> list[Row]:
    """Climbs the ladder and returns a row for each rung; one that the device lacks says why.

    Raises:
        ValueError: If `rounds` is below 5.
    """
    abilities = Device.of(settings.device)
    if not settings.compile:
        abilities = replace(abilities, compiler="it was left out by --no-compile")
    roof = measure_roofline(1.0, device=settings.device)
    say(f"measured: {roof}")
    skipped, rungs, equal = dict(climb(NAMES[-1], abilities)[1]), {}, {}
    for name in (n for n in NAMES if n not in skipped):
        try:
            rungs[name], equal[name] = _on_rung(name, subject, abilities, settings)
            say(f"  {name}: {equal[name]}")
        except DoesNotFit as error:
            skipped[name] = str(error)
            say(f"  {name}: {error}")
    steps = {name: decode_step(rung, subject.token_ids) for name, rung in rungs.items()}
    timings = measure_interleaved(steps, repeats=settings.rounds, warmup=3, device=settings.device)
    return [
        _row(name, subject, roof, rungs[name], equal[name], timings[name])
        if name in rungs
        else Row(technique=name, model=subject.name, threads=torch.get_num_threads(), note=skipped[name])
        for name in NAMES
    ]


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that a decoding step reads, integer codes and their scales included."""
    return weight_bytes_read(model) + sum({b.data_ptr(): b.nbytes for b in model.buffers()}.values())


def decode_step(accelerated: Accelerated, token_ids: Tensor) -> Callable[[], Tensor]:
    """A function that decodes one token after the prompt, always at the same position."""
    length = token_ids.shape[1]
    token_ids = token_ids.to(accelerated.model.device)
    cache = accelerated.cache(positions=length + 1, batch=len(token_ids))
    prefill(accelerated.model, token_ids, cache)
    step, newest = accelerated.stepper(cache, token_ids[:, -1]), token_ids[:, -1].contiguous()

    def run() -> Tensor:
        cache.truncate(length)
        return step(newest)

    return run


def rung_quality(subject: Subject, rung: str) -> float:
    """Bits per byte of a rung's weights, rounded or pruned as the rung has them.

    The arithmetic's own error is bounded by the rung's equality check.
    """
    accelerated = accelerate(subject.model, rung, warn=False)
    if accelerated.plan.weights == "float":
        return subject.bits_per_byte
    documents = [Document(d.name, d.text[:QUALITY_BYTES]) for d in stdlib_documents("validation")]
    context = subject.model.config.max_position_embeddings
    return bits_per_byte(accelerated.twin, subject.tokenizer, documents, context=context)


def as_record(row: Row, subject: Subject, settings: Settings, quality: float) -> Record:
    """The row as the ledger keeps it; `quality` is the rung's own, on weights as it rounds them."""
    plan, _ = climb(row.technique, Device.of(settings.device))
    return Record(
        technique=f"ladder: {row.technique}",
        model=row.model,
        device=settings.device,
        dtype=str(plan.dtype).removeprefix("torch."),
        threads=row.threads,
        prompt_tokens=subject.token_ids.shape[1],
        output_tokens=1,
        samples=row.samples,
        time_per_output_token_s=1 / row.tokens_per_s,
        bytes_moved_per_token=row.bytes_per_token,
        bits_per_byte=quality,
        baseline_bits_per_byte=subject.bits_per_byte,
        chapter="bench gpu",
    )


def _on_rung(name: str, subject: Subject, abilities: Device, settings: Settings) -> tuple[Accelerated, Equality]:
    """The model on a rung, and its equality."""
    ids, device = subject.token_ids, settings.device
    need = Need.of(subject.model, positions=ids.shape[1], batch=len(ids))
    with memory_guard(lambda: what_fits(need, memory_bytes(device)), device=device):
        rung = accelerate(subject.model, name, device=device, abilities=abilities, warn=False)
        return rung, check_equal(rung, ids, prompt=ids.shape[1] // 2)


def _row(name: str, subject: Subject, roof: Roofline, rung: Accelerated, equality: Equality, timing: Timing) -> Row:
    element_bytes = rung.plan.dtype.itemsize
    cached = subject.token_ids.shape[1] * kv_bytes_per_position(rung.model.config, element_bytes=element_bytes)
    row = Row(
        technique=name,
        model=subject.name,
        threads=timing.threads,
        samples=tuple(1 / seconds for seconds in timing.samples_s),
        bytes_per_token=bytes_read(rung.model) + cached,
        agreement=equality.same_tokens,
        note=str(equality),
    )
    if row.bytes_per_token < roof.working_set_bytes / 8:
        return replace(row, note=f"{row.note}; {FITS_IN_CACHE}")
    try:
        rate = row.tokens_per_s * row.bytes_per_token
        return replace(row, bandwidth_share=share_of_peak(rate, roof.bandwidth_bytes_per_s))
    except ProbeError as error:
        return replace(row, note=f"{row.note}; {error}")
