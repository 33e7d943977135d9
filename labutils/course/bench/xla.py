"""`bench xla`: eager and compiled torch, a jitted step, the loop as one program; compile time beside speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from labutils.course.bench.subject import Subject
from labutils.course.bench.table import Row
from labutils.generation.decode import generate_compiled, generate_static
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import measure_interleaved
from labutils.xla import runtime
from labutils.xla.generate import XlaLlama
from labutils.xla.hlo import break_even_tokens

EAGER, COMPILED, JIT, SCAN = "eager torch", "compiled torch", "jitted step", "scanned loop"
Generate = Callable[[], list[int]]


def contestants(subject: Subject, *, new_tokens: int, compiled: bool) -> dict[str, Generate]:
    """The ways to make the same greedy tokens; nothing is compiled before the first call."""
    model, ids = subject.model, subject.token_ids
    prompt, length = ids[0].tolist(), ids.shape[1]
    settings = {"max_length": length + new_tokens, "buckets": (length,)}
    stepwise = XlaLlama(model, **settings)
    decoders = {JIT: stepwise, SCAN: XlaLlama(model, **settings, params=stepwise.params)}

    def torch_way(generate: Callable) -> Generate:
        return lambda: generate(model, ids, new_tokens)[0, length:].tolist()

    found = {EAGER: torch_way(generate_static)} | ({COMPILED: torch_way(generate_compiled)} if compiled else {})
    for name, decoder in decoders.items():
        found[name] = lambda d=decoder, whole=name == SCAN: d.generate(prompt, new_tokens, in_one_program=whole)
    return found


def bench_xla(
    subject: Subject,
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    compiled: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Times every way on one thread, interleaved; the first call of each, with its compilation, apart.

    `torch.compile` keeps what it compiled on disk; for the first call it may not, or its time would be another run's.

    Raises:
        ValueError: If `rounds` is below 5.
    """
    runtime.start(devices=1)
    with thread_count(1), torch.compiler.config.patch(force_disable_caches=True):
        ways, first_s, tokens, missing = contestants(subject, new_tokens=new_tokens, compiled=compiled), {}, {}, {}
        for name, generate in ways.items():
            began = time.perf_counter()
            try:
                tokens[name] = generate()
            except Exception as error:  # no C++ compiler, say: a row that says why
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            first_s[name] = time.perf_counter() - began
            say(f"  {name}: first run {first_s[name]:.1f} s")
        able = {name: generate for name, generate in ways.items() if name not in missing}
        timings = measure_interleaved(able, repeats=rounds, warmup=1)
    blank = Row(technique="", model=subject.name, threads=1)
    rows = [replace(blank, technique=name, note=words) for name, words in missing.items()]
    for name, timing in timings.items():
        same = _share_equal(tokens[name], tokens[EAGER])
        compile_s = max(first_s[name] - timing.median_s, 0.0)
        rows.append(
            replace(
                blank,
                technique=name,
                samples=tuple(new_tokens / seconds for seconds in timing.samples_s),
                agreement=same,
                quality=subject.bits_per_byte if same == 1 else None,
                note="" if name == EAGER else _paid(compile_s, timings[EAGER].median_s, timing.median_s, new_tokens),
            )
        )
    return sorted(rows, key=lambda row: list(ways).index(row.technique))


def _paid(compile_s: float, eager_s: float, own_s: float, new_tokens: int) -> str:
    tokens = break_even_tokens(compile_s, eager_s / new_tokens, own_s / new_tokens)
    never = "never pays for itself" if tokens == float("inf") else f"pays for itself after {tokens:.0f} tokens"
    return f"compiled in {compile_s:.1f} s, {never}"


def _share_equal(left: Sequence[int], right: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(right)
