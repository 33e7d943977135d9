"""`bench decode`: every decoding path and `transformers.generate`, interleaved in one run.

A round runs every technique once, so that all of them meet the same disturbances. A clock ticks when a token's logits
are ready: the first tick ends prefill, the others time decoding, for our loops and for other people's alike.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from labutils.course.bench.bandwidth import BandwidthMeter, probe_bytes, report_time
from labutils.course.bench.subject import Subject
from labutils.course.bench.table import Row
from labutils.generation import decode
from labutils.generation.fast_llama import MATVECS, SUPPORTED, FastLlama
from labutils.generation.sampling import greedy
from labutils.measurement.ledger import Record
from labutils.measurement.resources import kv_bytes_per_position
from labutils.measurement.roofline import ProbeError, share_of_peak
from labutils.measurement.threads import (
    available_cores,
    best_thread_count,
    sets_numpy_threads,
    thread_candidates,
    thread_count,
)
from labutils.measurement.timing import measure_interleaved, quantile

REFERENCE = "transformers.generate"
PLAIN = "plain fp32"
BATCH = 4
NAIVE_TOKENS, LARGE_BYTES = 8, 2e8  # without a cache a large model takes a second a token


@dataclass
class Clock:
    """Notes the time at each token's logits; stands in for `greedy` and for a logits processor."""

    ticks: list[float] = field(default_factory=list)

    def __call__(self, logits: Tensor) -> Tensor:
        """As `choose`: greedy."""
        self.tick()
        return greedy(logits)

    def processor(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor of `transformers`: changes nothing."""
        self.tick()
        return scores

    def tick(self) -> None:
        """A token's logits are ready."""
        self.ticks.append(time.perf_counter())


@dataclass(frozen=True)
class Technique:
    """A way to decode: given a clock, makes 1 + new_tokens tokens and returns them (batch, prompt + new).

    `missing` says why it cannot run here; `bytes_per_weight` differs for quantized weights.
    """

    name: str
    run: Callable[[Clock], Tensor] | None = None
    batch: int = 1
    bytes_per_weight: float = 4.0
    missing: str = ""


@dataclass(frozen=True)
class Settings:
    """How much to measure, and a Python that has vLLM."""

    new_tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    compile: bool = True
    peers: bool = True
    vllm: str = ""


def bench_decode(subject: Subject, settings: Settings = Settings(), *, say: Callable[[str], None] = print) -> list[Row]:
    """Measures every technique on one model and returns a row for each.

    Raises:
        ValueError: If `rounds` is below 5 or no new token is asked for.
    """
    if settings.new_tokens < 2:
        raise ValueError(
            f"decoding is timed between tokens, so new_tokens must be at least 2; got {settings.new_tokens}"
        )
    rows = bench_techniques(our_techniques(subject, settings), subject, settings, reference=REFERENCE, say=say)
    profile_fastest(rows, subject, say)
    return rows


def profile_fastest(rows: Sequence[Row], subject: Subject, say: Callable[[str], None]) -> None:
    """Says where the time of a token goes in the faster of our plain paths."""
    plain = [row for row in rows if row.technique.startswith(PLAIN) and row.samples]
    if not plain:
        return
    best = max(plain, key=lambda row: row.tokens_per_s)
    matvec = next(m for m in MATVECS if m in best.technique)
    fast = FastLlama(subject.model, max_length=32, matvec=matvec)
    say(report_time(fast, int(subject.token_ids[0, -1]), best))


def bench_techniques(
    techniques: Sequence[Technique],
    subject: Subject,
    settings: Settings,
    *,
    reference: str,
    say: Callable[[str], None],
) -> list[Row]:
    """Measures techniques interleaved; tokens are compared with those of the technique named `reference`."""
    techniques = [_proved(t, say) for t in techniques]
    able = [t for t in techniques if not t.missing]
    threads = {t.name: settings.threads or _best_threads(t, say) for t in able}
    sizes = {t.name: probe_bytes(subject.weight_bytes * t.bytes_per_weight / 4) for t in able}
    candidates = thread_candidates(settings.threads or available_cores())
    meter = BandwidthMeter(list(sizes.values()), threads=candidates)
    ticks, outputs = _measure(able, threads, settings, meter)
    for size in meter.probes:
        say(f"  {meter.describe(size)}")
    rows = []
    for t in techniques:
        row = Row(technique=t.name, model=subject.name, threads=threads.get(t.name, 0), batch=t.batch, note=t.missing)
        if not t.missing:
            peaks = meter.rounds.get(sizes[t.name])
            row = _filled(row, t, ticks[t.name], outputs[t.name], outputs[reference], peaks, subject)
        rows.append(row)
    return rows


def our_techniques(subject: Subject, settings: Settings) -> list[Technique]:
    """Our paths from naive to fast, and `transformers.generate`."""
    model, ids, count = subject.model, subject.token_ids, settings.new_tokens + 1
    prompts = ids.repeat(BATCH, 1).tolist()
    few = min(count, NAIVE_TOKENS + 1) if subject.weight_bytes > LARGE_BYTES else count
    found = [
        Technique("no cache", lambda c: decode.generate_naive(model, ids, few, choose=c)),
        Technique("growing KV cache", lambda c: decode.generate_cached(model, ids, count, choose=c)),
        Technique("static KV cache", lambda c: decode.generate_static(model, ids, count, choose=c)),
        Technique(
            "left-padded batch",
            lambda c: decode.generate_batch(model, prompts, count, pad_token_id=0, choose=c),
            batch=BATCH,
        ),
    ]
    if settings.compile:
        found.append(Technique("compiled", lambda c: decode.generate_compiled(model, ids, count, choose=c)))
    if model.config.model_type in SUPPORTED:
        fast = FastLlama(model, max_length=ids.shape[1] + count, matvec=MATVECS[0])
        found += [Technique(f"{PLAIN}, {m} matvec", lambda c, m=m: _plain(fast, m, ids, count, c)) for m in MATVECS]
    found = [_with_known_threads(t) for t in found]
    return [*found, Technique(REFERENCE, lambda c: _transformers(subject, count, c))]


def as_record(row: Row, subject: Subject, settings: Settings) -> Record:
    """The row as the ledger keeps it; it needs a quality there."""
    time_per_token = row.batch / row.tokens_per_s
    return Record(
        technique=row.technique,
        model=row.model,
        device=str(subject.model.device),
        dtype=str(subject.model.dtype).removeprefix("torch."),
        threads=row.threads,
        prompt_tokens=subject.token_ids.shape[1],
        output_tokens=settings.new_tokens,
        batch=row.batch,
        samples=row.samples,
        time_to_first_token_s=row.time_to_first_token_s,
        time_per_output_token_s=time_per_token,
        bytes_moved_per_token=row.bytes_per_token,
        bits_per_byte=row.quality,
        baseline_bits_per_byte=subject.bits_per_byte,
        chapter="bench decode",
    )


def _with_known_threads(technique: Technique) -> Technique:
    """A thread count that cannot be set cannot be stated either."""
    if "numpy" not in technique.name or sets_numpy_threads():
        return technique
    return replace(technique, run=None, missing="NumPy's threads cannot be set: pip install threadpoolctl")


def _plain(fast: FastLlama, matvec: str, ids: Tensor, count: int, clock: Clock) -> Tensor:
    fast.matvec = matvec
    return fast.generate(ids, count, choose=clock)


def _transformers(subject: Subject, count: int, clock: Clock) -> Tensor:
    config = copy.deepcopy(subject.model.generation_config)
    config.update(max_new_tokens=count, min_new_tokens=None, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = subject.token_ids
    return subject.model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=[clock.processor]
    )


def _proved(technique: Technique, say: Callable[[str], None]) -> Technique:
    """Runs a technique once: what fails here (no compiler, say) becomes a row that says why."""
    if technique.missing:
        return technique
    began = time.perf_counter()
    try:
        technique.run(Clock())
    except Exception as error:
        return replace(technique, run=None, missing=f"{type(error).__name__}: {error}".splitlines()[0][:120])
    say(f"  {technique.name}: first run {time.perf_counter() - began:.1f} s")
    return technique


def _best_threads(technique: Technique, say: Callable[[str], None]) -> int:
    candidates = thread_candidates(available_cores())
    if len(candidates) == 1:
        return candidates[0]
    choice = best_thread_count(lambda: technique.run(Clock()), candidates=candidates)
    say(f"  {technique.name}: {choice}")
    return choice.threads


def _measure(able: Sequence[Technique], threads: dict[str, int], settings: Settings, meter: BandwidthMeter):
    """Interleaves all techniques and the probes; returns every round's ticks, and the tokens."""
    ticks: dict[str, list[list[float]]] = {t.name: [] for t in able}
    outputs: dict[str, Tensor] = {}

    def run(technique: Technique) -> None:
        clock = Clock([time.perf_counter()])
        with thread_count(threads[technique.name]):
            clock.ticks[0] = time.perf_counter()
            outputs[technique.name] = technique.run(clock)
        ticks[technique.name].append(clock.ticks)

    functions = {t.name: (lambda t=t: run(t)) for t in able} | {"bandwidth": meter.run_round}
    measure_interleaved(functions, repeats=settings.rounds, warmup=1)
    meter.rounds = {size: rates[1:] for size, rates in meter.rounds.items()}  # without the warm-up, as the ticks
    return {name: rounds[1:] for name, rounds in ticks.items()}, outputs


def _filled(
    row: Row,
    t: Technique,
    ticks: list[list[float]],
    tokens: Tensor,
    reference: Tensor,
    peaks: Sequence[float] | None,
    subject: Subject,
) -> Row:
    """Turns ticks (start, first token, second token, …) of every round into speeds, and adds bytes and quality."""
    speeds = tuple(t.batch * (len(round_) - 2) / (round_[-1] - round_[1]) for round_ in ticks)
    cached = tokens.shape[1] * kv_bytes_per_position(subject.model.config)
    weights = subject.weight_bytes * t.bytes_per_weight / 4
    moved = weights / t.batch + cached
    same = agreement(tokens, reference[:, : tokens.shape[1]])
    row = replace(
        row,
        samples=speeds,
        time_to_first_token_s=quantile([round_[1] - round_[0] for round_ in ticks], 0.5),
        bytes_per_token=moved,
        agreement=same,
        quality=subject.bits_per_byte if same == 1 and t.bytes_per_weight == 4 else None,
    )
    if t.name == "no cache":
        timed = len(ticks[0]) - 2
        return replace(row, note=f"{timed} tokens timed; reads the whole text for each: not bound by bandwidth")
    if peaks is None:
        return replace(row, note="weights fit into the cache: no share of memory bandwidth")
    shares = [speed * moved / peak for speed, peak in zip(speeds, peaks, strict=True)]
    try:
        return replace(row, bandwidth_share=share_of_peak(quantile(shares, 0.5), 1.0))
    except ProbeError as error:
        return replace(row, note=str(error))


def agreement(tokens: Tensor, reference: Tensor) -> float:
    """Share of a technique's tokens that equal the reference's, over every row of a batch.

    >>> agreement(torch.tensor([[5, 1, 2]]), torch.tensor([[5, 1, 3]]))
    0.6666666865348816

    Raises:
        ValueError: If the lengths differ.
    """
    if tokens.shape[1] != reference.shape[1]:
        raise ValueError(f"tokens are compared position by position; got {tokens.shape[1]} and {reference.shape[1]}")
    return (tokens == reference).float().mean().item()
