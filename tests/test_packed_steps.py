"""One stream on packed weights: C steps equal NumPy's, fused layers equal separate ones, memory is shared."""

import copy
import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMAS, random_ids, tiny_model
from torch import nn

from labutils.course.bench.subject import speed_subject
from labutils.generation.decode import forward_logits
from labutils.generation.sampling import Sampler, draw
from labutils.lab.layers.compile import compile_c
from labutils.lab.layers.linears import linear_layers
from labutils.lab.models import quantized
from labutils.lab.models.quantized import fast_float_llama, fast_packed_llama
from labutils.measurement.limits import status_bytes
from labutils.measurement.resources import peak_memory
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import KernelError, find_kernels, load_library, read_sources
from labutils.quantization.packed import PackedLinear, pack_model_, replace_packed_
from labutils.quantization.packed_ops import quantize_tokens
from labutils.quantization.packed_steps import Arena, FewTokens, FusedPacked, arena_bytes

LIBRARY, REASON = find_kernels()
SMAPS = Path("/proc/self/smaps")
needs_kernels = pytest.mark.skipif(LIBRARY is None, reason=REASON)
seeds = st.integers(0, 2**31)
INT8, GROUP_32 = Scheme(8), Scheme(4, granularity="group", group_size=32)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def steps_of(model, *, max_length=24):
    """The same packed model twice: with NumPy between its matrices, and in one call into C."""
    in_c = fast_packed_llama(model, max_length=max_length)
    assert in_c.few_tokens is not None
    plain = fast_packed_llama(model, max_length=max_length)
    plain.few_tokens = None
    return in_c, plain


def through_layers(steps: FewTokens, hidden: np.ndarray, position: int) -> None:
    """Hidden states through all layers in C, without embedding and head."""
    steps._place(len(hidden), position)
    steps._run(hidden, steps.decoder.cos[position], steps.decoder.sin[position], steps.rows)


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
    through_layers(in_c.few_tokens, ours, start)
    plain._through_layers(expected, start, start + rows)
    # an input may round to the neighbouring code where a norm differs in its last bit: 1/127 of its block's largest
    assert np.abs(ours - expected).max() <= 0.03 * np.abs(expected).max()
    assert np.abs(in_c.keys - plain.keys).max() <= 0.03 * np.abs(plain.keys).max()
    assert np.abs(in_c.values - plain.values).max() <= 0.03 * np.abs(plain.values).max()
    assert np.array_equal(in_c.keys[:, :, start + rows :], plain.keys[:, :, start + rows :])  # nothing beyond them


MAKERS = {
    "float32": fast_float_llama,
    "int8": lambda model, **sizes: fast_packed_llama(pack_model_(model, Scheme(8)), **sizes),
    "int4": lambda model, **sizes: fast_packed_llama(pack_model_(model, GROUP_32), **sizes),
}


@needs_kernels
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 13, 32, 100])
def test_several_tokens_have_the_bits_of_one_after_the_other(kind, rows):
    ids, (alone, together) = random_ids(106), (MAKERS[kind](tiny_model("qwen2"), max_length=106) for _ in range(2))
    for decoder in (alone, together):
        decoder.prefill(ids[:, :6])
    text = ids[0, 6 : 6 + rows].tolist()
    expected = torch.cat([alone.extend([token]).clone() for token in text])
    assert torch.equal(together.extend(text), expected)
    assert np.array_equal(alone.keys, together.keys) and np.array_equal(alone.values, together.values)


@needs_kernels
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias"])
def test_a_token_starts_from_its_row_of_the_embedding(kind, name):
    decoder = MAKERS[kind](tiny_model(name), max_length=97)
    decoder.few_tokens.shape.layers = 0
    for token in range(97):
        decoder.extend([token])
        assert np.array_equal(decoder.few_tokens.hidden[:1], decoder.embedding(torch.tensor([token])).numpy(force=True))
    every = decoder.embedding(torch.arange(97)).numpy(force=True)
    assert np.array_equal(decoder.few_tokens.embed(range(97)), every)


@needs_kernels
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias", "qwen2"])
def test_blocks_in_c_hold_the_tokens_chosen_one_by_one(kind, name):
    decoder, ids = MAKERS[kind](tiny_model(name), max_length=40), random_ids(5)
    expected = decoder.generate(ids, 30, choose=lambda logits: logits.argmax(dim=-1))[0, 5:].tolist()
    states = (decoder.length, decoder.hidden, decoder.keys.copy())
    assert decoder.generate(ids, 30)[0, 5:].tolist() == expected
    assert decoder.length == states[0] and all(map(np.array_equal, (decoder.hidden, decoder.keys), states[1:]))
    for size in (1, 7, 40):
        decoder.truncate(5)
        assert [t for made in decoder.blocks(expected[0], 29, size=size) for t in made] == expected[1:]
    stop = expected[17]
    until = expected[: expected.index(stop) + 1]
    assert decoder.generate(ids, 30, stop=(-1, stop, 5000))[0, 5:].tolist() == until
    assert decoder.length == 5 + len(until) - 1


@needs_kernels
def test_blocks_fill_the_cache_and_then_refuse():
    decoder = MAKERS["int8"](tiny_model("llama-gqa-tied"), max_length=9)
    decoder.prefill(random_ids(5))
    blocks = decoder.blocks(1, 5)
    assert len(next(blocks)) == 4 and decoder.length == 9
    with pytest.raises(ValueError, match="max_length=9 positions; got 9 to 10"):
        next(blocks)


@needs_kernels
def test_a_prompt_may_take_more_calls_than_python_nests():
    model = pack_model_(tiny_model("llama-gqa-tied", max_position_embeddings=2400), Scheme(8))
    decoder = fast_packed_llama(model, max_length=2400)
    ids = random_ids(2301)[0].tolist()
    hidden, logits = decoder.few_tokens.read(ids, 0, 5)
    decoder.few_tokens.chunk = 2
    again = decoder.few_tokens.read(ids, 0, 5)
    assert np.array_equal(again[0], hidden) and torch.equal(again[1], logits) and logits.shape == (5, 97)


@needs_kernels
@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias"])
@pytest.mark.parametrize("wrong", [-1, 97, 10**6])
def test_an_id_that_is_no_token_s_is_refused_before_c_reads_its_row(name, wrong):
    decoder = MAKERS["int8"](tiny_model(name), max_length=24)
    decoder.prefill(random_ids(3))
    one = torch.tensor([wrong])
    for feed in (
        lambda: decoder.decode_one_token(one),
        lambda: decoder.extend([1, wrong]),
        lambda: next(decoder.blocks(wrong, 4)),
        lambda: decoder.few_tokens.embed([1, wrong]),
    ):
        with pytest.raises(IndexError, match=f"token ids must be 0 to 96; got {wrong}"):
            feed()
        assert decoder.length == 3
    with pytest.raises(ValueError, match="at least 1 token; got 0"):
        next(decoder.blocks(1, 4, size=0))


@needs_kernels
@settings(deadline=None, max_examples=30)
@given(seed=seeds, distinct=st.integers(1, 4), bad=st.sampled_from([None, np.nan, np.inf, -np.inf]))
def test_the_choice_in_c_is_pytorchs_on_ties_and_without_numbers(seed, distinct, bad):
    model, rng = tiny_model("llama-untied-bias"), np.random.default_rng(seed)
    with torch.no_grad():
        rows = model.lm_head.weight[:distinct].clone()
        model.lm_head.weight.copy_(rows[torch.from_numpy(rng.integers(distinct, size=97))])
        if bad is not None:
            model.lm_head.weight[torch.from_numpy(rng.integers(97, size=2))] = bad
    decoder = fast_float_llama(model, max_length=4)
    chosen = int(decoder.extend([3]).argmax())
    decoder.truncate(0)
    assert next(decoder.blocks(3, 1)) == [chosen]


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    temperature=st.floats(0.1, 3),
    top_k=st.one_of(st.none(), st.integers(1, 120)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_a_token_drawn_in_c_is_the_sampler_s(seed, temperature, top_k, top_p):
    decoder = fast_float_llama(tiny_model("llama-untied-bias", seed=seed % 5), max_length=30)
    sampler, alone = (
        Sampler(torch.Generator().manual_seed(seed), temperature=temperature, top_k=top_k, top_p=top_p) for _ in "ab"
    )
    made, token = [t for block in decoder.blocks(3, 20, choose=sampler) for t in block], 3
    uniforms = alone.uniforms(20)
    decoder.truncate(0)
    for given_, uniform in zip(made, uniforms, strict=True):
        probs = alone.probs(decoder.extend([token]))[0].double()
        reached = probs.cumsum(0) / probs.sum()
        expected = int(draw(probs[None], uniform[None]))
        if top_p is None or (probs.sort().values.cumsum(0) - (1 - top_p)).abs().min() > 1e-6:
            assert given_ == expected or (reached - uniform).abs().min() < 1e-6
        token = given_


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(bad):
    model = tiny_model("llama-untied-bias")
    with torch.no_grad():
        model.lm_head.weight[7] = bad
    decoder, sampler = fast_float_llama(model, max_length=8), Sampler(torch.Generator())
    with pytest.raises(ValueError, match="drawn from finite logits; got NaN or infinity"):
        next(decoder.blocks(3, 4, choose=sampler))
    with pytest.raises(ValueError, match="drawn from finite logits; got NaN or infinity"):
        sampler(decoder.extend([3]))
    with pytest.raises(ValueError, match="temperature must be positive"):
        next(decoder.blocks(3, 4, choose=Sampler(torch.Generator(), temperature=0)))


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_layers_never_swallow_what_is_not_finite(bad):
    decoder, _ = steps_of(pack_model_(tiny_model("llama-gqa-tied"), Scheme(8)))
    hidden = array(1, 32)
    hidden[0, 5] = bad
    through_layers(decoder.few_tokens, hidden, 0)
    assert np.isnan(hidden).all()
    hidden = array(1, 32)
    decoder.keys.fill(0)
    decoder.values.fill(0)
    decoder.keys[0, 0, 0] = np.nan  # a token that went wrong earlier
    through_layers(decoder.few_tokens, hidden, 1)
    assert np.isnan(hidden).all()


SHIM = """
void fill_and_attend(
    const float *q, const float *k, const float *v, float *out, const Layer *l, const Shape *s, int64_t n) {
    for (int64_t p = 0; p < n; p++)
        for (int64_t kv = 0, at; kv < s->kv_heads; kv++) {
            at = (p * s->kv_heads + kv) * s->dim;
            store_rounded(k + at, v + at, l, s, kv, p);
        }
    for (int64_t kv = 0, group = s->heads / s->kv_heads; kv < s->kv_heads; kv++)
        for (int64_t h = 0, at; h < group; h += SHARE) {
            at = (kv * group + h) * s->dim;
            attend_rounded(q + at, out + at, s->scores, l, s, kv, n, h + SHARE < group ? SHARE : group - h);
        }
}
"""


EXPONENTIALS = """
void exponentials_of(float *x, float *sum, int64_t length, int64_t room) { *sum = exponentials(x, length, room, 1); }
"""


@needs_kernels
@pytest.mark.parametrize("flags", [("-march=native",), ("-DSCALAR",)], ids=["native", "plain C"])
def test_exponentials_equal_numpys_and_leave_nothing_behind_the_last(flags):
    library = load_library(compile_c(read_sources() + EXPONENTIALS, flags=flags))
    x, total = np.full(1024, np.nan, np.float32), np.empty(1, np.float32)
    x[:1000] = np.linspace(-99, 0, 1000)
    expected = np.exp(x[:1000].astype(float))
    addresses = [ctypes.c_void_p(each.ctypes.data) for each in (x, total)]
    library.exponentials_of(*addresses, ctypes.c_int64(1000), ctypes.c_int64(1024))
    assert np.abs(x[:1000] / expected - 1)[expected > 2e-38].max() < 2e-6
    assert not x[:1000][expected < 1e-38].any() and not x[1000:].any()
    assert total[0] == pytest.approx(expected.sum(), rel=1e-6)
    x[3] = np.nan
    library.exponentials_of(*addresses, ctypes.c_int64(1000), ctypes.c_int64(1008))
    assert np.isnan(x[3]) and np.isnan(total[0])


def rounded_decoder(dim: int, heads: int, *, scheme: Scheme = INT8, max_length: int = 150):
    model = pack_model_(tiny_model("llama-head-dim", head_dim=dim, num_attention_heads=heads), scheme)
    return model, fast_packed_llama(model, max_length=max_length, int8_cache=True)


@needs_kernels
@pytest.mark.parametrize(("dim", "heads"), [(32, 2), (64, 4), (96, 10), (128, 6)])
def test_int8_attention_equals_its_formula_on_rounded_numbers(dim, heads):
    library, (_, decoder) = (
        load_library(compile_c(read_sources() + SHIM, flags=("-march=native",))),
        rounded_decoder(dim, heads),
    )
    part = 64 if dim % 64 == 0 else 32
    steps = decoder.few_tokens
    for length in (1, 8, 63, 64, 65, 150):
        q, k, v = 3 * array(heads, dim, seed=1), array(length, 2, dim, seed=2), array(length, 2, dim, seed=3)
        k[0] *= 3  # a first position that much attention goes to, as in trained models
        k[:, :, 5] += 20
        out = np.empty_like(q)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (q, k, v, out)]
        library.fill_and_attend(*pointers, steps.layers, ctypes.byref(steps.shape), ctypes.c_int64(length))
        rounded = []
        for x in (q, k, v):
            codes, scales = quantize_tokens(torch.from_numpy(x).reshape(-1, dim), padded=dim, block=part)
            rounded.append((codes.double() * scales.double()).reshape(x.shape))
        keys, values = (x.repeat_interleave(heads // 2, dim=1) for x in rounded[1:])
        weights = (torch.einsum("hd,phd->hp", rounded[0], keys) / dim**0.5).softmax(dim=1)
        expected = torch.einsum("hp,phd->hd", weights, values).numpy()
        assert np.abs(out - expected).max() <= 3e-4 * np.abs(v).max()


@needs_kernels
@pytest.mark.parametrize(("dim", "heads"), [(64, 2), (96, 4)])
def test_int8_cache_stays_near_float_and_reads_any_number_of_tokens(dim, heads):
    model, decoder = rounded_decoder(dim, heads)
    ids, exact = random_ids(120), fast_packed_llama(model, max_length=150)
    expected = torch.cat([exact.extend(part).clone() for part in ids[0].view(4, 30).tolist()])
    logits = decoder.extend(ids[0].tolist())
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.std()
    decoder.truncate(0)
    one_by_one = torch.cat([decoder.extend([token]).clone() for token in ids[0].tolist()])
    assert torch.equal(one_by_one, logits)
    decoder.truncate(0)
    assert torch.equal(decoder.prefill(ids), logits[-1:]) and np.array_equal(decoder.generate(ids, 3)[:, :120], ids)


@needs_kernels
def test_int8_cache_lets_nan_through_and_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="heads of a multiple of 32 numbers; got 16"):
        rounded_decoder(16, 4)
    _, decoder = rounded_decoder(64, 2)
    decoder.prefill(random_ids(3))
    with pytest.raises(ValueError, match="must be float32; got int8"):
        decoder.few_tokens.paged(array(1, 32), np.array([3]), [np.zeros(3, np.int64)], 16)
    decoder.few_tokens.caches[3][0, 0, 5] = np.nan  # behind what is read next: forgotten
    assert decoder.extend([1]).isfinite().all()
    decoder.few_tokens.caches[3][0, 0, 1] = np.nan  # the scale of a value
    assert decoder.extend([1]).isnan().all()


@needs_kernels
def test_mixed_schemes_go_through_numpy():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    for name, module in list(linear_layers(model, with_head=True)):
        replace_packed_(model, name, PackedLinear.from_layer(module, GROUP_32 if "q_proj" in name else Scheme(8)))
    decoder = fast_packed_llama(model, max_length=20)
    assert decoder.few_tokens is None
    with pytest.raises(ValueError, match="fused matrices of one scheme each"):
        fast_packed_llama(model, max_length=20, int8_cache=True)
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
    arena = Arena(64 + 24)
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
@pytest.mark.parametrize("scheme", [None, Scheme(8), GROUP_32], ids=["float32", "int8", "int4"])
def test_decoders_of_one_model_share_its_matrices_and_a_copy_has_its_own(scheme):
    model = tiny_model("llama-gqa-tied")
    make = fast_packed_llama if scheme else fast_float_llama
    model = pack_model_(model, scheme) if scheme else model

    def addresses(decoder):
        layer = decoder.layers[0]
        return {m.parts[0][0].codes for m in (layer.qkv, layer.gate_up, decoder.head)}

    first, second = make(model, max_length=20), make(model, max_length=30)
    assert addresses(first) == addresses(second) and len(addresses(first)) == 3
    assert addresses(make(copy.deepcopy(model), max_length=20)).isdisjoint(addresses(first))
    ids = random_ids(5)
    assert torch.equal(first.generate(ids, 8), second.generate(ids, 8))


@needs_kernels
@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc")
def test_a_decoder_of_a_float_model_takes_no_second_copy_of_its_weights():
    model = speed_subject(num_hidden_layers=2, vocab_size=4096).model
    before = status_bytes("VmRSS")
    with peak_memory() as peak:
        decoder = fast_float_llama(model, max_length=8)
    assert peak.host_bytes - before < 0.5 * decoder.weight_bytes


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
    expected = forward_logits(model, ids)
    in_c = fast_float_llama(model, max_length=30)
    assert torch.equal(forward_logits(model, ids), expected)  # the model reads the decoder's memory
    assert model.lm_head.weight.data_ptr() == in_c.head.array.ctypes.data
    numpy_steps = copy.copy(in_c)
    numpy_steps.few_tokens = None
    for decoder in (in_c, numpy_steps):  # they share one cache: each in its turn
        decoder.truncate(0)
        torch.testing.assert_close(decoder.extend(ids[0, :4].tolist()), expected[0, :4], atol=2e-5, rtol=1e-4)
        for i in range(4, 12):
            torch.testing.assert_close(decoder.decode_one_token(ids[:, i]), expected[:, i], atol=2e-5, rtol=1e-4)
    assert torch.equal(in_c.generate(ids, 10), model.generate(ids, max_new_tokens=10, do_sample=False))


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc")
def test_arena_is_private_memory_that_may_take_huge_pages():
    kept = Arena(2**22).put([torch.zeros(2**20)])
    address, flags, here = kept.data_ptr(), [], False
    for line in SMAPS.read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            first, end = (int(number, 16) for number in line.split()[0].split("-"))
            here = first <= address < end
        if here and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert "hg" in flags  # asked for; Linux has turned huge pages of shared memory off, whoever asks
    assert "sh" not in flags
