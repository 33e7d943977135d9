"""Triton kernels: interpreted on the CPU against float64, compiled for absent GPUs, nothing left behind."""

import re
import sys

import pytest
import torch
from aside import triton_there
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import unchecked
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import scaled_dot_product_attention

from labutils.acceleration import kernels, triton_ops
from labutils.acceleration.interpreter import WITHOUT_TRITON, interpret, missing_triton
from labutils.acceleration.triton_ops import relative_error

pytestmark = pytest.mark.skipif(not triton_there(), reason=WITHOUT_TRITON)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXACT = 5e-7  # some roundings of float32, 6e-8 each


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("n", [1, 1024, 2500])
def test_add_is_exact(n, device):
    x, y = normal(n, device=device), normal(n, seed=1, device=device)
    assert torch.equal(triton_ops.add(x, y), x + y)


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 128)])
def test_softmax_is_close_to_float64(shape, device):
    x = normal(*shape, device=device) * 5
    assert relative_error(triton_ops.softmax(x), x.double().softmax(dim=1)) < EXACT


def test_softmax_of_large_scores_and_of_a_transposed_view(device):
    x = normal(9, 4, device=device) * 1000
    assert triton_ops.softmax(x).isfinite().all()
    assert relative_error(triton_ops.softmax(x.T), x.T.double().softmax(dim=1)) < 1e-4  # exp of a difference near 1000


@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_rms_norm_is_close_to_float64(rows, n, seed):
    x, gain = normal(rows, n, seed=seed), normal(n, seed=seed + 1)
    exact = torch_rms_norm(x.double(), (n,), gain.double(), 1e-6)
    assert relative_error(triton_ops.rms_norm(x, gain), exact) < EXACT


def test_rms_norm_by_hand(device):
    x, gain = torch.tensor([[3.0, 4.0]], device=device), torch.tensor([1.0, 2.0], device=device)
    expected = torch.tensor([[3.0, 8.0]], device=device) / 12.5**0.5
    assert torch.allclose(triton_ops.rms_norm(x, gain, eps=0.0), expected)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (10, 300), (7, 512)])
def test_int8_gemv_is_close_to_float64(rows, n, device):
    codes = torch.randint(-127, 128, (rows, n), dtype=torch.int8, device=device)
    scales, x = normal(rows, device=device).abs(), normal(n, seed=1, device=device)
    exact = codes.double() @ x.double() * scales.double()
    assert relative_error(triton_ops.int8_gemv(codes, scales, x), exact) < 1e-6


@pytest.mark.parametrize(("groups", "n"), [(1, 64), (4, 64), (32, 64), (80, 2560), (3, 6144)])
def test_int4_gemv_is_close_to_float64(groups, n, device):
    q = torch.randint(0, 16, (10, n), device=device)
    packed = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)
    scales, x = normal(10, groups, device=device), normal(n, seed=1, device=device)
    weight = (q - 8).double() * scales.double().repeat_interleave(n // groups, dim=1)
    assert relative_error(triton_ops.int4_gemv(packed, scales, x), weight @ x.double()) < 1e-6


def test_int4_gemv_by_hand():
    packed = torch.tensor([[0x9F]], dtype=torch.uint8)  # codes 15 and 9: weights 7 and 1, times a scale of 2
    y = triton_ops.int4_gemv(packed, torch.tensor([[2.0]]), torch.tensor([1.0, 10.0]))
    assert y.tolist() == [2 * (7 * 1 + 1 * 10)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [1, 32, 70])
def test_flash_attention_is_close_to_float64(causal, positions, device):
    q, k, v = (normal(2, positions, 16, seed=s, device=device) for s in range(3))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    assert relative_error(triton_ops.flash_attention(q, k, v, causal=causal), exact) < EXACT


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="power of two of at least 16; got 8"):
        triton_ops.flash_attention(*(normal(1, 4, 8) for _ in range(3)))
    with unchecked(), pytest.raises(ValueError, match="power of two that divides n=12"):
        triton_ops.int4_gemv(torch.zeros(2, 6, dtype=torch.uint8), normal(2, 2), normal(12))


def test_interpret_lists_each_access_without_the_masked():
    x, y, out = torch.zeros(6), torch.zeros(6), torch.zeros(6)
    found = interpret(kernels.add_kernel, (2,), x, y, out, 6, BLOCK=4)
    assert [(a.program, a.kind, len(a.addresses)) for a in found] == [
        (0, "load", 4), (0, "load", 4), (0, "store", 4), (1, "load", 2), (1, "load", 2), (1, "store", 2),
    ]  # fmt: skip
    assert [b - a for a, b in zip(found[0].addresses, found[0].addresses[1:], strict=False)] == [4, 4, 4]


def test_interpret_leaves_triton_as_it_was():
    import triton
    from triton import language as tl

    spaces = (tl, tl.core, tl.math, tl.standard, tl.tensor)
    before = [dict(vars(space)) for space in spaces]
    triton_ops.softmax(normal(2, 3))
    assert [dict(vars(space)) for space in spaces] == before
    assert not triton.knobs.runtime.interpret and isinstance(tl.sum, triton.runtime.jit.JITFunction)


def test_interpret_takes_a_kernel_with_and_without_its_source():
    def doubling_kernel(x, BLOCK: "tl.constexpr"):
        offsets, factor = tl.arange(0, BLOCK), 2.0
        tl.store(x + offsets, tl.load(x + offsets) * factor)

    sourceless = {}
    body = "    at = x + tl.arange(0, BLOCK)\n    tl.store(at, 2 * tl.load(at))"
    exec(f'def doubling_kernel(x, BLOCK: "tl.constexpr"):\n{body}', sourceless)
    for kernel in (doubling_kernel, sourceless["doubling_kernel"]):
        x = torch.arange(4.0)
        interpret(kernel, (1,), x, BLOCK=4)
        assert x.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_interpret_names_the_kernel_that_failed():
    def broken_kernel(x):
        tl.store(x, undefined)

    with pytest.raises(RuntimeError, match="broken_kernel failed.*undefined"):
        interpret(broken_kernel, (1,), torch.zeros(1))


SIGNATURES = {
    "add_kernel": ({"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 1024}),
    "softmax_kernel": ({"x": "*fp16", "out": "*fp16", "n": "i32"}, {"BLOCK": 1024}),
    "rms_norm_kernel": ({"x": "*fp16", "gain": "*fp16", "out": "*fp16", "n": "i32", "eps": "fp32"}, {"BLOCK": 1024}),
    "int8_gemv_kernel": (
        {"codes": "*i8", "scales": "*fp32", "x": "*fp16", "out": "*fp32", "rows": "i32", "n": "i32"},
        {"ROWS": 4, "BLOCK": 512},
    ),
    "int4_gemv_kernel": (
        {"codes": "*u8", "scales": "*fp32", "x": "*fp16", "out": "*fp32", "rows": "i32", "n": "i32"},
        {"GROUP": 32, "GROUPS": 32, "ROWS": 4},
    ),
    "flash_attention_kernel": (
        {"q": "*fp16", "k": "*fp16", "v": "*fp16", "out": "*fp16", "positions": "i32", "scale": "fp32"},
        {"CAUSAL": True, "DIM": 64, "QUERIES": 32, "KEYS": 32},
    ),
}


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_for_gpus_that_are_not_here(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    machine_code = triton_ops.machine_code(getattr(kernels, name), *SIGNATURES[name], capability=capability)
    assert f".target sm_{capability}" in machine_code and name in machine_code


def test_flash_attention_uses_the_matrix_units(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = "flash_attention_kernel"
    assert "mma.sync" in triton_ops.machine_code(getattr(kernels, name), *SIGNATURES[name], capability=80)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("name", ["int8_gemv_kernel", "int4_gemv_kernel"])
def test_gemvs_read_their_codes_16_bytes_at_a_time(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = triton_ops.machine_code(getattr(kernels, name), *SIGNATURES[name], capability=capability)
    loads = re.findall(r"ld\.global\S*", ptx)
    assert any(load.endswith("v4.b32") for load in loads), loads
    assert not any(load.endswith((".b8", ".u8")) for load in loads), loads


def test_wgmma_needs_64_rows_of_queries(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature, sizes = SIGNATURES["flash_attention_kernel"]
    for rows in (32, 64):
        blocks = sizes | {"QUERIES": rows, "KEYS": 64}
        ptx = triton_ops.machine_code(kernels.flash_attention_kernel, signature, blocks, capability=90)
        assert ("wgmma" in ptx) == (rows == 64)


def test_what_a_mask_hides_is_undefined():
    def careless_kernel(x, out, n, BLOCK: "tl.constexpr"):
        at = tl.arange(0, BLOCK)
        tl.store(out, tl.sum(tl.load(x + at, mask=at < n), axis=0))

    for dtype in (torch.float16, torch.float32, torch.float64):
        out = torch.zeros(1, dtype=dtype)
        interpret(careless_kernel, (1,), torch.ones(3, dtype=dtype), out, 3, BLOCK=4)
        assert out.isnan().all()
        interpret(careless_kernel, (1,), torch.ones(4, dtype=dtype), out, 4, BLOCK=4)
        assert out.item() == 4.0


def test_missing_triton_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in missing_triton()
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        triton_ops.add(normal(2), normal(2))
