"""One stream on packed weights: C steps equal NumPy's, fused layers equal separate ones, memory is shared."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMAS, random_ids, tiny_model
from torch import nn

from labutils.generation.decode import forward_logits
from labutils.lab.layers.linears import linear_layers
from labutils.lab.models import quantized
from labutils.lab.models.quantized import FloatMatrix, fast_float_llama, fast_packed_llama
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import KernelError, find_kernels
from labutils.quantization.packed import PackedLinear, pack_model_, replace_packed_
from labutils.quantization.packed_steps import Arena, FusedPacked, arena_bytes

LIBRARY, REASON = find_kernels()
needs_kernels = pytest.mark.skipif(LIBRARY is None, reason=REASON)
seeds = st.integers(0, 2**31)
GROUP_32 = Scheme(4, granularity="group", group_size=32)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def steps_of(model, *, max_length=24):
    """The same packed model twice: with NumPy between its matrices, and in one call into C."""
    in_c = fast_packed_llama(model, max_length=max_length)
    assert in_c.few_tokens is not None
    plain = fast_packed_llama(model, max_length=max_length)
    plain.few_tokens = None
    return in_c, plain


@needs_kernels
@pytest.mark.parametrize("name", [*LLAMAS, "qwen2"])
@settings(deadline=None, max_examples=15)
@given(seed=seeds, start=st.integers(1, 16), rows=st.integers(1, 8), spread=st.sampled_from([0.001, 0.1, 3.0]))
def test_few_tokens_equal_numpy_between_the_same_matrices(name, seed, start, rows, spread):
    in_c, plain = steps_of(pack_model_(tiny_model(name), Scheme(8)))
    ids = random_ids(start, seed=seed)
    for decoder in (in_c, plain):
        decoder._through_layers(decoder.embedding(ids[0]).detach().numpy().copy(), 0, start)
    hidden = spread * array(rows, 32, seed=seed)
    ours, expected = hidden.copy(), hidden.copy()
    in_c.few_tokens(ours, start)
    plain._through_layers(expected, start, start + rows)
    # an input may round to the neighbouring code where a norm differs in its last bit: 1/127 of its block's largest
    assert np.abs(ours - expected).max() <= 0.03 * np.abs(expected).max()
    assert np.abs(in_c.keys - plain.keys).max() <= 0.03 * np.abs(plain.keys).max()
    assert np.abs(in_c.values - plain.values).max() <= 0.03 * np.abs(plain.values).max()
    assert np.array_equal(in_c.keys[:, :, start + rows :], plain.keys[:, :, start + rows :])  # nothing beyond them


@needs_kernels
@pytest.mark.parametrize("scheme", [Scheme(8), GROUP_32], ids=["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 13, 32])
def test_several_tokens_have_the_bits_of_one_after_the_other(scheme, rows):
    model, ids = pack_model_(tiny_model("llama-gqa-tied"), scheme), random_ids(40)
    alone, together = (fast_packed_llama(model, max_length=40) for _ in range(2))
    for decoder in (alone, together):
        decoder.prefill(ids[:, :6])
    text = ids[0, 6 : 6 + rows].tolist()
    expected = torch.cat([alone.extend([token]).clone() for token in text])
    assert torch.equal(together.extend(text), expected)
    assert np.array_equal(alone.keys, together.keys) and np.array_equal(alone.values, together.values)


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_layers_never_swallow_what_is_not_finite(bad):
    decoder, _ = steps_of(pack_model_(tiny_model("llama-gqa-tied"), Scheme(8)))
    hidden = array(1, 32)
    hidden[0, 5] = bad
    decoder.few_tokens(hidden, 0)
    assert np.isnan(hidden).all()
    hidden = array(1, 32)
    decoder.keys.fill(0)
    decoder.values.fill(0)
    decoder.keys[0, 0, 0] = np.nan  # a token that went wrong earlier
    decoder.few_tokens(hidden, 1)
    assert np.isnan(hidden).all()


@needs_kernels
def test_mixed_schemes_go_through_numpy():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    for name, module in list(linear_layers(model, with_head=True)):
        replace_packed_(model, name, PackedLinear.from_layer(module, GROUP_32 if "q_proj" in name else Scheme(8)))
    decoder = fast_packed_llama(model, max_length=20)
    assert decoder.few_tokens is None
    torch.testing.assert_close(decoder.prefill(ids), forward_logits(model, ids)[:, -1], atol=0.02, rtol=0)


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
    for make in (fast_packed_llama, fast_float_llama):
        with pytest.raises(KernelError, match="no C compiler"):
            make(tiny_model("llama-gqa-tied"), max_length=8)


@needs_kernels
@pytest.mark.parametrize("name", [*LLAMAS, "qwen2"])
def test_float_llama_in_c_equals_numpys_path_and_the_model(name):
    model, ids = tiny_model(name), random_ids(12)
    in_c = fast_float_llama(model, max_length=30)
    numpy_steps = copy.copy(in_c)
    assert in_c.few_tokens.max_tokens == 1  # so the tokens below go through C
    numpy_steps.few_tokens = None
    expected = forward_logits(model, ids)
    for decoder in (in_c, numpy_steps):  # they share one cache: each in its turn
        decoder.truncate(0)
        torch.testing.assert_close(decoder.prefill(ids[:, :1]), expected[:, 0], atol=2e-5, rtol=1e-4)
        for i in range(1, 12):
            torch.testing.assert_close(decoder.decode_one_token(ids[:, i]), expected[:, i], atol=2e-5, rtol=1e-4)
    assert torch.equal(in_c.generate(ids, 10), model.generate(ids, max_new_tokens=10, do_sample=False))


@needs_kernels
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 31), (8, 32), (5, 33), (7, 100)])
def test_float_matrix_multiplies_as_torch_for_any_shape(outputs, inputs):
    layer = nn.Linear(inputs, outputs)
    matrix, x, y = FloatMatrix(layer), array(3, inputs), np.empty((3, outputs), np.float32)
    for threads in (1, 2):
        LIBRARY.packed_linear(matrix.parts[0][0], x.ctypes.data, y.ctypes.data, 3, threads)
        expected = nn.functional.linear(torch.from_numpy(x).double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(torch.from_numpy(y).double(), expected, atol=1e-5, rtol=1e-5)
