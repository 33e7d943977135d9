"""GPTQ, AWQ, HQQ, mixed precision and sizes: what must hold, in every layer of LabLM, on rows never calibrated on."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, random_ids, tiny_model
from transformers import BertConfig, BertModel

from labutils.lab.layers.calibration import input_statistics, layer_error
from labutils.lab.layers.linears import change_weights_, linear_layers, weight_of
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.load import load_model
from labutils.quantization.affine import Scheme, choose_qparams, dequantize, fake_quantize, quantize
from labutils.quantization.awq import ALPHAS, awq_scale_, clipped_qparams, scale_losses
from labutils.quantization.gptq import gptq
from labutils.quantization.hqq import hqq
from labutils.quantization.mixed import choose_under_budget, layer_sensitivity
from labutils.quantization.model_weights import model_bytes
from labutils.quantization.sign_round import sign_round


def scheme(bits, group_size=64, **settings):
    return Scheme(bits=bits, granularity="group", group_size=group_size, **settings)


@pytest.fixture(scope="module")
def lablm():
    """The model, statistics of calibration rows, and of other rows."""
    model, tokenizer = load_model("lablm")
    seen, unseen = (
        input_statistics(
            model, calibration_batches(tokenizer, code=6, dialogues=6, context=256, seed=seed), with_gram=True
        )
        for seed in (0, 1)
    )
    return model, seen, unseen


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding_in_every_layer_on_rows_it_never_saw(lablm, bits):
    model, seen, unseen = lablm
    for name, layer in linear_layers(model):
        weight, gram = weight_of(layer), unseen[name].gram
        rounded = gptq(weight, seen[name].gram, choose_qparams(weight, scheme(bits)))
        nearest = fake_quantize(weight, scheme(bits))
        assert layer_error(weight, rounded, gram) < 0.95 * layer_error(weight, nearest, gram), name


def test_smaller_groups_are_better_in_every_layer(lablm):
    model, _, unseen = lablm
    for name, layer in linear_layers(model):
        weight = weight_of(layer)
        sizes = [scheme(4, size) for size in (32, 128)]
        small, large = (layer_error(weight, fake_quantize(weight, s), unseen[name].gram) for s in sizes)
        assert small < large, name


def test_awq_searched_loss_is_at_most_rounding(lablm):
    model, seen, _ = lablm
    for name, layer in linear_layers(model):
        weight, s = weight_of(layer), seen[name]
        losses = scale_losses([weight], s.mean_abs, s.gram, scheme(3))
        assert losses[0.0] == pytest.approx(layer_error(weight, fake_quantize(weight, scheme(3)), s.gram), rel=1e-3)
        assert min(losses.values()) <= losses[0.0], name


def test_clip_search_never_loses_and_spares_queries_and_keys(lablm):
    model, seen, _ = lablm
    for name, layer in linear_layers(model):
        weight, gram, s = weight_of(layer), seen[name].gram, scheme(3, symmetric=False)
        qparams, plain = clipped_qparams(name, weight, gram, s), choose_qparams(weight, s)
        if name.endswith(("q_proj", "k_proj")):
            assert torch.equal(qparams.scale, plain.scale), name
            continue
        blocks = torch.block_diag(*(gram[i : i + 64, i : i + 64] for i in range(0, len(gram), 64)))
        errors = [layer_error(weight, dequantize(quantize(weight, q), q), blocks) for q in (qparams, plain)]
        assert errors[0] < errors[1], name


def random_layer(out, n, seed, rows=40):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=make) @ torch.randn(n, n, generator=make)
    return torch.randn(out, n, generator=make), x.T @ x


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=30)
def test_gptq_equals_rounding_when_inputs_are_independent(out, n, seed, act_order):
    weight, _ = random_layer(out, n, seed)
    qparams = choose_qparams(weight, Scheme(bits=3))
    expected = dequantize(quantize(weight, qparams), qparams)
    assert torch.equal(gptq(weight, torch.eye(n), qparams, act_order=act_order), expected)


@given(st.integers(1, 4), st.integers(1, 30), st.sampled_from([1, 4, 7, 128]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_gptq_blocks_change_nothing(out, n, block, seed):
    weight, gram = random_layer(out, n, seed)
    qparams = choose_qparams(weight, Scheme(bits=4))
    blocked, whole = gptq(weight, gram, qparams, block=block), gptq(weight, gram, qparams, block=n)
    assert layer_error(weight, blocked, gram) == pytest.approx(layer_error(weight, whole, gram), rel=0.05, abs=1e-6)


def test_gptq_by_hand():
    weight, gram = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    grid = choose_qparams(torch.tensor([[7.0, 0.0]]), Scheme(bits=4))
    assert gptq(weight, gram, grid).tolist() == [[0, 1]]  # the second column takes over what the first lost


def test_gptq_act_order_lands_on_the_grid():
    weight, gram = random_layer(6, 64, 1)
    qparams = choose_qparams(weight, scheme(4, 16))
    rounded = gptq(weight, gram, qparams, act_order=True)
    torch.testing.assert_close(dequantize(quantize(rounded, qparams), qparams), rounded)
    nearest = fake_quantize(weight, scheme(4, 16))
    assert layer_error(weight, rounded, gram) < layer_error(weight, nearest, gram)


@pytest.mark.parametrize("dead", [[2], list(range(8))])
def test_gptq_survives_inputs_that_are_always_zero(dead):
    weight, gram = random_layer(3, 8, 0)
    gram[dead], gram[:, dead] = 0, 0
    assert gptq(weight, gram, choose_qparams(weight, Scheme(bits=3))).isfinite().all()


def test_gptq_equals_the_naive_obs_update():
    weight, gram = random_layer(4, 12, 3)
    qparams, work = choose_qparams(weight, Scheme(bits=3)), weight.double()
    hessian = 2 * gram.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    rounded = torch.zeros_like(work)
    for j in range(12):  # Frantar et al. 2022, equation 2: the inverse of what is left, anew for every column
        inverse = torch.linalg.inv(hessian[j:, j:])
        rounded[:, j] = dequantize(quantize(work[:, j : j + 1].float(), qparams), qparams).flatten()
        error = (work[:, j] - rounded[:, j]) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
    torch.testing.assert_close(gptq(weight, gram, qparams, block=5), rounded.float())


def test_gptq_refuses_what_does_not_fit():
    weight, gram = random_layer(3, 8, 0)
    with pytest.raises(ValueError, match=r"\(8, 8\); got \(7, 7\)"):
        gptq(weight, gram[1:, 1:], choose_qparams(weight, Scheme()))


@given(st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_hqq_weight_error_is_at_most_rounding(out, seed):
    weight = torch.randn(out, 64, generator=torch.Generator().manual_seed(seed)) ** 3
    s = scheme(3, 32, symmetric=False)
    codes, qparams = hqq(weight, s)
    assert s.qmin <= codes.min() and codes.max() <= s.qmax
    errors = [(weight - w).abs().pow(0.7).sum() for w in (dequantize(codes, qparams), fake_quantize(weight, s))]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_hqq_second_step_by_the_formula():
    weight, s = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), scheme(3, symmetric=False)
    _, qparams = hqq(weight, s, iterations=2)
    start = choose_qparams(weight, s)
    codes = torch.round(weight / start.scale[:, 0] + start.zero_point[:, 0]).clamp(s.qmin, s.qmax)
    gap = weight - start.scale[:, 0] * (codes - start.zero_point[:, 0])
    sparse = gap.sign() * (gap.abs() - gap.abs() ** -0.3 / 10).clamp(min=0)
    zero = (codes - (weight - sparse) / start.scale[:, 0]).mean(dim=1)
    torch.testing.assert_close(qparams.zero_point.flatten(), zero, rtol=1e-4, atol=1e-4)


def test_hqq_improves_and_refuses_symmetric_schemes():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    s = scheme(3, symmetric=False)
    errors = [(weight - w).abs().pow(0.7).sum() for w in (dequantize(*hqq(weight, s)), fake_quantize(weight, s))]
    assert errors[0] < 0.99 * errors[1]
    with pytest.raises(ValueError, match="must not be symmetric"):
        hqq(weight, scheme(3))


def models():
    yield from ((name, tiny_model(name)) for name in CONFIGS)
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
    yield "bert", BertModel(config).eval()


@pytest.mark.parametrize(("name", "model"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_weight_method_runs_on_every_architecture(name, model):
    ids, s = random_ids(12, batch=2), scheme(4, 16, symmetric=False)
    seen = input_statistics(model, [ids], with_gram=True)
    change_weights_(model, lambda n, w: gptq(w, seen[n].gram, clipped_qparams(n, w, seen[n].gram, s), act_order=True))
    change_weights_(model, lambda n, w: dequantize(*hqq(w, s)))
    for _, layer in linear_layers(model):
        assert len(set(weight_of(layer)[0, :16].tolist())) <= 16


def test_change_weights_with_head_changes_the_tied_embedding():
    model = tiny_model("llama-gqa-tied")
    change_weights_(model, lambda _, w: torch.zeros_like(w), with_head=True)
    assert not model.get_input_embeddings().weight.any()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-untied-bias", "qwen2", "qwen3", "gpt2"])
def test_awq_scale_keeps_the_logits_and_tells_the_new_statistics(name):
    model, ids = tiny_model(name), random_ids(20, batch=2)
    seen = input_statistics(model, [ids], with_gram=True)
    before = model(ids).logits
    scaled = awq_scale_(model, seen, scheme(3, 16))
    assert (model(ids).logits - before).abs().max() <= 1e-4
    for at, measured in input_statistics(model, [ids], with_gram=True).items():
        torch.testing.assert_close(scaled[at].gram, measured.gram, rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(scaled[at].absmax, seen[at].absmax) for at in seen)  # it did something


def test_alphas_are_the_papers_grid():
    assert ALPHAS[:3] == (0.0, 0.05, 0.1) and ALPHAS[-1] == 0.95 and len(ALPHAS) == 20


def test_model_bytes_by_hand():
    model = tiny_model("llama-gqa-tied")
    names = [name for name, _ in linear_layers(model)]
    s = Scheme(bits=4, scale_dtype=torch.float16)
    numbers = sum(weight_of(layer).numel() for _, layer in linear_layers(model))
    rows = sum(len(weight_of(layer)) for _, layer in linear_layers(model))
    rest = sum(p.numel() for p in model.parameters()) - numbers
    assert model_bytes(model, dict.fromkeys(names, s)) == numbers / 2 + 2 * rows + 2 * rest
    with pytest.raises(ValueError, match="must name linear layers of the model; got 'nothing'"):
        model_bytes(model, {"nothing": s})


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_choose_under_budget_equals_brute_force(layers, seed):
    make = torch.Generator().manual_seed(seed)
    costs = {str(i): torch.rand(3, generator=make).tolist() for i in range(layers)}
    sizes = {str(i): torch.randint(1, 6, (3,), generator=make).tolist() for i in range(layers)}
    budget = int(torch.randint(sum(map(min, sizes.values())), 6 * layers, (1,), generator=make))
    chosen = choose_under_budget(costs, sizes, budget)

    def total(table, choice):
        return sum(table[name][i] for name, i in zip(table, choice, strict=True))

    fitting = [c for c in itertools.product(range(3), repeat=layers) if total(sizes, c) <= budget]
    assert total(sizes, chosen.values()) <= budget
    assert total(costs, chosen.values()) == pytest.approx(min(total(costs, c) for c in fitting))


def test_choose_under_budget_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="smallest options, 3; got 2"):
        choose_under_budget({"a": [1.0]}, {"a": [3]}, 2)
    with pytest.raises(ValueError, match="same layers"):
        choose_under_budget({"a": [1.0]}, {"b": [3]}, 5)


def test_layer_sensitivity_changes_one_layer_and_puts_it_back():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(10)
    before = {name: weight_of(layer).clone() for name, layer in linear_layers(model)}
    changed = []

    def loss(variant):
        changed.append([n for n, layer in linear_layers(variant) if not torch.equal(weight_of(layer), before[n])])
        return variant(ids, labels=ids).loss.item()

    found = layer_sensitivity(model, [Scheme(bits=2), Scheme(bits=8)], loss)
    assert changed[0] == [] and changed[1:] == [[name] for name in before for _ in range(2)]
    assert all(torch.equal(weight_of(layer), before[name]) for name, layer in linear_layers(model))
    assert sum(abs(row[0]) for row in found.values()) > sum(abs(row[1]) for row in found.values())


@settings(deadline=None, max_examples=20)
@given(out=st.integers(1, 5), n=st.sampled_from([8, 16]), seed=st.integers(0, 99))
def test_sign_round_never_loses_to_rounding_and_stays_on_the_grid(out, n, seed):
    weight, gram = random_layer(out, n, seed)
    scheme = Scheme(bits=3, granularity="group", group_size=8)
    qparams, found = choose_qparams(weight, scheme), sign_round(weight, gram, scheme, steps=20)
    for row in range(out):
        errors = [layer_error(weight[row][None], w[row][None], gram) for w in (found, fake_quantize(weight, scheme))]
        assert errors[0] <= errors[1] * (1 + 1e-5)
    assert torch.allclose(dequantize(quantize(found, qparams), qparams), found, atol=1e-6)
    steps = torch.broadcast_to(qparams.scale, (out, n // 8, 8)).reshape(out, n)
    assert ((found - weight).abs() <= steps * (1 + 1e-5)).all()  # up or down, no further


def test_sign_round_lets_errors_cancel():
    gram = torch.tensor([[1, 0.99, 0], [0.99, 1, 0], [0, 0, 1]])
    assert sign_round(torch.tensor([[0.4, 0.45, 7.0]]), gram, Scheme(bits=4)).tolist() == [[0.0, 1.0, 7.0]]
    assert sign_round(torch.tensor([[0.4, 0.45, 7.0]]), torch.eye(3), Scheme(bits=4)).tolist() == [[0.0, 0.0, 7.0]]
