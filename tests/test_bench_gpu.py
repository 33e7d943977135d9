"""`bench gpu`: a row for every rung, measured or with its reason, and records that the ledger takes."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.acceleration.ladder import NAMES
from labutils.bench.gpu import BASE, Settings, as_record, bench_gpu, bytes_read
from labutils.bench.subject import Subject
from labutils.bench.table import as_table
from labutils.measurement import ledger, roofline
from labutils.measurement.resources import kv_bytes_per_position, weight_bytes_read
from labutils.models.ladder import accelerate


@pytest.fixture
def quick_roof(monkeypatch):
    """Bandwidth is measured elsewhere; here a peak that nothing passes."""
    roof = roofline.Roofline(1e12, 1e13, 1, "cpu", "float32", 1000, {})
    monkeypatch.setattr("labutils.bench.gpu.measure_roofline", lambda *_, **__: roof)


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny, random weights", tiny_model("llama-gqa-tied"), None, random_ids(12), bits_per_byte=3.0)


def test_bench_gpu_has_a_row_for_every_rung(subject, quick_roof):
    rows = bench_gpu(subject, Settings(rounds=5, compile=False), say=lambda line: None)
    assert [row.technique for row in rows] == list(NAMES)
    by_name = {row.technique: row for row in rows}
    assert not by_name["fp8"].samples and "NVIDIA" in by_name["fp8"].note and "--no-compile" in by_name["compile"].note
    for name in ("fp32", "sdpa", "static cache", "fused", "int8", "int4"):
        row = by_name[name]
        assert len(row.samples) == 5 and row.note.startswith("equal") and 0 < row.bandwidth_share < 1
    assert by_name["int4"].bytes_per_token < by_name["int8"].bytes_per_token < by_name["fp32"].bytes_per_token
    assert "needs an NVIDIA GPU" in as_table(rows, reference=BASE)


def test_bytes_read_counts_codes_and_scales(subject):
    fp32 = accelerate(subject.model, "fp32").model
    rotary = sum(b.nbytes for b in fp32.buffers())
    assert bytes_read(fp32) == weight_bytes_read(fp32) + rotary
    int8 = accelerate(subject.model, "int8", warn=False).model
    assert bytes_read(int8) < 0.75 * bytes_read(fp32)  # a quarter, but a width of 32 is padded to 64


def test_as_record_fits_the_ledger(subject, quick_roof, tmp_path):
    settings = Settings(rounds=5, compile=False)
    row = next(r for r in bench_gpu(subject, settings, say=lambda line: None) if r.technique == "int8")
    record = as_record(row, subject, settings, quality=3.1)
    ledger.append(record, tmp_path / "ledger.jsonl")
    assert ledger.read(tmp_path / "ledger.jsonl") == [record]
    assert record.bytes_moved_per_token > 12 * kv_bytes_per_position(subject.model.config)


@pytest.mark.gpu
def test_bench_gpu_on_a_gpu(subject):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = bench_gpu(subject, Settings(device="cuda", rounds=5), say=lambda line: None)
    assert all(row.samples or row.note for row in rows) and rows[0].samples
