"""`bench quantization`: engines in processes of their own, rows that survive an interruption, and bars by hand."""

import json
import os
from argparse import ArgumentParser
from contextlib import ExitStack

import pytest
import torch
from aside import install_aside
from tiny_models import random_ids, tiny_model

from labutils.course.bench import quantization, quantization_rows
from labutils.course.bench.child import start
from labutils.course.bench.decode import Settings
from labutils.course.bench.engines import answered, made, timed
from labutils.course.bench.llama_cpp import FORKS, Parameters
from labutils.course.bench.quantization import Load, bench_quantization, loads
from labutils.course.bench.quantization_rows import LONG, EngineRow, as_markdown, as_table, judge, read_rows
from labutils.course.bench.subject import Subject, speed_subject
from labutils.course.bench.torch_engines import Modules, Ours
from labutils.course.cli import bench
from labutils.generation.decode import generate_cached
from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.quantized import save_quantized
from labutils.measurement.limits import status_bytes
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import find_kernels
from labutils.quantization.packed import pack_model_

needs_kernels = pytest.mark.skipif(find_kernels()[0] is None, reason="no C compiler here")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "num_attention_heads": 2}


def subject():
    return speed_subject(num_key_value_heads=1, **SIZES)


def row(engine, *samples, form="int8", load="decode", model="big", **settings):
    samples = tuple(float(s) for s in samples)
    return EngineRow(engine=engine, model=model, load=load, threads=1, form=form, samples=samples, **settings)


def judged(*rows):
    return [f"{bar.claim}: {bar.measured}, {bar.holds}" for bar in judge(rows)]


def test_each_form_is_held_against_its_best_peer_of_equal_bits():
    rows = [row("ours int8", *[30] * 5), row("llama.cpp Q8_0", *[10] * 5), row("ik_llama.cpp Q8_0", *[25] * 5)]
    rows += [row("ours int4", *[36] * 5, form="int4"), row("llama.cpp Q4_0", *[20] * 5, form="int4")]
    assert judged(*rows) == [
        "big, 1 thread, decode: ours int8 at least 1.5 times ik_llama.cpp Q8_0: 1.20x [1.20, 1.20], False",
        "big, 1 thread, decode: ours int4 at least 1.8 times llama.cpp Q4_0: 1.80x [1.80, 1.80], True",
    ]
    small = [row("ours float32", *[12] * 5, form="float32", model="lablm")]
    small += [
        row("llama.cpp F32", *[10] * 5, form="float32", model="lablm"),
        row("other", form="float32", note="absent"),
    ]
    assert judged(*small) == [
        "lablm, 1 thread, decode: ours float32 at least 1.05 times llama.cpp F32: 1.20x [1.20, 1.20], True"
    ]


def test_batches_meet_llama_cpp_and_prompts_our_float32_too():
    pair = [row("llama.cpp Q8_0", *[10] * 5, load="8 at once"), row("ik_llama.cpp Q8_0", *[50] * 5, load="8 at once")]
    spent = {"matrices": 0.75, "head": 0.25}
    (line,) = judged(row("ours int8", *[11] * 5, load="8 at once", profile=spent), *pair)
    assert line.endswith("at least 1.2 times llama.cpp Q8_0: 1.10x [1.10, 1.10]; time: 75% matrices, 25% head, False")
    ours = [row(f"ours {f}", *[s] * 5, form=f, load="prefill of 512") for f, s in (("int8", 16), ("float32", 10))]
    assert judged(*ours) == [
        "big, 1 thread, prefill of 512: ours int8 at least 1.5 times ours float32: 1.60x [1.60, 1.60], True"
    ]


def test_memory_loading_bandwidth_and_the_pair_have_bars():
    first = row("ours int8", 30, 30, 30, 30, 30, bandwidth_share=0.84, profile={"matrices": 1.0})
    again = row("ours int8, again", 31, 31, 31, 31, 31)
    sizes = {"file_bytes": 100_000_000, "cache_bytes": 10_000_000, "load_s": 0.21}
    int4 = row("ours int4", *[9] * 5, form="int4", peak_bytes=120_000_000, **sizes)
    assert judged(first, again, int4) == [
        "big, 1 thread, decode: ours int8 reads at 85% of the bandwidth measured: 84%; time: 100% matrices, False",
        "big, 1 thread, decode: memory of ours int4 at most 1.15 times file and cache: 1.09x of 110 MB, True",
        "big, 1 thread, decode: ours int4 loads in at most 0.2 s: 0.21 s, False",
        "big, 1 thread, decode: ours int8 in two processes within 3%: 0.97x [0.97, 0.97], False",
    ]
    long = row("ours int8", *[10] * 5, load=LONG, bandwidth_share=0.8)
    assert judged(long) == [f"big, 1 thread, {LONG}: at most 1.3 times its bytes' time: 1.25x, True"]
    assert judged(first, row("ours int8, again", *[29.5] * 5))[-1].endswith("1.02x [1.02, 1.02], True")


def test_a_missed_ratio_says_what_all_of_the_bandwidth_would_give():
    peer = row("llama.cpp Q8_0", *[10] * 5)
    missed, _ = judged(row("ours int8", *[12] * 5, bandwidth_share=0.75), peer)
    assert missed.endswith("1.5 times llama.cpp Q8_0: 1.20x [1.20, 1.20]; 1.60x if all bandwidth were used, False")
    met, _ = judged(row("ours int8", *[15] * 5, bandwidth_share=0.75), peer)
    assert met.endswith("1.50x [1.50, 1.50], True")


def test_the_rate_is_of_new_tokens_or_of_the_prompt():
    assert Load("8 at once", 8, 16, 3).rate([0.0, 5.0, 6.0, 7.0]) == 8.0
    assert Load("prefill of 512", 1, 512, 1).rate([1.0, 3.0]) == 256.0
    assert [load.count for load in loads(32, small=False)] == [33, 1, 17, 5, 1]
    assert [load.count for load in loads(32, small=True)] == [129, 1, 65, 17, 1]


def test_tables_show_what_ran_and_why_something_did_not(tmp_path):
    rows = [row("ours int8", 1, 2, 3, 4, 5, load_s=0.5, peak_bytes=2_000_000), row("torchao", note="not installed")]
    assert as_table(rows[:1]).splitlines()[1:] == as_table(rows).splitlines()[1:]
    fast = row("llama.cpp Q8_0, repacked", *[4000] * 5, load_s=0.04)
    slow = row("llama.cpp Q8_0", *[3000] * 5, load_s=0.03)
    table = as_markdown([*rows, fast, slow, row("ours int8", *[90] * 5, load="prefill of 512")]).splitlines()
    assert "xllamacpp 2026.10.11549, ik-llama-cpp-python 0.1.5" in table[0] and "over 5 rounds" in " ".join(table)
    table = table[table.index("") + 1 :]
    assert table[2:5] == [
        "| **big, 1 thread** | | | | | | |",
        "| llama.cpp Q8_0 | 4,000 [4,000, 4,000] r |  |  |  |  | 0.04 |",
        "| ours int8 | 3.0 [1.0, 5.0] | 90.0 [90.0, 90.0] |  |  | 2 | 0.50 |",
    ]
    assert table[6] == "<details><summary>0 of 1 bars are met</summary>"
    claim = "big, 1 thread, decode: ours int8 at least 1.5 times llama.cpp Q8_0, repacked"
    assert table[-3] == f"| {claim} | 0.00x [0.00, 0.00] | missed |"
    path = tmp_path / "rows.json"
    quantization.write_json(rows, path)
    assert read_rows(path) == rows


@needs_kernels
def test_our_engines_write_the_decoders_tokens_for_one_and_for_many(tmp_path):
    made = subject()
    prompts = torch.randint(96, (3, 6), generator=torch.Generator().manual_seed(1)).tolist()
    expected = [generate_cached(made.model, torch.tensor([p]), 5)[0, 6:].tolist() for p in prompts]
    made.model.save_pretrained(tmp_path)
    ours = Ours(str(tmp_path), threads=1, packed=False)
    for asked in (prompts[:1], prompts):
        ticks, tokens = ours.generate(asked, 5)
        assert tokens == expected[: len(asked)] and 3 <= len(ticks) <= 6 and ticks == sorted(ticks)
    assert timed(ours, prompts, 5)["tokens"] == expected
    assert Modules(str(tmp_path), threads=1, kind="dynamic").generate(prompts[:1], 5)[0][5] > 0
    assert set(ours.profile(2)) == {"matrices", "head"} and min(ours.profile(2).values()) > 0
    save_quantized(pack_model_(made.model, Scheme(8)), None, tmp_path / "int8", method="rtn")
    packed = Ours(str(tmp_path / "int8"), threads=1, packed=True)
    assert packed.generate(prompts, 5)[1][0] == packed.generate(prompts[:1], 5)[1][0]
    assert status_bytes("VmHWM") is None or status_bytes("VmHWM") >= status_bytes("VmRSS") > 1e7


def test_pytorchs_dynamic_int8_rounds_inputs_to_seven_bits_as_the_readme_says(tmp_path):
    subject().model.save_pretrained(tmp_path)
    layer = Modules(str(tmp_path), threads=1, kind="dynamic").model.model.layers[0].self_attn.q_proj
    x = torch.zeros(2000, layer.in_features)
    x[:, 0] = torch.linspace(0, 1, len(x))
    assert max(len(outputs.unique()) for outputs in layer(x).T) == 128
    assert "inputs have 7 bits" in quantization_rows.INTRO


class InProcess:
    """An engine without a process of its own: a test has nothing to time."""

    def __init__(self, engine, told, threads, stack, python=""):
        self.engine, self.load_s, _ = made(engine, told)

    def ask(self, job):
        return json.loads(json.dumps(answered(self.engine, job))) | {"load_s": self.load_s, "peak_bytes": None}


@needs_kernels
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Ours alone; a second call measures only what is missing."""
    monkeypatch.setattr(quantization, "start", InProcess)
    path, said, settings = tmp_path / "rows.json", [], Settings(2, 5, peers=False)
    few = [Load("decode", 1, 4, 3), Load("8 at once", 8, 4, 3), Load(LONG, 1, 130, 1)]
    monkeypatch.setattr(quantization, "loads", lambda count, small: few)
    rows = bench_quantization([subject], settings, threads=[1], say=said.append, path=path)
    *rows, long = rows
    assert [r.engine for r in rows] == ["ours float32", "ours int8", "ours int8, again", "ours int4"] * 2
    assert all(len(r.samples) == 5 and r.load_s > 0 and not r.note for r in rows)
    assert (long.engine, long.load, len(long.samples)) == ("ours int8", LONG, 5)
    assert long.cache_bytes == 130 * 2 * (32 + 4)  # keys and values of a head: 32 codes and a scale
    assert rows[3].file_bytes < rows[1].file_bytes < rows[0].file_bytes and not rows[2].profile
    assert any("in two processes within 3%" in line for line in said)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps([each for each in stored if each["load"] == "decode"]))
    again = bench_quantization([subject], settings, threads=[1], say=said.append, path=path)
    assert again[:4] == rows[:4] and [r.load for r in again[4:]] == ["8 at once"] * 4 + [LONG]
    started = len(said)
    assert bench_quantization([subject], settings, threads=[1], say=said.append, path=path) == again
    assert len(said) == started
    with pytest.raises(ValueError, match="at least 5 repeats; got 3"):
        bench_quantization([subject], Settings(2, 3), threads=[1])


@pytest.mark.parametrize(("seconds", "known"), [(0.02, True), (0.2, False)])
def test_a_profile_is_of_parts_that_fit_into_the_step(monkeypatch, seconds, known):
    """8 rows at 80 tokens/s: a step takes 0.1 s."""
    bench = quantization.Bench.__new__(quantization.Bench)
    bench.children = {"ours int8": InProcessAnswer({"matrices": seconds, "head": 0.01})}
    found = bench._profile(row("ours int8", *[80] * 5), Load("8 at once", 8, 16, 3))
    expected = {"matrices": 0.2, "head": 0.1, "attention, norms, the rest": 0.7}
    assert found == (pytest.approx(expected) if known else {})


class InProcessAnswer:
    """A child with one answer."""

    def __init__(self, answer):
        self.ask = lambda job: answer


def test_an_engine_answers_from_its_own_process():
    with ExitStack() as stack:
        probe = start("bandwidth", {"threads": 1}, 1, stack)
        answer = probe.ask({"do": "read", "size": 2**20})
        assert answer["rate"] > 1e6 and answer["load_s"] >= 0 and answer["peak_bytes"] != 0
        with pytest.raises(RuntimeError, match="KeyError: 'abacus'"):
            start("abacus", {}, 1, stack)


def test_what_is_not_installed_is_left_out_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "not_installed", lambda fork: f"not installed: pip install {FORKS[fork].wheel}")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    found = quantization.contenders(subject(), Settings(threads=1), tmp_path)
    missing = {each.name: each.missing for each in found if each.missing}
    assert missing["torchao int8, eager"] == "not installed: pip install torchao"
    assert missing["vLLM"] == "name a Python that has it with --vllm"
    assert missing["llama.cpp Q4_0, repacked"] == "not installed: pip install xllamacpp==2026.10.11549"
    assert sum(name.startswith("ik_llama.cpp") for name in missing) == 5 and len(missing) == 12


def test_an_unknown_build_is_refused():
    parameters = Parameters()
    parameters.set((8, "I", 0), 512)
    assert parameters.bytes[9] == 2
    with pytest.raises(RuntimeError, match="byte 8 must hold 2048, as in the known build; got 512"):
        parameters.set((8, "I", 2048), 1)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The wheels of both forks; the second has none but for Linux on x86."""
    folder = tmp_path_factory.mktemp("peers")
    install_aside(folder, [fork.wheel for fork in FORKS.values()])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_writes_our_tokens_for_one_and_for_many(fork, peers, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(peers))
    model, count = tiny_model("llama-gqa-tied"), 6
    export_gguf(model, None, tmp_path / "m.gguf")
    prompts = [random_ids(9, seed=seed)[0].tolist() for seed in range(3)]
    expected = [generate_cached(model, torch.tensor([p]), count)[0, 9:].tolist() for p in prompts]
    with ExitStack() as stack:
        child = start("llama", {"path": str(tmp_path / "m.gguf"), "fork": fork, "threads": 1}, 1, stack)
        for asked in (prompts[:1], prompts):
            answer = child.ask({"do": "timed", "prompts": asked, "count": count})
            assert answer["tokens"] == expected[: len(asked)] and len(answer["ticks"]) == count + 1
        assert answer["load_s"] > 0 and answer["peak_bytes"] > 1e6
        (tmp_path / "broken.gguf").write_bytes(b"no model")
        with pytest.raises(RuntimeError, match="must be able to read"):
            start("llama", {"path": str(tmp_path / "broken.gguf"), "fork": fork, "threads": 1}, 1, stack)


def test_bench_command_runs_quantization(monkeypatch, tmp_path, capsys):
    asked = {}

    def run(subjects, settings, *, threads, say, path):
        asked.update(names=[make().name for make in subjects], threads=threads, path=path)
        say("ran")

    monkeypatch.setattr(quantization, "bench_quantization", run)
    monkeypatch.setattr("labutils.course.bench.subject.trained_subject", lambda name: Subject(name, None, None, None))
    monkeypatch.setattr("labutils.course.bench.subject.speed_subject", lambda **sizes: Subject("big", None, None, None))
    parser = ArgumentParser()
    bench.add_arguments(parser)
    options = ["quantization", "--quick", "--threads", "1", "--json", str(tmp_path / "rows.json")]
    assert bench.run(parser.parse_args(options)) == 0
    assert "ran" in capsys.readouterr().out
    assert asked == {"names": ["lablm", "big"], "threads": (1,), "path": tmp_path / "rows.json"}


def test_the_readme_is_written_from_the_stored_run(monkeypatch, tmp_path):
    stored, readme = tmp_path / "rows.json", tmp_path / "README.md"
    quantization.write_json([row("ours int8", 1, 2, 3, 4, 5, load_s=0.5)], stored)
    readme.write_text("a\n<!-- engines -->\nold\n<!-- /engines -->\nb\n")
    monkeypatch.setattr(quantization_rows, "README", readme)
    monkeypatch.setattr(quantization_rows, "read_rows", lambda: read_rows(stored))
    quantization_rows.main()
    text = readme.read_text()
    assert (
        text.startswith("a\n<!-- engines -->\nThe same weights")
        and text.endswith("\n<!-- /engines -->\nb\n")
        and "old" not in text
    )
    quantization_rows.main()
    assert readme.read_text() == text


@pytest.mark.skipif(not quantization_rows.STORED.exists(), reason="no run is stored yet")
def test_the_readme_shows_the_stored_run():
    readme = quantization_rows.README.read_text(encoding="utf-8")
    assert quantization_rows.BEGIN + as_markdown(read_rows()) + quantization_rows.END in readme


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LABUTILS_VLLM"), reason="LABUTILS_VLLM names no Python that has vLLM")
def test_vllm_writes_our_tokens_for_one_and_for_many(tmp_path):
    model, count = subject().model, 6  # with heads of 32, which it can
    prompts = torch.randint(96, (3, 9), generator=torch.Generator().manual_seed(1)).tolist()
    expected = [generate_cached(model, torch.tensor([p]), count)[0, 9:].tolist() for p in prompts]
    model.save_pretrained(tmp_path)
    with ExitStack() as stack:
        child = start("vllm", {"folder": str(tmp_path), "positions": 64}, 1, stack, python=os.environ["LABUTILS_VLLM"])
        for asked in (prompts[:1], prompts):
            answer = child.ask({"do": "timed", "prompts": asked, "count": count})
            assert answer["tokens"] == expected[: len(asked)] and len(answer["ticks"]) == count + 1
