"""SparseGPT against the closed form of OBS, its own guarantees, and its edges."""

import pytest
import torch

from labutils.course.checks.ch04_removal import column_pruned
from labutils.lab.layers.calibration import inverse_factor, layer_error
from labutils.pruning.masks import mask_layer, mask_n_of_m
from labutils.pruning.scores import magnitude
from labutils.pruning.similarity import reconstruct
from labutils.pruning.sparsegpt import sparsegpt


def problem(rows=8, columns=16, samples=400, seed=0):
    make = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=make) / columns**0.5 / 2
    x = torch.randn(samples, columns, generator=make) @ mix * torch.rand(columns, generator=make).mul(4).exp()
    return torch.randn(rows, columns, generator=make), x.T @ x


def test_one_weight_removed_equals_the_obs_update():
    """w ← w − w_q / [H⁻¹]_qq · H⁻¹_:q, the error w_q² / [H⁻¹]_qq; nothing is fixed yet."""
    weight, gram = problem(rows=1, columns=4)
    weight[0, 0] = 1e-3
    inverse = torch.linalg.inv(gram.double()).float()
    expected = weight - weight[0, 0] / inverse[0, 0] * inverse[0]
    assert torch.allclose(sparsegpt(weight, gram, 0.25, damping=0.0), expected, rtol=1e-4)


def test_the_exercises_column_done_again_and_again_is_sparsegpt():
    weight, gram = problem()
    pruned = sparsegpt(weight, gram, 0.5)
    factor, by_columns = inverse_factor(gram, damping=0.01).float(), weight
    for column in range(weight.shape[1]):
        by_columns = column_pruned(by_columns, factor, column, pruned[:, column] == 0)
    assert torch.allclose(by_columns, pruned, atol=1e-4) and (pruned == 0).float().mean() == 0.5


def test_first_columns_removed_equal_the_closed_form():
    weight, gram = problem(rows=5)
    weight[:, :6] *= 1e-4  # so that the mask takes exactly these
    pruned = sparsegpt(weight, gram, 6 / 16, damping=0.0)
    assert (pruned[:, :6] == 0).all()
    assert torch.allclose(pruned[:, 6:], reconstruct(weight, gram, torch.arange(6, 16), damping=0.0), atol=1e-3)


def test_blocks_change_nothing_when_the_mask_is_given():
    weight, gram = problem(columns=32)
    weight[:, ::2] *= 1e-4
    whole, blocks = (sparsegpt(weight, gram, 0.5, block=b) for b in (32, 8))
    assert torch.equal(whole == 0, blocks == 0)
    assert torch.allclose(whole, blocks, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_sparsity_is_exact_over_uneven_blocks(sparsity):
    weight, gram = problem(rows=7, columns=20)
    assert (sparsegpt(weight, gram, sparsity, block=8) == 0).sum() == round(sparsity * 140)


def test_sparsity_0_returns_the_weight():
    weight, gram = problem()
    assert torch.equal(sparsegpt(weight, gram, 0.0), weight)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_n_of_every_m(n, m):
    weight, gram = problem(columns=32)
    assert ((sparsegpt(weight, gram, (n, m), block=16) != 0).view(-1, m).sum(dim=1) == n).all()


@pytest.mark.parametrize("pattern", [0.5, 0.7, (2, 4)])
def test_error_is_below_magnitudes_and_below_its_own_mask_without_update(pattern):
    weight, gram = problem(rows=32, columns=64, samples=2000)
    ours = sparsegpt(weight, gram, pattern)
    assert layer_error(weight, ours, gram) < layer_error(weight, weight * (ours != 0), gram)
    if isinstance(pattern, float):
        by_magnitude = weight * mask_layer(magnitude(weight), pattern)
        assert layer_error(weight, ours, gram) < layer_error(weight, by_magnitude, gram)


def test_uncorrelated_inputs_of_one_strength_leave_the_kept_weights_alone():
    weight, _ = problem()
    pruned = sparsegpt(weight, torch.eye(16), 0.5)
    assert torch.allclose(pruned, weight * mask_layer(weight.abs(), 0.5), atol=1e-6)


def test_mask_follows_the_obs_error_not_the_size_alone():
    weight, _ = problem()
    strengths = torch.logspace(-2, 2, 16)
    pruned = sparsegpt(weight, torch.diag(strengths), 0.5, damping=0.0)
    assert torch.equal(pruned != 0, mask_layer(weight**2 * strengths, 0.5))
    by_four = sparsegpt(weight, torch.diag(strengths), (2, 4), damping=0.0)
    assert torch.equal(by_four != 0, mask_n_of_m(weight**2 * strengths, 2, 4))


def test_joint_pass_lands_on_the_grid_and_beats_rounding_afterwards():
    weight, gram = problem(rows=32, columns=64, samples=2000)
    step = weight.abs().amax(dim=1) / 3

    def rounded(column):
        return (column / step).round().clamp(-3, 3) * step

    joint = sparsegpt(weight, gram, 0.5, quantize=rounded)
    after = torch.stack([rounded(c) for c in sparsegpt(weight, gram, 0.5).T], dim=1)
    codes = joint / step[:, None]
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert (joint == 0).float().mean() >= 0.5
    assert layer_error(weight, joint, gram) < layer_error(weight, after, gram)


def test_dead_inputs_and_a_dead_layer_have_a_defined_result():
    weight, gram = problem()
    gram[3], gram[:, 3] = 0, 0
    assert (sparsegpt(weight, gram, 0.5)[:, 3] == 0).all()
    assert (sparsegpt(weight, torch.zeros(16, 16), 0.5) == 0).all()
    assert (sparsegpt(torch.zeros(8, 16), problem()[1], 0.5) == 0).all()


def test_sparsegpt_refuses():
    weight, gram = problem(columns=18)
    with pytest.raises(ValueError, match=r"\(18, 18\); got \(4, 4\)"):
        sparsegpt(weight, torch.eye(4), 0.5)
    with pytest.raises(ValueError, match="divide in_features=18 and block=128; got 4"):
        sparsegpt(weight, gram, (2, 4))
    with pytest.raises(ValueError, match="fraction of zeros"):
        sparsegpt(weight, gram, 1.5)
