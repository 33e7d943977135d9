"""`bench quantization`: packed int8 and int4 weights against fp32, llama.cpp, torchao and torch, interleaved.

Two runs on one set of random weights: decoding after a short prompt, where weights are read once a token, and reading a
prompt of 512 tokens, where each weight that is read serves them all. All techniques get the same number of threads.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from labutils.course.bench.bandwidth import Probes, report_time
from labutils.course.bench.decode import Settings, Technique, bench_techniques
from labutils.course.bench.llama_cpp import llama_cpp_techniques
from labutils.course.bench.subject import Subject
from labutils.course.bench.table import Row, as_table
from labutils.generation.decode import generate_static
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.quantized import fast_packed_llama
from labutils.measurement.threads import available_cores
from labutils.measurement.timing import paired_ratio
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_
from labutils.quantization.packed_steps import Arena

PREFILL_TOKENS = 512
FP32, INT8, INT4 = "our fp32", "our int8", "our int4, group 64"
SCHEMES = {
    INT8: Scheme(8),
    "our int8, group 64": Scheme(8, granularity="group", group_size=64),
    INT4: Scheme(4, granularity="group", group_size=64),
    "our int4, group 32": Scheme(4, granularity="group", group_size=32),
}
Generate = Callable[..., Tensor]  # (token_ids, max_new_tokens, *, choose) -> longer token_ids


@dataclass(frozen=True)
class Bar:
    """What a technique has to reach: at least `factor` times the speed of another."""

    technique: str
    other: str
    factor: float


DECODE_BARS = (
    Bar(INT8, "llama.cpp Q8_0", 1.3),
    Bar(INT8, FP32, 2.5),
    Bar(INT4, "llama.cpp Q4_0", 1.3),
    Bar(INT4, FP32, 3.5),
)
PREFILL_BARS = (Bar(INT8, FP32, 1.0), Bar(INT4, FP32, 1.0))
BANDWIDTH_BAR = 0.8


def bench_quantization(subject: Subject, settings: Settings, *, say: Callable[[str], None] = print) -> list[Row]:
    """Measures decoding and prefill, prints both tables and every bar, and returns all rows.

    Raises:
        ValueError: If `rounds` is below 5.
    """
    settings = replace(settings, threads=settings.threads or available_cores())
    longest = PREFILL_TOKENS + settings.new_tokens + 1
    makers = candidates(subject.model, max_length=longest)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(subject.model.config.vocab_size, (1, PREFILL_TOKENS), generator=generator)
    runs = (
        (subject, settings.new_tokens, DECODE_BARS),
        (replace(subject, token_ids=prompt, name=f"{subject.name}, prompt of {PREFILL_TOKENS}"), 2, PREFILL_BARS),
    )
    rows = []
    for its_subject, new_tokens, bars in runs:
        its_settings = replace(settings, new_tokens=new_tokens)
        found = _measure(makers, its_subject, its_settings, say)
        say(f"\n{its_subject.name}: {new_tokens} tokens timed, {settings.rounds} interleaved rounds after 1 warm-up")
        say(as_table(found, reference=FP32))
        say("\n".join(verdicts(found, bars, prefill=bars is PREFILL_BARS)))
        if bars is DECODE_BARS:
            profile(makers, found, say)
        rows += found
    return rows


def candidates(model: nn.Module, *, max_length: int) -> dict[str, tuple[Generate, float] | str]:
    """Technique to (generate, bytes a weight), or to the reason why it is missing."""
    found: dict[str, tuple[Generate, float] | str] = {}

    def add(name: str, make: Callable[[], tuple[Generate, float]]) -> None:
        try:
            found[name] = make()
        except Exception as error:  # a package that is missing, a kernel that cannot be built: a row that says so
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]

    fp32 = FastLlama(model, max_length=max_length)
    found[FP32] = fp32.generate, 4.0
    for name, scheme in SCHEMES.items():
        add(name, partial(_packed, model, scheme, max_length, fp32.weight_bytes))
    add("our int8, modules", lambda: _modules(pack_model_(copy.deepcopy(model), SCHEMES[INT8]), 1.0))
    add("torchao int8, eager", lambda: _modules(_torchao(copy.deepcopy(model)), 1.0))
    add("torch dynamic int8", lambda: _modules(_torch_dynamic(model), 1.0))
    return found


def verdicts(rows: Sequence[Row], bars: Sequence[Bar], *, prefill: bool) -> list[str]:
    """One line for each bar: the ratio measured, its interval, met or missed."""
    by_name = {row.technique: row for row in rows}
    lines = []
    for bar in bars:
        ours, other = by_name[bar.technique], by_name.get(bar.other)
        if other is None or not (ours.samples and other.samples):
            lines.append(f"not measured: {bar.technique} against {bar.other}")
            continue
        if prefill:
            factor = other.time_to_first_token_s / ours.time_to_first_token_s
            measured = f"prefill of {PREFILL_TOKENS}: {factor:.2f}x (of medians)"
        else:
            ratio = paired_ratio(ours.samples, other.samples)
            factor, measured = ratio.value, f"decode: {ratio}"
        verdict = "met" if factor >= bar.factor else "MISSED"
        lines.append(f"{verdict}: {bar.technique} {measured} of {bar.other}, bar {bar.factor}x")
    for name in () if prefill else (INT8, INT4):
        share = by_name[name].bandwidth_share
        if share is None:
            lines.append(f"not judged: {name}, share of bandwidth ({by_name[name].note})")
        else:
            verdict = "met" if share >= BANDWIDTH_BAR else "MISSED"
            lines.append(f"{verdict}: {name} reads at {share:.0%} of the bandwidth measured, bar {BANDWIDTH_BAR:.0%}")
    return lines


def profile(makers: dict, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Says where a token's time goes in our int8 and int4: why a share of bandwidth is what it is."""
    for row in rows:
        if row.technique in (INT8, INT4) and row.samples:
            say(report_time(makers[row.technique][0].__self__, 1, row))


def _measure(makers: dict, subject: Subject, settings: Settings, say: Callable[[str], None]) -> list[Row]:
    techniques = []
    for name, made in makers.items():
        if isinstance(made, str):
            techniques.append(Technique(name, missing=made))
            continue
        run = partial(_run, made[0], subject.token_ids, settings.new_tokens + 1)
        techniques.append(Technique(name, run, bytes_per_weight=made[1]))
    with subject.workspace() as folder:
        if settings.peers:
            techniques += llama_cpp_techniques(subject, settings.new_tokens, folder, Technique)
        return bench_techniques(techniques, subject, settings, reference=FP32, say=say, more_probes=_huge_page_probe)


def _run(generate: Generate, token_ids: Tensor, count: int, clock) -> Tensor:
    return generate(token_ids, count, choose=clock)


def _huge_page_probe(size: int) -> Probes:
    """Memory in huge pages is read faster, so the roof must be measured there too."""
    buffer = Arena(size).free[:size].view(torch.float32).fill_(1.0)
    return {"bytes:sum, huge pages": (buffer.sum, size)}


def _packed(model: nn.Module, scheme: Scheme, max_length: int, float_bytes: int) -> tuple[Generate, float]:
    fast = fast_packed_llama(pack_model_(copy.deepcopy(model), scheme), max_length=max_length)
    return fast.generate, 4.0 * fast.weight_bytes / float_bytes


def _modules(model: nn.Module, bytes_per_weight: float) -> tuple[Generate, float]:
    return partial(generate_static, model), bytes_per_weight


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def _torch_dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # it is deprecated, and still what many people have
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
