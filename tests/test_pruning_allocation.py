"""Sensitivity leaves the model alone; the budget is met, and solved as by trying everything."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.pruning.allocation import head_budget, sensitivity, solve_budget
from labutils.pruning.masks import mask_layer

LEVELS = [0.0, 0.25, 0.5, 0.75]


def test_sensitivity_measures_one_layer_at_a_time():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(24)
    layers = dict(linear_layers(model))
    before = {name: weight_of(layer).clone() for name, layer in layers.items()}

    def prune(name, level):
        return before[name] * mask_layer(before[name].abs(), level)

    def measure():
        return model(input_ids=ids, labels=ids).loss.item()

    damage = sensitivity(model, prune, measure, levels=[0.0, 1.0])
    assert list(damage) == list(layers)
    assert all(row[0] == pytest.approx(measure(), rel=1e-6) for row in damage.values())
    assert all(row[1] != row[0] for row in damage.values())
    assert all(torch.equal(before[name], weight_of(layer)) for name, layer in layers.items())


def convex(draw_steps):
    return [0.0, *itertools.accumulate(sorted(draw_steps))]


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=2, max_size=3), st.sampled_from(LEVELS))
def test_solve_budget_equals_trying_everything_when_damage_bends_upwards(steps, sparsity):
    damage = {str(i): convex(each) for i, each in enumerate(steps)}
    sizes = dict.fromkeys(damage, 4)
    chosen = solve_budget(damage, sizes, levels=LEVELS, sparsity=sparsity)
    assert sum(chosen.values()) / len(chosen) >= sparsity - 1e-9

    def cost(levels):
        return sum(damage[name][LEVELS.index(level)] for name, level in levels.items())

    possible = [dict(zip(damage, levels, strict=True)) for levels in itertools.product(LEVELS, repeat=len(damage))]
    reaching = [levels for levels in possible if sum(levels.values()) / len(levels) >= sparsity - 1e-9]
    assert cost(chosen) == pytest.approx(min(map(cost, reaching)), abs=1e-6)


def test_solve_budget_prunes_what_bears_it():
    damage = {"tough": [0, 0.1, 0.2, 0.3], "frail": [0, 1, 5, 9]}
    assert solve_budget(damage, {"tough": 8, "frail": 8}, levels=LEVELS, sparsity=0.5) == {"tough": 0.75, "frail": 0.25}


def test_solve_budget_weighs_layers_by_their_size():
    damage = {"big": [0, 1.0, 2.0, 3.0], "small": [0, 0.9, 1.8, 2.7]}
    chosen = solve_budget(damage, {"big": 100, "small": 1}, levels=LEVELS, sparsity=0.2)
    assert chosen == {"big": 0.25, "small": 0.0}


def test_solve_budget_jumps_over_a_bump():
    damage = {"a": [0, 5.0, 1.0, 9.0], "b": [0, 2.0, 8.0, 9.0]}
    assert solve_budget(damage, {"a": 4, "b": 4}, levels=LEVELS, sparsity=0.25) == {"a": 0.5, "b": 0.0}


def test_solve_budget_refuses_the_impossible():
    with pytest.raises(ValueError, match="highest level 0.75; got 0.9"):
        solve_budget({"a": [0, 1, 2, 3]}, {"a": 4}, levels=LEVELS, sparsity=0.9)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**20), st.data())
def test_head_budget_equals_trying_everything(layers, kv_heads, seed, data):
    damage = torch.randn(layers, 2 * kv_heads, generator=torch.Generator().manual_seed(seed))
    remove = data.draw(st.integers(0, layers * (kv_heads - 1)))
    kept, cost = head_budget(damage, kv_heads, remove), damage.view(layers, kv_heads, 2).sum(dim=2)
    assert kept.any(dim=1).all() and int((~kept).sum()) == remove
    possible = torch.tensor(list(itertools.product([True, False], repeat=kept.numel()))).view(-1, *kept.shape)
    allowed = possible[possible.any(dim=2).all(dim=1) & ((~possible).sum(dim=(1, 2)) == remove)]
    losses = (cost * ~allowed).sum(dim=(1, 2))
    assert cost[~kept].sum().item() == pytest.approx(losses.min().item(), abs=1e-5)


def test_head_budget_refuses_to_empty_a_layer():
    with pytest.raises(ValueError, match="2 layers of 2 groups can lose 0 to 2; got remove=3"):
        head_budget(torch.ones(2, 4), 2, remove=3)
