"""`bench gpu`: the ladder on a GPU, or on a CPU with what it has of it: speed, bandwidth and equality of every rung.

All rungs are timed interleaved, one decoding step at a fixed position; beside them stand low precision by itself,
transformers and torchao. The CUDA half was not run on a GPU.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from labutils.acceleration.ladder import NAMES, Device, climb
from labutils.acceleration.memory import DoesNotFit, Need, memory_bytes, memory_guard, what_fits
from labutils.course.bench import gpu_peers
from labutils.course.bench.bandwidth import BandwidthMeter, calls_on, probe_bytes
from labutils.course.bench.subject import QUALITY_BYTES, Subject
from labutils.course.bench.table import Row
from labutils.generation.decode import prefill
from labutils.lab.data.corpus import Document, stdlib_documents
from labutils.lab.models.evaluate_text import bits_per_byte
from labutils.lab.models.ladder import Accelerated, Equality, accelerate, check_equal, twin_of
from labutils.measurement.ledger import Record
from labutils.measurement.resources import kv_bytes_per_position, stored_buffers, weight_bytes_read
from labutils.measurement.roofline import ProbeError, measure_roofline, share_of_peak
from labutils.measurement.threads import available_cores, best_thread_count, thread_candidates, thread_count
from labutils.measurement.timing import Timing, measure, measure_interleaved, quantile

BASE = NAMES[0]
PREFILL_TOKENS = 512
WARMUP = 2  # rounds before those that count
FITS_IN_CACHE = "weights fit into the cache: no share of memory bandwidth"


@dataclass(frozen=True)
class Settings:
    """How much to measure, and where; the best number of threads is found by measuring unless given.

    Of a model too large for all rungs together, `at_once` are held and timed beside the base, then let go for the next,
    and each such group of rows begins with a base of its own; 0 takes all together.
    """

    device: str = "cpu"
    rounds: int = 7
    compile: bool = True
    threads: int | None = None
    peers: bool = True
    at_once: int = 0


@dataclass
class _Field:
    """Who takes part, and the reasons of those who do not."""

    rungs: dict[str, Accelerated] = field(default_factory=dict)
    equal: dict[str, Equality] = field(default_factory=dict)
    others: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def bench_gpu(subject: Subject, settings: Settings = Settings(), *, say: Callable[[str], None] = print) -> list[Row]:
    """Climbs the ladder and returns a row for each rung and each peer; one that cannot run here says why.

    Raises:
        ValueError: If `rounds` is below 5.
    """
    abilities = Device.of(settings.device)
    if not settings.compile:
        abilities = replace(abilities, compiler="it was left out by --no-compile")
    threads = _best_threads(subject, settings, say)
    rows: list[Row] = []
    with thread_count(threads):
        for group in groups((*NAMES, *(gpu_peers.NAMES if settings.peers else ())), settings.at_once):
            found = _take_part(group, subject, abilities, settings, say)
            timings, meter = _measure(found, subject, settings)
            for size in meter.probes if settings.device == "cpu" else ():
                say(f"  {meter.describe(size)}")
            rows += [
                _row(name, subject, found, timings, meter)
                if name in timings
                else Row(technique=name, model=subject.name, threads=threads, note=found.skipped[name])
                for name in group
            ]
            del found, meter
            gc.collect()  # the models, before the next ones are made
        say(prefill_share(subject, abilities, settings))
    return rows


def groups(names: Sequence[str], at_once: int) -> list[tuple[str, ...]]:
    """The base with each `at_once` of the other names; with 0, all of them together.

    >>> groups(("fp32", "sdpa", "int8", "int4"), 2)
    [('fp32', 'sdpa', 'int8'), ('fp32', 'int4')]
    """
    base, *others = names
    at_once = at_once or len(others)
    return [(base, *others[i : i + at_once]) for i in range(0, len(others), at_once)]


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that a decoding step reads, integer codes and their scales included."""
    stored = {buffer.data_ptr() for buffer in stored_buffers(model)}  # which weight_bytes_read counts
    extra = sum({b.data_ptr(): b.nbytes for b in model.buffers() if b.data_ptr() not in stored}.values())
    for weight in model.parameters():
        if hasattr(weight, "__tensor_flatten__"):  # torchao's: a tensor that holds codes, and calls itself a float
            parts = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
            extra += sum(part.nbytes for part in parts) - weight.numel() * weight.element_size()
    return weight_bytes_read(model) + extra


def decode_step(accelerated: Accelerated, token_ids: Tensor) -> Callable[[], Tensor]:
    """A function that decodes one token after the prompt, always at the same position."""
    length = token_ids.shape[1]
    token_ids = token_ids.to(accelerated.model.device)
    cache = accelerated.cache(positions=length + 1, batch=len(token_ids))
    prefill(accelerated.model, token_ids, cache)
    step, newest = accelerated.stepper(cache, token_ids[:, -1]), token_ids[:, -1].contiguous()
    back = getattr(cache, "restart", cache.truncate)  # which does not wait for the device, where there is a choice

    def run() -> Tensor:
        back(length)
        return step(newest)

    return run


def prefill_share(subject: Subject, abilities: Device, settings: Settings) -> str:
    """One line on reading a prompt in the fastest float format: its rate, and what that is of square products' peak."""
    plan, _ = climb("bf16", abilities)
    rung = accelerate(subject.model, "static cache", device=settings.device, abilities=abilities, warn=False)
    tokens = min(PREFILL_TOKENS, subject.model.config.max_position_embeddings)
    ids = torch.randint(subject.model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids, cache = ids.to(settings.device), rung.cache(positions=tokens)

    def run() -> Tensor:
        cache.truncate(0)
        return prefill(rung.model, ids, cache)

    timing = measure(run, repeats=max(settings.rounds, 5), warmup=1, device=settings.device)
    head = subject.model.get_output_embeddings().weight.numel()  # makes the logits of one position only
    flop = 2 * tokens * (weight_bytes_read(subject.model) / 4 - head) + 2 * head
    peak = measure_roofline(1.0, device=settings.device, dtype=plan.dtype).flops_per_s
    rate, form = flop / timing.median_s, str(plan.dtype).removeprefix("torch.")
    return (
        f"  prefill of {tokens} tokens, {form}: {timing.median_s * 1e3:.1f} ms, {rate / 1e9:.0f} GFLOP/s, "
        f"{rate / peak:.0%} of the {peak / 1e9:.0f} GFLOP/s that square products reached"
    )


def rung_quality(subject: Subject, rung: str, abilities: Device) -> float:
    """Bits per byte of a rung's weights, rounded or pruned as the rung has them on this device.

    The arithmetic's own error is bounded by the rung's equality check.
    """
    plan, _ = climb(rung, abilities)
    if plan.weights == "float":
        return subject.bits_per_byte
    documents = [Document(d.name, d.text[:QUALITY_BYTES]) for d in stdlib_documents("validation")]
    context = subject.model.config.max_position_embeddings
    return bits_per_byte(twin_of(subject.model, plan.weights), subject.tokenizer, documents, context=context)


def as_record(row: Row, subject: Subject, settings: Settings, quality: float) -> Record:
    """A rung's row as the ledger keeps it; `quality` is the rung's own, on weights as it rounds them."""
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


def ladder_files(folder: Path) -> list[Path]:
    """What `bench gpu --json` wrote into a folder, whatever the files' names: their first row is the first rung's."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline() or "{}")
        found += [path] if first.get("technique") == BASE and "samples" in first else []
    return found


def read_ladders(path: Path) -> dict[str, dict[str, Timing]]:
    """What `bench gpu --json FILE.jsonl` wrote: for each model and group, the timing of each technique that ran."""
    found: dict[str, dict[str, Timing]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if row["technique"] == BASE:
            begun = sum(1 for name in found if name.split(", group ")[0] == row["model"])
            title = f"{row['model']}, group {begun + 1}" if begun else row["model"]
        if row["samples"]:
            device = row["host"]["gpu"] or row["host"]["cpu"]
            seconds = tuple(1 / speed for speed in row["samples"])
            timing = Timing(row["technique"], seconds, WARMUP, device, row["threads"])
            found.setdefault(title, {})[row["technique"]] = timing
    return found


def _best_threads(subject: Subject, settings: Settings, say: Callable[[str], None]) -> int:
    """The number of threads for all rungs, and a line for each candidate on what the machine does with it."""
    on_cpu = settings.device == "cpu"
    counts = thread_candidates(available_cores()) if on_cpu else (torch.get_num_threads(),)
    for count in (settings.threads,) if settings.threads else counts:
        with thread_count(count):
            say(f"measured: {measure_roofline(1.0, device=settings.device)}")
    if settings.threads or len(counts) == 1:
        return settings.threads or counts[0]
    choice = best_thread_count(decode_step(accelerate(subject.model, BASE), subject.token_ids), candidates=counts)
    say(f"  {BASE}, a step: {choice}")
    return choice.threads


def _take_part(names: Sequence[str], subject: Subject, abilities: Device, settings: Settings, say: Callable) -> _Field:
    """Puts the model on every named rung and peer's path, and holds each against its twin."""
    found = _Field(skipped=dict(climb(NAMES[-1], abilities)[1]))
    device = settings.device

    def decoder(name: str) -> Accelerated:
        if name in NAMES:
            return accelerate(subject.model, name, device=device, abilities=abilities, warn=False)
        return gpu_peers.decoder(name, subject, abilities, device)

    def enter(name: str) -> str:
        if name in gpu_peers.TRANSFORMERS:
            calls = gpu_peers.generators(name, subject, abilities, device)
            next(iter(calls.values()))()  # what fails, fails here
            found.others |= calls
            return "runs"
        found.rungs[name], found.equal[name] = _checked(lambda: decoder(name), subject, device)
        return str(found.equal[name])

    for name in names:
        if name in found.skipped:
            continue
        try:
            say(f"  {name}: {enter(name)}")
        except DoesNotFit as error:
            found.skipped[name] = str(error)
        except Exception as error:  # a package that is missing, a format that is not supported: a row that says so
            if name in NAMES:
                raise
            found.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if name in found.skipped:
            say(f"  {name}: {found.skipped[name]}")
    return found


def _checked(make: Callable[[], Accelerated], subject: Subject, device: str) -> tuple[Accelerated, Equality]:
    """The model on a rung, and its equality."""
    ids = subject.token_ids
    need = Need.of(subject.model, positions=ids.shape[1], batch=len(ids))
    with memory_guard(lambda: what_fits(need, memory_bytes(device)), device=device):
        equality = check_equal(rung := make(), ids, prompt=ids.shape[1] // 2)
    rung.twin = subject.model  # of 8B, one more copy for each rung would not fit into the host
    return rung, equality


def _measure(found: _Field, subject: Subject, settings: Settings) -> tuple[dict[str, Timing], BandwidthMeter]:
    """Interleaves all steps, all calls of `generate`, and probes that read as many bytes.

    On a GPU a sample of a step is 20 of them, and a step's time their mean.
    """
    sizes = [probe_bytes(bytes_read(rung.model)) for rung in found.rungs.values()]
    meter = BandwidthMeter(sizes, threads=[torch.get_num_threads()], device=settings.device)
    calls = calls_on(settings.device)
    steps = {name: _times(calls, decode_step(rung, subject.token_ids)) for name, rung in found.rungs.items()}
    functions = steps | found.others | {"bandwidth": meter.run_round}
    timings = measure_interleaved(functions, repeats=settings.rounds, warmup=WARMUP, device=settings.device)
    for name in steps:
        timings[name] = replace(timings[name], samples_s=tuple(s / calls for s in timings[name].samples_s))
    meter.rounds = {size: rates[WARMUP:] for size, rates in meter.rounds.items()}  # without the warm-up, as the timings
    for name in set(found.others) & set(gpu_peers.NAMES):
        seconds = gpu_peers.seconds_per_token(timings[name].samples_s, timings[f"{name}, {gpu_peers.FIRST}"].samples_s)
        timings[name] = replace(timings[name], samples_s=seconds)
    return timings, meter


def _times(calls: int, step: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            step()

    return run


def _row(name: str, subject: Subject, found: _Field, timings: dict[str, Timing], meter: BandwidthMeter) -> Row:
    timing = timings[name]
    speeds = tuple(1 / seconds for seconds in timing.samples_s)
    row = Row(technique=name, model=subject.name, threads=timing.threads, samples=speeds)
    if name not in found.rungs:
        return replace(row, note=f"per token of {gpu_peers.MORE}, with its own loop around each step")
    model, equality = found.rungs[name].model, found.equal[name]
    element_bytes = found.rungs[name].plan.dtype.itemsize
    moved = bytes_read(model) + subject.token_ids.shape[1] * kv_bytes_per_position(
        model.config, element_bytes=element_bytes
    )
    row = replace(row, bytes_per_token=moved, agreement=equality.same_tokens, note=str(equality))
    peaks: Sequence[float] | None = meter.rounds.get(probe_bytes(bytes_read(model)))
    if peaks is None:
        return replace(row, note=f"{row.note}; {FITS_IN_CACHE}")
    try:
        share = quantile([speed * moved / peak for speed, peak in zip(speeds, peaks, strict=True)], 0.5)
        return replace(row, bandwidth_share=share_of_peak(share, 1.0))
    except ProbeError as error:
        return replace(row, note=f"{row.note}; {error}")
