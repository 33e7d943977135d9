"""The quantization benchmark: every technique runs or says why not, and the bars judge by the numbers."""

from argparse import ArgumentParser

import pytest
import torch

from labutils.course.bench import llama_cpp, quantization
from labutils.course.bench.decode import Settings
from labutils.course.bench.quantization import (
    DECODE_BARS,
    FP32,
    INT4,
    INT8,
    PREFILL_BARS,
    Bar,
    bench_quantization,
    verdicts,
)
from labutils.course.bench.subject import speed_subject
from labutils.course.bench.table import Row
from labutils.course.cli import bench
from labutils.quantization.kernels import find_kernels

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def subject():
    return speed_subject(num_key_value_heads=4, **SIZES)


def row(name, *samples, first=1.0, share=None, note=""):
    settings = {"time_to_first_token_s": first, "bandwidth_share": share, "note": note}
    return Row(technique=name, model="m", threads=1, samples=tuple(float(s) for s in samples), **settings)


def test_verdicts_by_hand():
    rows = [row(INT8, *[30] * 5, share=0.85), row(FP32, *[10] * 5), row(INT4, *[36] * 5, share=0.75)]
    rows.append(row("llama.cpp Q8_0", *[25] * 5))
    assert verdicts(rows, DECODE_BARS, prefill=False) == [
        "MISSED: our int8 decode: 1.20x [1.20, 1.20] of llama.cpp Q8_0, bar 1.3x",
        "met: our int8 decode: 3.00x [3.00, 3.00] of our fp32, bar 2.5x",
        "not measured: our int4, group 64 against llama.cpp Q4_0",
        "met: our int4, group 64 decode: 3.60x [3.60, 3.60] of our fp32, bar 3.5x",
        "met: our int8 reads at 85% of the bandwidth measured, bar 80%",
        "MISSED: our int4, group 64 reads at 75% of the bandwidth measured, bar 80%",
    ]


def test_verdicts_on_prefill_and_where_a_share_means_nothing():
    rows = [row(INT8, 1, first=0.5, note="in cache"), row(FP32, 1, first=1.0), row(INT4, 1, first=2.0, note="in cache")]
    assert verdicts(rows, PREFILL_BARS, prefill=True) == [
        "met: our int8 prefill of 512: 2.00x (of medians) of our fp32, bar 1.0x",
        "MISSED: our int4, group 64 prefill of 512: 0.50x (of medians) of our fp32, bar 1.0x",
    ]
    assert verdicts(rows, [Bar(INT8, "nobody", 1)], prefill=False)[1:] == [
        "not judged: our int8, share of bandwidth (in cache)",
        "not judged: our int4, group 64, share of bandwidth (in cache)",
    ]


def test_every_technique_runs_or_says_why(monkeypatch, subject):
    if find_kernels()[0] is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(quantization, "PREFILL_TOKENS", 16)
    said = []
    rows = bench_quantization(subject, Settings(new_tokens=2, threads=1, peers=False), say=said.append)
    names = [r.technique for r in rows if r.model == subject.name]
    assert names[:2] == [FP32, INT8] and "torch dynamic int8" in names
    assert [r.technique for r in rows if r.model.endswith("prompt of 16")] == names
    assert all(len(r.samples) == 5 or r.note for r in rows)
    ours = {r.technique: r for r in rows[: len(names)]}
    assert all(ours[name].samples for name in (FP32, INT8, INT4))
    assert ours[INT4].bytes_per_token < ours[INT8].bytes_per_token < ours[FP32].bytes_per_token
    assert [name for name in (FP32, INT8, INT4) if f"where a token's time goes in {name}," in "".join(said)] == [
        INT8,
        INT4,
    ]
    assert any(line.startswith(("met: our int8", "MISSED: our int8")) for line in "\n".join(said).splitlines())


def test_a_technique_that_cannot_be_built_becomes_a_row_with_the_reason(monkeypatch, subject):
    def absent(model):
        raise ImportError("no torchao")

    monkeypatch.setattr(quantization, "_torchao", absent)
    made = quantization.candidates(subject.model, max_length=8)
    assert made["torchao int8, eager"] == "ImportError: no torchao"


def test_packing_for_the_benchmark_leaves_the_float_model_alone(subject):
    before = {name: t.clone() for name, t in subject.model.state_dict().items()}
    quantization.candidates(subject.model, max_length=8)
    after = subject.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_peer_that_crashes_becomes_a_row(monkeypatch, subject, tmp_path):
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(llama_cpp, "why_it_crashes", lambda path: "ends with code -11")
    found = llama_cpp.llama_cpp_techniques(subject, 2, tmp_path, quantization.Technique)
    assert [t.missing for t in found] == ["ends with code -11"] * 3
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    monkeypatch.undo()
    assert "ends with code" in llama_cpp.why_it_crashes(tmp_path / "broken.gguf")


def test_bench_command_runs_quantization(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        quantization, "bench_quantization", lambda subject, settings, say: say("ran") or [row("x", 1, 1, 1, 1, 1)]
    )
    monkeypatch.setattr("labutils.course.bench.subject.speed_subject", lambda **sizes: sizes)
    parser = ArgumentParser()
    bench.add_arguments(parser)
    options = ["quantization", "--quick", "--json", str(tmp_path / "rows.json")]
    assert bench.run(parser.parse_args(options)) == 0
    assert "ran" in capsys.readouterr().out
    assert '"technique": "x"' in (tmp_path / "rows.json").read_text(encoding="utf-8")
