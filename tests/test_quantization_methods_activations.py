"""Integer activations, folds, SmoothQuant, rotation, the KV cache and training: functions kept, outliers survived."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, random_ids, tiny_model
from transformers import BertConfig, BertModel

from labutils.lab.layers.calibration import input_statistics
from labutils.lab.layers.linears import linear_layers
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.load import load_model
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.folding import Fold, folds, inject_outliers_, scale_inputs_
from labutils.quantization.integer_linear import IntegerLinear, integer_product, llm_int8, use_integers_
from labutils.quantization.kv_cache import PackedBlock, QuantizedKVCache
from labutils.quantization.qat import straight_through, train_quantized_
from labutils.quantization.rotation import fold_gains_, hadamard, rotate_
from labutils.quantization.smoothquant import smooth_, smoothing_scale

FOLDABLE = list(CONFIGS)
LLAMA_LIKE = [name for name in CONFIGS if name != "gpt2"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(model, before, ids):
    return (model(ids).logits - before).abs().max().item()


@pytest.fixture(scope="module")
def injected():
    """LabLM with injected outliers, its calibration statistics, ids never calibrated on, and its logits for them."""
    model, tokenizer = load_model("lablm")
    inject_outliers_(model, channels=3, factor=30.0, generator=seeded())
    (rows,) = calibration_batches(tokenizer, code=3, dialogues=3, context=192)
    (unseen,) = calibration_batches(tokenizer, code=2, dialogues=2, context=128, seed=1)
    with torch.no_grad():
        return model, input_statistics(model, [rows]), unseen, model(unseen).logits


def divergence(variant, unseen, logits):
    with torch.no_grad():
        log_probs = variant(unseen).logits.log_softmax(-1)
    expected = logits.log_softmax(-1)
    return (expected.exp() * (expected - log_probs)).sum(-1).mean().item()


def test_llm_int8_recovers_with_injected_outliers(injected):
    model, seen, unseen, logits = injected
    behind_norms = {n: s for n, s in seen.items() if not n.endswith(("o_proj", "down_proj"))}
    plain = divergence(use_integers_(copy.deepcopy(model)), unseen, logits)
    split = divergence(use_integers_(copy.deepcopy(model), outliers=behind_norms), unseen, logits)
    assert split < 0.2 * plain


def test_smoothquant_and_rotation_recover_with_injected_outliers(injected):
    model, seen, unseen, logits = injected
    plain = divergence(use_integers_(copy.deepcopy(model), static=seen), unseen, logits)
    smooth, rotated = copy.deepcopy(model), copy.deepcopy(model)
    after = smooth_(smooth, seen)
    rotate_(rotated, generator=seeded())
    assert divergence(use_integers_(smooth, static=after), unseen, logits) < 0.2 * plain
    assert divergence(use_integers_(rotated), unseen, logits) < 0.2 * plain


def test_rotation_beats_folding_alone_at_four_bits(injected):
    model, _, unseen, logits = injected
    folded, rotated = copy.deepcopy(model), copy.deepcopy(model)
    fold_gains_(folded)
    rotate_(rotated, generator=seeded())
    errors = [divergence(use_integers_(m, bits=4), unseen, logits) for m in (rotated, folded)]
    assert errors[0] < 0.8 * errors[1]


def test_injection_smoothing_and_rotation_keep_lablms_logits(injected):
    model, seen, unseen, logits = injected
    original, _ = load_model("lablm")
    with torch.no_grad():
        assert moved(original, logits, unseen) <= 1e-4
        smooth, rotated = copy.deepcopy(model), copy.deepcopy(model)
        smooth_(smooth, seen)
        rotate_(rotated, generator=seeded())
        assert moved(smooth, logits, unseen) <= 1e-4 and moved(rotated, logits, unseen) <= 1e-4


@pytest.mark.parametrize("name", FOLDABLE)
@torch.no_grad()
def test_folds_keep_the_logits(name):
    model, ids = tiny_model(name), random_ids(20, batch=2)
    before, found = model(ids).logits, list(folds(model))
    assert len(found) == 3 * (3 if name == "gpt2" else 4)
    for fold in found:
        size = next(iter(fold.readers.values())).weight.shape[0 if name == "gpt2" else 1]
        scale_inputs_(fold, torch.rand(size, generator=seeded()) + 0.5)
    assert moved(model, before, ids) <= 1e-4


def test_fold_spreads_the_geometric_mean_over_repeated_inputs():
    fold = Fold(torch.nn.Linear(2, 1), slice(None), {}, groups=(1, 2, 1))  # one head of one number, read twice
    of_source, of_readers = fold.spread(torch.tensor([1.0, 4.0]))
    assert of_source.tolist() == pytest.approx([2.0]) and of_readers.tolist() == pytest.approx([2.0, 2.0])


def test_folds_refuse_bert_and_scales_that_are_none():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match="model_type must be one of gpt2, llama, mistral, qwen2, qwen3; got bert"):
        folds(bert)
    fold = next(folds(tiny_model("qwen2")))
    with pytest.raises(ValueError, match="positive and finite"):
        scale_inputs_(fold, torch.zeros(32))


@pytest.mark.parametrize("name", FOLDABLE)
def test_smooth_keeps_the_logits_and_tells_the_new_statistics(name):
    model, ids = tiny_model(name), random_ids(20, batch=2)
    before, seen = model(ids).logits, input_statistics(model, [ids])
    smoothed = smooth_(model, seen, after_norms_only=False)
    assert moved(model, before, ids) <= 1e-4
    for at, measured in input_statistics(model, [ids]).items():
        torch.testing.assert_close(smoothed[at].absmax, measured.absmax, rtol=1e-4, atol=1e-4)


def test_smoothing_scale_makes_both_maxima_equal():
    x, w = torch.tensor([64.0, 9.0]), torch.tensor([1.0, 4.0])
    scale = smoothing_scale(x, w)
    torch.testing.assert_close(x / scale, w * scale)


@pytest.mark.parametrize("n", [1, 2, 8, 12, 96])
def test_hadamard_is_orthogonal_and_flat(n):
    matrix = hadamard(n, generator=seeded())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), atol=1e-5, rtol=0)
    if n in (2, 8):
        torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5))


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_rotate_keeps_the_logits_and_changes_the_stream(name):
    model, ids = tiny_model(name), random_ids(20, batch=2)
    before, states = model(ids).logits, model.model(ids).last_hidden_state
    rotate_(model, generator=seeded())
    assert moved(model, before, ids) <= 1e-4
    assert not torch.allclose(model.model(ids).last_hidden_state, states, atol=0.1)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_rotate_refuses_other_architectures():
    with pytest.raises(ValueError, match="model_type must be one of .*; got gpt2"):
        rotate_(tiny_model("gpt2"), generator=seeded())
    with pytest.raises(ValueError, match="n must be at least 1"):
        hadamard(0, generator=seeded())


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 6), st.integers(0, 99), st.sampled_from([4, 8]))
@settings(deadline=None, max_examples=30)
def test_integer_linear_equals_the_fake_quantized_product(rows, n, out, seed, bits):
    make = seeded(seed)
    layer, x = torch.nn.Linear(n, out), torch.randn(rows, n, generator=make) * 3
    expected = (
        fake_quantize(x, Scheme(bits=bits, granularity="token"))
        @ fake_quantize(layer.weight.detach(), Scheme(bits=bits)).T
    )
    torch.testing.assert_close(
        IntegerLinear(layer, bits=bits)(x), (expected + layer.bias).detach(), rtol=1e-4, atol=1e-4
    )


def test_integer_linear_keeps_outlier_columns_exact_and_no_float_matrix():
    layer = torch.nn.Linear(3, 2, bias=False)
    x = torch.tensor([[1000.3, 0.0, 0.0]])
    split = IntegerLinear(layer, outliers=torch.tensor([True, False, False]))
    torch.testing.assert_close(split(x), layer(x).detach())
    assert split.codes.dtype == torch.int8 and not list(split.parameters())
    assert [tuple(b.shape) for b in split.buffers() if b.is_floating_point() and b.ndim > 1] == [(2, 1)]


def test_integer_linear_static_scale_saturates():
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    static = IntegerLinear(layer, input_absmax=2.0)
    assert static(torch.tensor([[2.0], [50.0]])).flatten().tolist() == pytest.approx([2.0, 2.0])


def test_llm_int8_by_hand():
    x, weight = torch.tensor([[100.0, 0.5]]), torch.tensor([[0.01, 1.0]])
    assert llm_int8(x, weight).item() == pytest.approx(1.5)
    assert (
        integer_product(torch.tensor([[127, -1]]).to(torch.int8), torch.tensor([[127, 1]]).to(torch.int8)).item()
        == 16128
    )


@pytest.mark.parametrize("name", [*CONFIGS, "bert"])
def test_use_integers_runs_on_every_architecture(name):
    if name == "bert":
        model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    else:
        model = tiny_model(name)
    model, ids = model.eval(), random_ids(12)
    before = model(ids)[0]
    after = use_integers_(model, static=input_statistics(model, [ids]))(ids)[0]
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()
    assert not [n for n, layer in linear_layers(model)]


@given(st.integers(1, 3), st.sampled_from([2, 4, 8]), st.sampled_from(["channel", "token"]), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_packed_block_rounds_within_half_a_step(groups, bits, along, seed):
    x = torch.randn(1, 2, 8 * groups, 16, generator=seeded(seed))
    block = PackedBlock(x, bits=bits, group_size=8, along=along)
    grouped = x.mT if along == "channel" else x
    step = grouped.unflatten(-1, (-1, 8))
    spread = (step.amax(-1) - step.amin(-1)) / (2**bits - 1)
    error = (
        ((block.unpack() - x).mT if along == "channel" else block.unpack() - x).unflatten(-1, (-1, 8)).abs().amax(-1)
    )
    assert (error <= 0.51 * spread + 4e-3).all()
    assert block.resident_bytes == x.numel() * bits // 8 + x.numel() // 8 * 4


@pytest.mark.parametrize("offset", [0.0, 10.0, -100.0, 600.0])
@pytest.mark.parametrize("along", ["channel", "token"])
def test_packed_block_spends_no_codes_on_a_distance_from_zero(offset, along):
    x = torch.randn(1, 2, 128, 64, generator=seeded()) + offset
    error = (PackedBlock(x, bits=4, group_size=32, along=along).unpack() - x).square().mean().sqrt()
    assert error < 0.095  # 0.08 with a minimum in float32; at 600 float16 has steps of 0.5


def test_packed_block_of_constants_is_exact_and_refuses_what_float16_cannot_hold():
    same = torch.full((1, 1, 4, 8), 3.0)
    assert torch.equal(PackedBlock(same, bits=2, group_size=8, along="token").unpack(), same)
    for bad in (1e6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="float16's range"):
            PackedBlock(same.masked_fill(torch.arange(8) == 1, bad), bits=2, group_size=8, along="token")
    with pytest.raises(ValueError, match="takes 2 to 8 bits; got 1"):
        PackedBlock(same, bits=1, group_size=8, along="token")


@torch.no_grad()
def test_quantized_cache_of_keys_with_a_bias_stays_near_the_full_one():
    model, ids = tiny_model("qwen2"), random_ids(60)
    for block in model.model.layers:
        block.self_attn.k_proj.bias += 30
    logits = {}
    for bits, recent in ((4, 0), (8, 10**6)):
        cache = QuantizedKVCache(model.config, bits=bits, group_size=8, recent=recent)
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(10, dim=1)]
        logits[bits] = torch.cat(pieces, dim=1).log_softmax(-1)
    divergence = (logits[8].exp() * (logits[8] - logits[4])).sum(-1).mean()
    assert divergence < 0.01


def test_keys_by_channel_beat_keys_by_token_where_a_channel_is_large():
    keys = torch.randn(1, 2, 64, 32, generator=seeded())
    keys[..., 3] += 20
    errors = [
        (PackedBlock(keys, bits=2, group_size=32, along=along).unpack() - keys).norm() for along in ("channel", "token")
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3", "gpt2"])
@torch.no_grad()
def test_quantized_cache_of_eight_bits_is_near_the_full_one(name):
    model, ids = tiny_model(name), random_ids(60, batch=2)
    cache, before = QuantizedKVCache(model.config, bits=8, group_size=8, recent=16), model(ids).logits
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(7, dim=1)]
    assert (torch.cat(pieces, dim=1) - before).abs().max() < 0.02 * before.abs().max()
    assert cache.get_seq_length() == 60
    layer = cache.layers[0]
    assert 16 <= layer.keys.shape[2] < 16 + 8 and sum(b.positions for b in layer.blocks[0]) % 8 == 0


@torch.no_grad()
def test_quantized_cache_is_exact_while_everything_is_recent_and_generates():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(10)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cache = QuantizedKVCache(model.config, bits=2, recent=64)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), model.generate(ids, **settings))
    packed = QuantizedKVCache(model.config, bits=2, group_size=8, recent=8)
    model.generate(ids, past_key_values=packed, **settings)
    assert packed.get_seq_length() == 21 and packed.resident_bytes < cache.resident_bytes


def test_quantized_cache_refuses_what_it_cannot_do():
    cache = QuantizedKVCache(tiny_model("qwen2").config, bits=4)
    assert cache.layers[0].along == ("channel", "token")  # KIVI's axes
    with pytest.raises(ValueError, match="neither be cut off nor reordered"):
        cache.layers[0].crop(-1)
    with pytest.raises(ValueError, match="group_size must divide the 8 numbers along the token; got 32"):
        PackedBlock(torch.zeros(1, 1, 4, 8), bits=2, group_size=32, along="token")


def test_kivi_key_axis_on_lablm():
    model, tokenizer = load_model("lablm")
    (ids,) = calibration_batches(tokenizer, code=4, dialogues=0, context=256, seed=1)
    losses = {}
    with torch.no_grad():
        for keys in ("channel", "token"):
            cache = QuantizedKVCache(model.config, bits=2, recent=0, keys_along=keys)
            logits = [model(p, past_key_values=cache, use_cache=True).logits for p in ids.split(64, dim=1)]
            losses[keys] = torch.nn.functional.cross_entropy(torch.cat(logits, 1)[:, :-1].mT, ids[:, 1:]).item()
    assert losses["channel"] < losses["token"]


def test_straight_through_rounds_forward_and_passes_the_gradient():
    weight = torch.tensor([[1.0, 0.4, -0.6]], requires_grad=True)
    value = straight_through(weight, Scheme(bits=2))
    (value * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert value.tolist() == [[1.0, 0.0, -1.0]] and weight.grad.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_train_quantized_learns_and_leaves_rounded_weights(name):
    model, ids = tiny_model(name), random_ids(24, batch=4)
    scheme = Scheme(bits=3, granularity="group", group_size=16)
    losses = train_quantized_(model, [ids] * 8, scheme, learning_rate=3e-3)
    assert losses[-1] < losses[0] - 0.3
    for _, layer in linear_layers(model):
        weight = layer.weight.detach().T if name == "gpt2" else layer.weight.detach()
        assert not hasattr(layer, "parametrizations")
        torch.testing.assert_close(fake_quantize(weight, scheme), weight, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(model(ids).logits).all()
