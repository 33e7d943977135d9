"""One stream on packed weights: C steps equal NumPy's, fused layers equal separate ones, memory is shared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMAS, random_ids, tiny_model
from torch import nn

from labutils.generation.decode import forward_logits
from labutils.generation.llama_steps import Steps
from labutils.models import quantized
from labutils.models.quantized import fast_packed_llama
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import KernelError, find_kernels
from labutils.quantization.packed import PackedLinear, pack_model_
from labutils.quantization.packed_steps import Arena, FusedPacked, PackedSteps, arena_bytes

LIBRARY, REASON = find_kernels()
needs_kernels = pytest.mark.skipif(LIBRARY is None, reason=REASON)
seeds = st.integers(0, 2**31)
GROUP_32 = Scheme(4, granularity="group", group_size=32)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 40), st.floats(0.01, 200))
def test_rms_norm_and_swiglu_equal_numpy(seed, n, spread):
    ours, plain = PackedSteps(LIBRARY, Steps(), max_length=1), Steps()
    x, gain = spread * array(1, n, seed=seed), array(n, seed=seed + 1)
    np.testing.assert_allclose(ours.rms_norm(x, gain, np.float32(1e-5)), plain.rms_norm(x, gain, 1e-5), rtol=2e-5)
    gate_up = spread * array(1, 2 * n, seed=seed)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(ours.swiglu(gate_up), plain.swiglu(gate_up), rtol=1e-5, atol=1e-30)


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    seeds, st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16, 64]), st.integers(0, 20), st.floats(0.1, 20)
)
def test_attend_equals_numpy(seed, kv_heads, groups, dim, start, spread):
    ours, plain = PackedSteps(LIBRARY, Steps(), max_length=24), Steps()
    keys, values = (array(kv_heads, 24, dim, seed=seed + i) for i in (0, 1))
    qkv = spread * array(1, (groups + 2) * kv_heads * dim, seed=seed + 2)
    angles = array(1, dim // 2, seed=seed + 3).repeat(2, axis=0).reshape(1, dim)
    stores = [(keys.copy(), values.copy()) for _ in range(2)]
    results = [
        steps.attend(qkv.copy(), *store, np.cos(angles), np.sin(angles), start)
        for steps, store in zip((ours, plain), stores, strict=True)
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
    for mine, its in zip(*stores, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_steps_never_swallow_what_is_not_finite(bad):
    steps = PackedSteps(LIBRARY, Steps(), max_length=4)
    x = np.array([[1.0, bad] + [1.0] * 14], np.float32)
    assert np.isnan(steps.rms_norm(x, np.ones(16, np.float32), np.float32(1e-5))).any()
    assert not np.isfinite(steps.swiglu(x)).all()
    keys, values = array(1, 4, 8), array(1, 4, 8, seed=1)
    keys[0, 1] = np.nan  # a token that went wrong earlier
    ones, zeros = np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32)
    assert np.isnan(steps.attend(array(1, 24), keys, values, ones, zeros, 2)).all()


@needs_kernels
@pytest.mark.parametrize("mixed", [False, True], ids=["one scheme", "two schemes"])
def test_fused_layers_equal_separate_ones_and_share_their_memory(mixed):
    schemes = [Scheme(8), Scheme(4, symmetric=False) if mixed else Scheme(8)]
    layers = [PackedLinear.from_layer(nn.Linear(70, out), s) for out, s in zip((16, 13), schemes, strict=True)]
    x = torch.from_numpy(array(5, 70))
    expected = torch.cat([layer(x) for layer in layers], dim=1)
    fused = FusedPacked(LIBRARY, Arena(arena_bytes(layers)), *layers)
    assert len(fused.parts) == (2 if mixed else 1)
    assert np.array_equal(fused(x.numpy(), "numpy"), expected.numpy())
    for t in range(5):
        assert np.array_equal(fused(x[t : t + 1].numpy(), "numpy"), expected[t : t + 1].numpy())
    assert torch.equal(torch.cat([layer(x) for layer in layers], dim=1), expected)
    if not mixed:
        shared = layers[0].packed.codes.untyped_storage().data_ptr()
        assert layers[1].packed.codes.untyped_storage().data_ptr() == shared


def test_arena_hands_out_aligned_pieces_until_it_is_full():
    arena = Arena(0)
    first = arena.put([torch.arange(3, dtype=torch.uint8), torch.arange(2, dtype=torch.uint8)])
    second = arena.put([torch.ones(2, 3)])
    assert first.tolist() == [0, 1, 2, 0, 1] and second.tolist() == [[1.0] * 3] * 2
    assert second.data_ptr() - first.data_ptr() == 64
    with pytest.raises(ValueError, match="must have room; got 4194304 bytes"):
        arena.put([torch.zeros(2**20)])


@needs_kernels
@pytest.mark.parametrize("name", [*LLAMAS, "qwen2"])
@pytest.mark.parametrize("scheme", [Scheme(8), GROUP_32], ids=["int8", "int4"])
def test_fast_packed_llama_equals_the_packed_model(name, scheme):
    model, ids = pack_model_(tiny_model(name), scheme), random_ids(12)
    expected = forward_logits(model, ids)
    tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
    fast = fast_packed_llama(model, max_length=30)
    # The same weights; inputs may round to a neighbouring code where a norm differs in its last bit.
    torch.testing.assert_close(fast.prefill(ids[:, :8]), expected[:, 7], atol=0.02, rtol=0)
    for i in range(8, 12):
        torch.testing.assert_close(fast.decode_one_token(ids[:, i]), expected[:, i], atol=0.02, rtol=0)
    assert (fast.generate(ids, 10) == tokens).float().mean() > 0.9
    assert torch.equal(forward_logits(model, ids), expected)  # and the model still works, on shared memory


@needs_kernels
def test_weight_bytes_are_those_of_the_packed_layers():
    model = pack_model_(tiny_model("llama-gqa-tied"), Scheme(8))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    gains = sum(parameter.nbytes for parameter in model.parameters())
    assert fast_packed_llama(model, max_length=8).weight_bytes == sum(layer.packed.nbytes for layer in layers) + gains


def test_fast_packed_llama_without_kernels_says_why(monkeypatch):
    monkeypatch.setattr(quantized, "find_kernels", lambda: (None, "no C compiler"))
    with pytest.raises(KernelError, match="no C compiler"):
        fast_packed_llama(tiny_model("llama-gqa-tied"), max_length=8)
