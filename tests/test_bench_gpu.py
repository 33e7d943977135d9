"""`bench gpu`: a row for every rung and peer, measured or with its reason, and records that the ledger takes."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.acceleration.ladder import NAMES, Device, climb
from labutils.acceleration.linears import fits_fp8, fits_sparse
from labutils.acceleration.memory import Need, usable
from labutils.acceleration.triton_ops import relative_error
from labutils.course.bench import bandwidth, gpu, gpu_peers
from labutils.course.bench.gpu import (
    BASE,
    FITS_IN_CACHE,
    Settings,
    as_record,
    bench_gpu,
    bytes_read,
    ladder_files,
    read_ladders,
)
from labutils.course.bench.subject import SIZES_8B, Subject, speed_subject
from labutils.course.bench.table import as_table, write_json
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.ladder import accelerate, check_equal
from labutils.measurement import ledger, roofline
from labutils.measurement.resources import kv_bytes_per_position, weight_bytes_read
from labutils.measurement.threads import ThreadChoice
from labutils.measurement.timing import paired_ratio

QUICK = Settings(rounds=5, compile=False, threads=1)
CPU_RUNGS = ("fp32", "sdpa", "static cache", "fused", "int8", "int4")


@pytest.fixture(autouse=True)
def quick_roof(monkeypatch):
    """The machine is measured elsewhere; here a peak that nothing passes."""
    roof = roofline.Roofline(1e12, 1e13, 1, "cpu", "float32", 1000, {})
    monkeypatch.setattr("labutils.course.bench.gpu.measure_roofline", lambda *_, **__: roof)


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny, random weights", tiny_model("llama-gqa-tied"), None, random_ids(12), bits_per_byte=3.0)


def test_bench_gpu_has_a_row_for_every_rung_and_peer(subject, tmp_path):
    said = []
    rows = bench_gpu(subject, QUICK, say=said.append)
    assert [row.technique for row in rows] == [*NAMES, *gpu_peers.NAMES]
    by_name = {row.technique: row for row in rows}
    assert not by_name["fp8"].samples and "NVIDIA" in by_name["fp8"].note and "--no-compile" in by_name["compile"].note
    assert "--no-compile" in by_name["transformers, compiled"].note
    for name in (*CPU_RUNGS, "fp16 by itself", "bf16 by itself"):
        row = by_name[name]
        assert len(row.samples) == 5 and row.note.startswith("equal") and row.note.endswith(FITS_IN_CACHE)
    assert by_name["int4"].bytes_per_token < by_name["int8"].bytes_per_token < by_name["fp32"].bytes_per_token
    assert 0.4 < by_name["bf16 by itself"].bytes_per_token / by_name["fp32"].bytes_per_token < 0.6
    assert len(by_name["transformers, eager"].samples) == 5
    assert "needs an NVIDIA GPU" in as_table(rows, reference=BASE)
    assert "GFLOP/s that square products reached" in said[-1]
    write_json(rows, tmp_path / "h200.jsonl")
    (model,) = (ladders := read_ladders(tmp_path / "h200.jsonl"))
    assert model == subject.name and set(ladders[model]) == {row.technique for row in rows if row.samples}
    (tmp_path / "others.jsonl").write_text('{"technique": "dense"}\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    assert ladder_files(tmp_path) == [tmp_path / "h200.jsonl"]
    assert 1 / ladders[model]["int8"].median_s == pytest.approx(by_name["int8"].tokens_per_s)


def test_groups_are_timed_beside_a_base_of_their_own_and_let_go(subject, monkeypatch, tmp_path):
    alive, twins, most = weakref.WeakSet(), weakref.WeakSet(), []

    def watched(*args, **kwargs):
        rung = accelerate(*args, **kwargs)
        alive.add(rung.model)
        twins.add(rung.twin)
        most.append((len(alive), len(twins - {subject.model})))
        return rung

    monkeypatch.setattr(gpu, "accelerate", watched)
    rows = bench_gpu(subject, replace(QUICK, peers=False, at_once=2), say=lambda line: None)
    names = [row.technique for row in rows]
    assert names.count(BASE) == 6 and names[::3] == [BASE] * 6 and set(names) == set(NAMES)
    models, copies = zip(*most, strict=True)
    assert max(models) <= 3 and len(most) > 6
    assert max(copies) == 1  # of weights that a rung rounds: the one that is being checked
    bases = [row for row in rows if row.technique == BASE]
    assert len({row.samples for row in bases}) == 6
    write_json(rows, tmp_path / "h200.jsonl")
    ladders = read_ladders(tmp_path / "h200.jsonl")
    assert list(ladders)[:2] == [subject.name, f"{subject.name}, group 2"] and len(ladders) == 6
    last = rows[-3:]
    assert [row.technique for row in last] == [BASE, "fp8", "2:4"]
    base, int8 = rows[12:14]
    (line,) = [line for line in as_table(rows, reference=BASE).splitlines() if line.startswith("int8 ")]
    assert int8.technique == "int8" and str(paired_ratio(int8.samples, base.samples)) in line


def test_bench_gpu_states_the_share_of_what_probes_of_that_size_read(subject, monkeypatch):
    monkeypatch.setattr("labutils.course.bench.gpu.probe_bytes", lambda weights: 2**20)
    monkeypatch.setattr(bandwidth, "_rate", lambda *_: 1e15)
    rows = bench_gpu(subject, replace(QUICK, peers=False), say=lambda line: None)
    assert [row.technique for row in rows] == list(NAMES)
    assert all(0 < row.bandwidth_share < 1e-3 for row in rows if row.samples)


def test_threads_are_chosen_by_measuring_unless_given(subject, monkeypatch):
    monkeypatch.setattr("labutils.course.bench.gpu.available_cores", lambda: 2)
    said, asked = [], []
    monkeypatch.setattr(
        "labutils.course.bench.gpu.best_thread_count",
        lambda step, candidates: asked.append(candidates) or ThreadChoice(2, {}),
    )
    rows = bench_gpu(subject, replace(QUICK, threads=None, peers=False), say=said.append)
    assert asked == [(1, 2)] and {row.threads for row in rows} == {2} and said[1].startswith("measured")


def test_torchao_is_held_against_its_own_weights(subject):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    plan, _ = climb("static cache", Device("cpu"))
    rung = gpu_peers.torchao_decoder(subject.model, 8, plan, "cpu")
    equality = check_equal(rung, subject.token_ids, prompt=6)
    assert equality.holds and equality.error < 1e-4
    rounded = relative_error(rung.twin.lm_head.weight, subject.model.lm_head.weight)
    assert 1e-4 < rounded < 0.02
    codes = sum(weight_of(layer).numel() for _, layer in linear_layers(rung.model, with_head=True))
    assert codes < bytes_read(rung.model) < 0.5 * bytes_read(subject.model)


def test_without_torchao_its_rows_say_so(subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    rows = {row.technique: row for row in bench_gpu(subject, QUICK, say=lambda line: None)}
    assert all("torchao" in rows[name].note and not rows[name].samples for name in gpu_peers.TORCHAO)


def test_generators_make_so_many_tokens_more(subject):
    calls = gpu_peers.generators("transformers, eager", subject, Device("cpu"), "cpu")
    longer, first = (call().shape[1] for call in calls.values())
    assert (first, longer) == (13, 13 + gpu_peers.MORE)


def test_seconds_per_token_are_never_negative():
    assert min(gpu_peers.seconds_per_token((1.0, 9.0), (2.0, 2.0, 2.0))) > 0


def test_bytes_read_counts_codes_and_scales(subject):
    fp32 = accelerate(subject.model, "fp32").model
    rotary = sum(b.nbytes for b in fp32.buffers())
    assert bytes_read(fp32) == weight_bytes_read(fp32) + rotary
    int8 = accelerate(subject.model, "int8", warn=False).model
    assert bytes_read(int8) < 0.75 * bytes_read(fp32)  # a quarter, but a width of 32 is padded to 64


def test_as_record_fits_the_ledger(subject, tmp_path):
    settings = replace(QUICK, peers=False)
    row = next(r for r in bench_gpu(subject, settings, say=lambda line: None) if r.technique == "int8")
    record = as_record(row, subject, settings, quality=3.1)
    ledger.append(record, tmp_path / "ledger.jsonl")
    assert ledger.read(tmp_path / "ledger.jsonl") == [record]
    assert record.bytes_moved_per_token > 12 * kv_bytes_per_position(subject.model.config)


@pytest.mark.parametrize(("rung", "weights"), [("fp8", "fp8"), ("2:4", "2:4"), ("int4", "int4"), ("fused", "float")])
def test_a_rungs_quality_is_that_of_its_own_weights_on_the_device_that_was_timed(subject, monkeypatch, rung, weights):
    measured = []
    monkeypatch.setattr(gpu, "twin_of", lambda model, weights: measured.append(weights))
    monkeypatch.setattr(gpu, "bits_per_byte", lambda *_, **__: 4.0)
    quality = gpu.rung_quality(subject, rung, Device("cuda", "H200", (9, 0)))
    assert (quality, measured) == ((3.0, []) if weights == "float" else (4.0, [weights]))


def test_steps_on_a_gpu_are_timed_twenty_at_a_time(monkeypatch):
    assert (bandwidth.calls_on("cuda"), bandwidth.calls_on("cpu")) == (20, 1)
    calls = []
    monkeypatch.setattr(bandwidth, "sample_seconds", lambda function, device, calls: 0.5)
    assert bandwidth._rate(lambda: None, 10, "cuda") == 20.0
    gpu._times(3, lambda: calls.append(1))()
    assert len(calls) == 3


def test_the_shape_of_8b_fits_two_rungs_at_a_time_and_into_every_format():
    """The sizes alone, without memory; an H200 has 139 GiB and its machine 128, an A100 at most 80 GB."""
    with torch.device("meta"):
        subject = speed_subject(**SIZES_8B)
    assert subject.name.startswith("7.5B Llama") and subject.token_ids.device.type == "cpu"
    weights = [weight_of(layer) for _, layer in linear_layers(subject.model, with_head=True)]
    assert len(weights) == 7 * 32 + 1 and all(fits_fp8(w) and fits_sparse(w) for w in weights)
    assert max(w.numel() for w in weights) < 2**31  # a kernel counts in 32 bits from the first weight on
    whole = Need.of(subject.model, positions=17).total_bytes
    h200 = Device("cuda", "H200", (9, 0))

    def on_device(names):
        sizes = [whole * climb(name, h200)[0].dtype.itemsize / 4 for name in names]  # int8 and int4: at most 16 bits
        return sum(sizes) + sum(set(map(bandwidth.probe_bytes, sizes)))

    assert max(map(on_device, gpu.groups(NAMES, 2))) < usable(139 * 2**30) < on_device(NAMES)
    assert max(map(on_device, gpu.groups(NAMES, 1))) < usable(80e9)
    assert 3 * whole < usable(128 * 2**30)  # on the host: the model, a twin, and the copy that becomes the rung
    assert bandwidth.probe_bytes(whole) / 4 / 2 < 2**31  # a dot product's numbers


@pytest.mark.gpu
def test_bench_gpu_on_a_gpu(subject):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = bench_gpu(subject, Settings(device="cuda", rounds=5), say=lambda line: None)
    assert all(row.samples or row.note for row in rows) and rows[0].samples
