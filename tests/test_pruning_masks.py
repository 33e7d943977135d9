"""Scores and masks: exact counts, references in torch.nn.utils.prune, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model
from torch import nn
from torch.nn.utils import prune

from labutils.lab.layers.calibration import input_statistics
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.pruning import masks, scores


def matrix(rows=12, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_mask_layer_and_mask_rows_are_exact(rows, columns, sparsity, seed):
    each = matrix(rows, columns, seed).round()  # with ties
    assert (~masks.mask_layer(each, sparsity)).sum() == round(sparsity * rows * columns)
    assert ((~masks.mask_rows(each, sparsity)).sum(dim=1) == round(sparsity * columns)).all()


@given(st.sampled_from([(2, 4), (4, 8), (1, 4), (0, 4), (4, 4)]), st.integers(0, 99))
def test_mask_n_of_m_keeps_n_of_every_m(pattern, seed):
    n, m = pattern
    mask = masks.mask_n_of_m(matrix(seed=seed).round(), n, m)
    assert (mask.view(-1, m).sum(dim=1) == n).all()


@pytest.mark.parametrize("mask", [masks.mask_layer, masks.mask_rows])
def test_sparsity_0_keeps_all_and_1_keeps_none(mask):
    assert mask(matrix(), 0).all()
    assert not mask(matrix(), 1).any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_mask_layer_equals_torch(sparsity):
    layer = nn.Linear(32, 12)
    expected = prune.l1_unstructured(layer, "weight", amount=sparsity).weight_mask.bool()
    assert torch.equal(masks.mask_layer(scores.magnitude(layer.weight_orig.detach()), sparsity), expected)


def test_global_masks_equal_torch():
    layers = {str(i): nn.Linear(16, 8 * (i + 1)) for i in range(3)}
    with torch.no_grad():
        layers["1"].weight *= 3
    magnitudes = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    prune.global_unstructured([(m, "weight") for m in layers.values()], prune.L1Unstructured, amount=0.6)
    for name, mask in masks.mask_model(magnitudes, 0.6, scope="global").items():
        assert torch.equal(mask, layers[name].weight_mask.bool())


def test_global_masks_take_more_from_weak_layers():
    each = {"weak": torch.full((2, 2), 0.1), "strong": torch.full((2, 2), 1.0)}
    result = masks.mask_model(each, 0.5, scope="global")
    assert not result["weak"].any() and result["strong"].all()


def test_mask_model_takes_a_sparsity_for_each_layer():
    each = {"a": matrix(), "b": matrix(seed=1)}
    result = masks.mask_model(each, {"a": 0.25, "b": 0.75}, scope="row")
    assert [mask.float().mean().item() for mask in result.values()] == [0.75, 0.25]


def test_mask_model_serves_every_criterion_with_n_of_m():
    result = masks.mask_model({"a": matrix()}, (2, 4), scope="global")
    assert (result["a"].view(-1, 4).sum(dim=1) == 2).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masks.mask_layer(matrix(), 1.2), "fraction of zeros .* got 1.2"),
        (lambda: masks.mask_rows(matrix(), -0.1), "got -0.1"),
        (lambda: masks.mask_n_of_m(matrix(), 5, 4), "n in 0 to m; got 5:4"),
        (lambda: masks.mask_n_of_m(matrix(columns=30), 2, 4), "divide in_features=30; got 4"),
        (lambda: masks.mask_layer(matrix() * torch.nan, 0.5), "numbers; got nan"),
        (lambda: masks.mask_model({"a": matrix()}, 0.5, scope="all"), "row, layer or global; got 'all'"),
        (lambda: masks.mask_model({"a": matrix()}, {"a": 0.5}, scope="global"), "takes one sparsity"),
    ],
)
def test_masks_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_dead_layer_has_a_defined_mask():
    assert masks.mask_layer(torch.zeros(2, 4), 0.5).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_apply_masks_gives_exact_sparsity_and_leaves_the_rest(name):
    model = tiny_model(name)
    before = {n: weight_of(layer).clone() for n, layer in linear_layers(model)}
    chosen = masks.mask_model(scores.magnitude_scores(model), 0.5, scope="row")
    masks.apply_masks_(model, chosen)
    assert masks.sparsity(model) == 0.5
    for n, layer in linear_layers(model):
        assert torch.equal(weight_of(layer), before[n] * chosen[n])


def test_apply_masks_refuses_the_tied_head_and_unknown_layers():
    model = tiny_model("llama-gqa-tied")
    with pytest.raises(ValueError, match="shares its weight with the embedding"):
        masks.apply_masks_(model, {"lm_head": torch.ones(97, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no 'nothing'"):
        masks.apply_masks_(model, {"nothing": torch.ones(1, 1, dtype=torch.bool)})


def test_untied_head_can_be_pruned():
    model = tiny_model("llama-untied-bias")
    masks.apply_masks_(model, {"lm_head": torch.zeros(97, 32, dtype=torch.bool)})
    assert (model.lm_head.weight == 0).all()


def test_wanda_equals_magnitude_by_row_under_equal_norms():
    weight = matrix()
    by_wanda = masks.mask_rows(scores.wanda(weight, torch.full((32,), 7.0)), 0.5)
    assert torch.equal(by_wanda, masks.mask_rows(scores.magnitude(weight), 0.5))


def test_wanda_follows_the_inputs():
    norms = torch.ones(32)
    norms[3] = 100
    assert masks.mask_rows(scores.wanda(matrix(), norms), 0.9)[:, 3].all()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_wanda_scores_use_the_watched_norms(name):
    model = tiny_model(name)
    statistics = input_statistics(model, [random_ids(20)])
    found = scores.wanda_scores(model, statistics)
    layer_name, layer = next(linear_layers(model))
    assert torch.allclose(found[layer_name], weight_of(layer).abs() * statistics[layer_name].norms)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_taylor_predicts_what_removing_one_weight_costs(name):
    model = tiny_model(name).double()
    ids = random_ids(24)
    found = scores.gradient_scores(model, [ids]).taylor

    def loss():
        return model(input_ids=ids, labels=ids).loss.item()

    layer_name, layer = list(linear_layers(model))[-1]
    whole = loss()
    row, column = divmod(found[layer_name].argmax().item(), found[layer_name].shape[1])
    with torch.no_grad():
        weight_of(layer)[row, column] *= 0.95  # a twentieth of taking it away: the first order rules
    assert abs(loss() - whole) * 20 == pytest.approx(found[layer_name][row, column].item(), rel=0.05)


def test_movement_is_positive_where_training_grows_a_weight():
    model = tiny_model("llama-gqa-tied")
    before = {n: weight_of(layer).clone() for n, layer in linear_layers(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = scores.gradient_scores(model, [random_ids(24)], optimizer=optimizer).movement
    for name, layer in linear_layers(model):
        grown = weight_of(layer).abs() > before[name].abs()
        clear = (weight_of(layer) * before[name] > 0) & (found[name].abs() > 1e-9)
        assert torch.equal(grown[clear], found[name][clear] > 0)


def test_gradient_scores_leave_the_model_alone_without_an_optimizer():
    model = tiny_model("llama-gqa-tied")
    before = [p.clone() for p in model.parameters()]
    scores.gradient_scores(model, [random_ids(8)])
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="at least one batch"):
        scores.gradient_scores(model, [])


def test_schedule_ends_at_the_final_sparsity_and_never_falls():
    path = [scores.schedule(t, steps=10, final=0.8, initial=0.1) for t in range(11)]
    assert path[0] == pytest.approx(0.1) and path[-1] == pytest.approx(0.8) and path == sorted(path)
    assert path[1] - path[0] > path[-1] - path[-2]
    with pytest.raises(ValueError, match="0 to steps=10; got 11"):
        scores.schedule(11, steps=10, final=0.5)
