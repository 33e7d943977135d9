"""One product in four formats: the same numbers in each, and a process of its own in which oneDNN has fewer units."""

import os

import pytest
import torch

from labutils.acceleration import formats
from labutils.acceleration.formats import cpu_units, format_name, products, time_formats, time_formats_limited
from labutils.acceleration.triton_ops import relative_error


def test_products_are_one_product_rounded():
    found = products(size=64)
    assert len(found) == 8
    for rows in formats.ROWS:
        exact = found[format_name(rows, torch.float32)]()
        assert exact.shape == (rows, 64)
        assert relative_error(found[format_name(rows, torch.float16)](), exact) < 2e-3
        assert relative_error(found[format_name(rows, torch.bfloat16)](), exact) < 2e-2
        left, right = found[format_name(rows, torch.int8)].args
        assert found[format_name(rows, torch.int8)]().tolist() == (left.long() @ right.long()).tolist()  # nothing wraps


def test_cpu_units_are_read_from_the_flags(tmp_path):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512_bf16_other amx_bf16\n", encoding="utf-8")
    assert cpu_units(tmp_path / "cpuinfo") == ["avx2", "amx_bf16"]
    assert cpu_units(tmp_path / "nowhere") == []


def test_time_formats_limited_tells_its_process_and_only_that_one(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    found = time_formats_limited("AVX2", size=32)
    assert list(found) == list(products(size=32)) and "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert {timing.threads for timing in found.values()} == {torch.get_num_threads()}
    assert all(len(timing.samples_s) >= 5 for timing in found.values())


def test_time_formats_limited_sets_the_limit(monkeypatch):
    seen = {}

    def run(command, *, env, **_):
        seen.update(env)
        return type("Done", (), {"returncode": 1, "stderr": "first\nthe last line\n", "stdout": ""})()

    monkeypatch.setattr(formats.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="failed: the last line"):
        time_formats_limited("AVX512_CORE")
    assert seen["ONEDNN_MAX_CPU_ISA"] == seen["MKL_ENABLE_INSTRUCTIONS"] == "AVX512_CORE"


@pytest.mark.gpu
def test_time_formats_on_a_gpu_leaves_int8_out():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert len(time_formats(device="cuda", size=64)) == 6
