"""Packed linear layers: exact integers, the same bits on every path, whole models in the place of float ones."""

import ctypes
import ctypes.util
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, random_ids, tiny_model
from torch import nn

from labutils.generation import decode
from labutils.lab.layers.compile import KernelError, compile_c, compiler
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.quantized import fast_float_llama, fast_packed_llama
from labutils.measurement.limits import status_bytes
from labutils.measurement.resources import PROC_SELF, peak_memory
from labutils.quantization import packed_ops
from labutils.quantization.affine import QParams, Scheme, choose_qparams, dequantize, quantize
from labutils.quantization.kernels import Weight, find_kernels, float_weight, load_library, read_sources
from labutils.quantization.packed import PackedEmbedding, PackedLinear, PackedWeight, pack_codes, pack_model_
from labutils.quantization.packed_ops import packed_linear, packed_linear_torch, quantize_tokens, unpack_codes
from labutils.quantization.packed_steps import FewTokens

BUILDS = {
    "native": ("-march=native", "-fopenmp"),
    "AVX2 without VNNI": ("-mavx2", "-mfma"),
    "plain C": ("-DSCALAR",),
    "plain C, native": ("-DSCALAR", "-march=native"),  # GCC 12 has miscompiled loops like these for VNNI
    "plain C, unoptimised": ("-DSCALAR", "-O0"),
}
SCHEMES = [
    Scheme(8),
    Scheme(4),
    Scheme(8, symmetric=False),
    Scheme(8, granularity="tensor"),
    Scheme(4, symmetric=False, granularity="tensor"),
    Scheme(8, granularity="group", group_size=64),
    Scheme(4, granularity="group", group_size=32),
    Scheme(4, symmetric=False, granularity="group", group_size=96),
    Scheme(3, symmetric=False, granularity="group", group_size=192),
    Scheme(2, full_range=True),
]
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(x, layer):
    w = layer.packed
    return x, w.codes, w.scales, w.zeros, layer.bias, w.out_features, w.bits, w.padded, w.group, w.block


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    if os.name != "posix" or compiler() is None:
        pytest.skip("no C compiler here")
    if "AVX2" in request.param and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2 here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABUTILS_HOME", str(tmp_path_factory.mktemp("home")))
        try:
            return load_library(compile_c(read_sources(), flags=BUILDS[request.param]))
        except KernelError as error:
            if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # all flags are known
                raise
            pytest.skip(str(error))


def run_build(library, x, layer, threads=1):
    w = layer.packed
    y = x.new_empty(len(x), w.out_features)
    addresses = [t if t is None else t.data_ptr() for t in (w.codes, w.scales, w.zeros, layer.bias)]
    weight = Weight(*addresses, w.in_features, w.out_features, w.padded, w.group, w.block, w.bits)
    assert library.packed_linear(weight, x.data_ptr(), y.data_ptr(), len(x), threads) == 0
    return y


def naive(x: np.ndarray, codes: np.ndarray, scales, zeros, group: int, block: int) -> np.ndarray:
    """The formula of kernels.c, one number at a time: whole numbers in Python's own, floats in float32."""
    f32 = np.float32
    y = np.zeros((len(x), len(codes)), f32)
    for t, r in np.ndindex(y.shape):
        for start in range(0, x.shape[1], block):
            part = x[t, start : start + block]
            largest = np.abs(part).max()
            p = [int(v) for v in np.rint(part * (f32(127) / largest))] if largest > 1e-30 else [0] * len(part)
            dot = sum(int(q) * v for q, v in zip(codes[r, start : start + block], p, strict=True))
            g = start // group
            whole = f32(dot - int(zeros[r, g]) * sum(p))
            y[t, r] += (f32(scales[r, g]) * (largest / f32(127))) * whole
    return y


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_build_equals_the_naive_twin_bit_for_bit(build, scheme):
    weight, x = random(11, 192, seed=1), random(6, 192, seed=2)
    x[3, 64:128] = 0
    x[4] *= 1e-35
    qparams = choose_qparams(weight, scheme)
    codes = quantize(weight, qparams)
    layer = PackedLinear(PackedWeight.from_codes(codes, qparams))
    w = layer.packed
    groups = w.scales.shape[1]
    by_group = lambda p: (p.squeeze(-1) if qparams.group_size else p).expand(11, groups).numpy()  # noqa: E731
    expected = naive(x.numpy(), codes.numpy(), by_group(qparams.scale), by_group(qparams.zero_point), w.group, w.block)
    assert torch.equal(run_build(build, x, layer), torch.from_numpy(expected))
    assert torch.equal(packed_linear_torch(*arguments(x, layer)), torch.from_numpy(expected))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_build_equals_pytorch_on_random_shapes(build, data):
    out, tokens, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 40)), data.draw(seeds)
    bits, symmetric = data.draw(st.sampled_from([2, 3, 4, 5, 8])), data.draw(st.booleans())
    group = data.draw(st.sampled_from([None, 32, 64, 96, 128]))
    n = data.draw(st.integers(1, 200)) if group is None else group * data.draw(st.integers(1, 3))
    scheme = Scheme(bits, symmetric, "channel" if group is None else "group", group)
    bias = random(out, seed=seed + 2) if data.draw(st.booleans()) else None
    layer = PackedLinear(PackedWeight.from_float(random(out, n, seed=seed), scheme), bias)
    x = random(tokens, n, seed=seed + 1) * 10.0 ** data.draw(st.integers(-38, 30))
    expected = packed_linear_torch(*arguments(x, layer))
    assert torch.equal(run_build(build, x, layer, threads=data.draw(st.integers(1, 3))), expected)
    for t in range(tokens):  # one token alone gets the bits that it gets among others
        assert torch.equal(run_build(build, x[t : t + 1], layer)[0], expected[t])


def run_floats(library, x, weight, bias=None, threads=1):
    y = np.full((len(x), len(weight)), 7, np.float32)
    library.packed_linear(float_weight(weight, bias), x.ctypes.data, y.ctypes.data, len(x), threads)
    return y


def fused_in_lanes(x, weight, bias):
    """The formula of kernels.c for float32, one number at a time, by the C library's fused multiply-add."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    y = np.zeros((len(x), len(weight)), np.float32)
    for t, r in np.ndindex(y.shape):
        lanes = np.zeros(8, np.float32)
        for k, (a, b) in enumerate(zip(weight[r], x[t], strict=True)):
            lanes[k % 8] = fmaf(a, b, lanes[k % 8])
        while len(lanes) > 1:
            lanes = lanes[::2] + lanes[1::2]
        y[t, r] = lanes[0] + (0 if bias is None else bias[r])
    return y


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_build_gives_floats_the_bits_of_the_formula(build, data):
    out, n, tokens = (data.draw(st.integers(low, high)) for low, high in ((1, 20), (1, 40), (0, 15)))
    draws = np.random.default_rng(data.draw(seeds))
    weight, bias = draws.standard_normal((out, n), np.float32), draws.standard_normal(out, np.float32)
    x = draws.standard_normal((tokens, n), np.float32) * np.float32(10.0 ** data.draw(st.integers(-40, 30)))
    bias = bias if data.draw(st.booleans()) else None
    expected = fused_in_lanes(x, weight, bias)
    assert np.array_equal(run_floats(build, x, weight, bias, threads=data.draw(st.integers(1, 3))), expected)
    for t in range(tokens):  # one token alone gets the bits that it gets among others
        assert np.array_equal(run_floats(build, x[t : t + 1], weight, bias)[0], expected[t])


@pytest.mark.parametrize(("tokens", "out", "n"), [(1, 100, 257), (7, 24, 1000), (33, 17, 64)])
def test_floats_multiply_as_in_float64(build, tokens, out, n):
    draws = np.random.default_rng(0)
    weight, x = draws.standard_normal((out, n), np.float32), draws.standard_normal((tokens, n), np.float32)
    bound = n / 8 * 2**-24 * (np.abs(x) @ np.abs(weight.T))  # the longest lane's roundings, and a few more
    assert (np.abs(run_floats(build, x, weight) - x.astype(float) @ weight.T.astype(float)) <= bound + 1e-6).all()


def test_floats_that_are_not_finite_stay_with_their_token_and_row(build):
    draws = np.random.default_rng(0)
    weight, x = draws.standard_normal((11, 21), np.float32), draws.standard_normal((8, 21), np.float32)
    expected = run_floats(build, x, weight)
    x[2, 20], x[5, 3], weight[7, 9] = np.nan, np.inf, np.nan
    y, others = run_floats(build, x, weight), np.delete(np.arange(11), 7)
    assert np.isnan(y[2]).all() and np.isnan(y[:, 7]).all() and np.isinf(y[5, others]).all()
    kept = np.ix_([0, 1, 3, 4, 6, 7], others)
    assert np.array_equal(y[kept], expected[kept])


def test_a_tie_is_rounded_as_c_rounds_it(build):
    """A number over a tensor is its reciprocal times the number in PyTorch (2.13), which rounds twice."""
    x = random(10, 192, seed=51298289)[9:, 128:160] * 1e-12
    largest = x.abs().max()
    assert ((x * (largest.new_tensor(127) / largest)).frac().abs() == 0.5).any()
    layer = PackedLinear(PackedWeight.from_float(random(1, 32), Scheme(8)), None)
    assert torch.equal(run_build(build, x, layer), packed_linear_torch(*arguments(x, layer)))


@pytest.mark.parametrize(("bits", "cache"), [(32, 32), (8, 32), (4, 32), (8, 8)])
def test_every_build_gives_a_whole_token_the_same_bits(build, bits, cache):
    if find_kernels()[0] is None:
        pytest.skip(find_kernels()[1])
    model, ids = tiny_model("llama-head-dim", head_dim=32), random_ids(12)[0].tolist()
    if bits == 32:
        decoder = fast_float_llama(model, max_length=40)
    else:
        decoder = fast_packed_llama(pack_model_(model, Scheme(bits)), max_length=40)
    found = []
    for library in (find_kernels()[0], build):
        tokens = FewTokens(library, decoder, int8_cache=cache == 8)
        read = tokens.read(ids, 0, 12)
        made = tokens.decode(3, 12, 20, ())
        found.append((*read, *made, *(array.copy() for array in tokens.caches)))
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_largest_codes_do_not_overflow(build):
    for bits, scheme in (
        (8, QParams(torch.tensor(1.0), torch.tensor(0), -128, 127)),
        (4, QParams(torch.tensor(1.0), torch.tensor(-8), -8, 7)),
    ):
        for code in (scheme.qmin, scheme.qmax):
            codes = torch.full((9, 256), code, dtype=torch.int8)
            layer = PackedLinear(PackedWeight.from_codes(codes, scheme))
            assert layer.packed.bits == bits
            for sign in (127.0, -127.0):
                y = run_build(build, torch.full((5, 256), sign), layer)
                assert y.unique().tolist() == [256 * sign * (code - int(scheme.zero_point))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gets_nan_and_the_others_do_not(build, bad):
    layer = PackedLinear.from_layer(nn.Linear(70, 9), Scheme(8))
    x = random(5, 70)
    expected = run_build(build, x, layer)
    x[2, 69] = bad
    for y in (run_build(build, x, layer), packed_linear_torch(*arguments(x, layer))):
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_zero_inputs_zero_rows_and_constants_are_exact(build):
    weight = torch.zeros(10, 64)
    weight[1] = 0.5
    layer = PackedLinear(PackedWeight.from_float(weight, Scheme(8)), torch.arange(10.0))
    y = run_build(build, torch.stack([torch.zeros(64), torch.ones(64)]), layer)
    assert y[0].tolist() == list(range(10))
    torch.testing.assert_close(y[1], torch.arange(10.0) + 32 * (torch.arange(10) == 1))


def test_quantize_tokens_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.5] + [0.0] * 61 + [4.0]])
    codes, scales = quantize_tokens(x, padded=128, block=64)
    assert codes[0, 0, :4].tolist() == [64, -127, 32, 0]  # 63.5 and 31.75
    assert codes[0, 1, :2].tolist() == [127, 0]
    torch.testing.assert_close(scales.flatten(), torch.tensor([2 / 127, 4 / 127]))


def test_pack_codes_by_hand():
    codes = torch.arange(8)[:, None].repeat(1, 32).to(torch.uint8)  # row r holds r everywhere
    codes[0] = torch.arange(32) // 2
    packed = pack_codes(codes, bits=4)
    assert packed[:8].tolist() == [
        0x80,
        0x80,
        0x91,
        0x91,
        0x11,
        0x11,
        0x11,
        0x11,
    ]  # k 0..3 and 16..19
    assert pack_codes(codes, bits=8)[:8].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 4))
def test_unpack_codes_undoes_pack_codes(seed, bits, tiles, chunks):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (8 * tiles, 32 * chunks), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits=bits)
    assert packed.numel() == codes.numel() * bits // 8
    assert torch.equal(unpack_codes(packed.view(tiles, chunks, bits, 8, 4), bits=bits), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_keeps_codes_scales_and_values(scheme):
    weight = random(13, 192)
    qparams = choose_qparams(weight, scheme)
    codes = quantize(weight, qparams)
    packed = PackedWeight.from_codes(codes, qparams)
    found, _, _ = packed.unpack()
    assert torch.equal(found, codes.int())
    assert torch.equal(packed.dequantize(), dequantize(codes, qparams))
    rows = torch.tensor([12, 0, 7])
    assert torch.equal(packed.dequantize(rows), packed.dequantize()[rows])


@pytest.mark.skipif(not PROC_SELF.exists(), reason="needs Linux's /proc")
def test_packing_a_large_matrix_takes_no_second_copy():
    weight = torch.ones(16_384, 1024)
    qparams = choose_qparams(weight, Scheme(8))
    codes = quantize(weight, qparams)
    works = {
        1.75 * weight.nbytes: lambda: quantize(weight, qparams),
        1.5 * codes.nbytes: lambda: PackedWeight.from_codes(codes, qparams),
    }
    for nbytes, work in works.items():
        before = status_bytes("VmRSS")
        with peak_memory() as peak:
            work()
        assert peak.host_bytes - before < nbytes


def test_packed_bytes_by_hand():
    packed = PackedWeight.from_float(random(16, 128), Scheme(4, granularity="group", group_size=64))
    assert packed.nbytes == 16 * 128 // 2 + 16 * 2 * 4
    packed = PackedWeight.from_float(random(16, 128), Scheme(8, symmetric=False))
    assert packed.nbytes == 16 * 128 + 16 * 4 + 16 * 4


def test_rounding_inputs_costs_what_the_formula_allows():
    layer = PackedLinear.from_layer(nn.Linear(512, 64), Scheme(4, granularity="group", group_size=64))
    x = random(20, 512, seed=3)
    weight = layer.packed.dequantize()
    exact = nn.functional.linear(x, weight, layer.bias)
    _, steps = quantize_tokens(x, padded=512, block=64)
    bound = (steps[:, :, 0] / 2) @ weight.abs().unflatten(1, (-1, 64)).sum(dim=2).T
    error = (layer(x) - exact).abs()
    assert (error <= bound * (1 + 1e-5) + 1e-6).all()
    assert 0.002 < (error.norm() / (exact - layer.bias).norm()) < 0.01


@pytest.mark.parametrize("with_kernels", [True, False])
def test_operator_passes_pytorchs_own_checks(monkeypatch, with_kernels):
    if not with_kernels:
        monkeypatch.setattr(packed_ops, "find_kernels", lambda: (None, "none"))
    layer = PackedLinear.from_layer(nn.Linear(64, 12), Scheme(4, symmetric=False))
    torch.library.opcheck(
        packed_linear, arguments(random(2, 3, 64), layer), test_utils=("test_schema", "test_faketensor")
    )
    assert layer(random(2, 3, 64)).shape == (2, 3, 12)
    assert layer(random(0, 64)).shape == (0, 12)


def test_linear_accepts_other_dtypes_and_strides():
    layer = PackedLinear.from_layer(nn.Linear(64, 12), Scheme(8))
    x = random(64, 6).T
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, granularity="group", group_size=32)], ids=["int8", "int4"])
def test_pack_model_replaces_every_linear_and_keeps_the_logits(name, scheme):
    model, ids = tiny_model(name), random_ids(12)
    count = len(list(linear_layers(model, with_head=True)))
    expected = tiny_model(name)
    for _, layer in linear_layers(expected, with_head=True):
        qparams = choose_qparams(weight_of(layer), scheme)
        rounded = dequantize(quantize(weight_of(layer), qparams), qparams)
        weight = layer.weight.data
        weight.copy_(rounded if weight.shape == rounded.shape and isinstance(layer, nn.Linear) else rounded.T)
    pack_model_(model, scheme)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == count
    assert not list(linear_layers(model, with_head=True))
    logits, reference = (decode.forward_logits(m, ids) for m in (model, expected))
    assert (logits - reference).norm() / reference.norm() < 0.03  # the inputs are rounded too


def test_packed_models_generate_through_the_same_functions():
    model, ids = pack_model_(tiny_model("llama-gqa-tied"), Scheme(8)), random_ids(6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    for generate in (decode.generate_naive, decode.generate_cached, decode.generate_static):
        assert torch.equal(generate(model, ids, 8), expected)


def test_no_float_matrix_stays_in_a_tied_model():
    model = tiny_model("llama-gqa-tied")
    pack_model_(model, Scheme(4, granularity="group", group_size=32))
    assert all(parameter.ndim == 1 for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and embedding.packed is head.packed
    assert all(t.dtype == torch.uint8 for m in model.modules() if isinstance(m, PackedWeight) for t in [m.codes])


@pytest.mark.parametrize("token_id", [-1, 11, 15, 16])
def test_an_embedding_refuses_what_is_no_token(token_id):
    table = PackedEmbedding(PackedWeight.from_float(torch.randn(11, 32), Scheme(8)))  # two tiles, five rows of padding
    assert torch.equal(table(torch.tensor([[0, 10]]))[0], table.packed.dequantize()[[0, 10]])
    assert table(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 32)
    with pytest.raises(IndexError, match=f"^token ids must be 0 to 10; got {token_id}$"):
        table(torch.tensor([[3, token_id]]))


def test_untied_embeddings_stay():
    model = pack_model_(tiny_model("llama-untied-bias"), Scheme(8))
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.get_output_embeddings(), PackedLinear)


GROUP_16, GROUP_64 = (Scheme(4, granularity="group", group_size=size) for size in (16, 64))


def one_code(code, *, scale=1.0):
    qparams = QParams(torch.tensor(scale), torch.tensor(0), -7, 7)
    return PackedWeight.from_codes(torch.full((1, 8), code, dtype=torch.int8), qparams)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: PackedWeight.from_float(torch.full((2, 64), torch.nan), Scheme()), "finite"),
        (lambda: PackedWeight.from_float(torch.full((2, 64), torch.inf), Scheme()), "finite"),
        (lambda: PackedWeight.from_float(torch.ones(2, 48), GROUP_16), "multiple of 32 that divides .*=48; got 16"),
        (lambda: one_code(8), "codes must lie in -7 … 7; got 8 … 8"),
        (lambda: one_code(7, scale=torch.nan), "scales must be finite"),
        (lambda: PackedLinear.from_layer(nn.Linear(64, 2), Scheme())(torch.zeros(1, 65)), "in_features=64; got shape"),
        (lambda: PackedWeight(in_features=8, out_features=1, bits=3), "4 or 8 bits; got 3"),
        (lambda: pack_model_(tiny_model("gpt2"), GROUP_64), "h.0.attn.c_attn: group_size"),
    ],
)
def test_bad_input_states_the_rule(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def test_without_a_compiler_pytorch_serves_with_the_same_bits(monkeypatch):
    if find_kernels()[0] is None:
        pytest.skip("no C compiler here")
    layer, x = PackedLinear.from_layer(nn.Linear(96, 20), Scheme(4)), random(3, 96)
    expected = layer(x)
    monkeypatch.setattr(packed_ops, "find_kernels", lambda: (None, "no C compiler"))
    assert torch.equal(layer(x), expected)
