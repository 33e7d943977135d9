"""The article's rule, its repair, and least-squares compensation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.pruning.similarity import (
    article_prunes,
    explained,
    merge_columns,
    projection,
    reconstruct,
    redundant_rows,
)

ARTICLE = torch.tensor([[0.3], [0.5], [0.2]])


def activations(seed=0, rows=200, n=6):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def test_projection_gives_the_right_values_of_the_articles_example():
    assert torch.allclose(projection(ARTICLE @ ARTICLE.T)[0], torch.tensor([1.0, 5 / 3, 2 / 3]))


def test_article_rule_prunes_nothing_on_its_own_example():
    assert article_prunes(ARTICLE, threshold=0.5) == []


def test_article_rule_keeps_the_copy_and_prunes_the_unique_row():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert article_prunes(weight, threshold=0.5) == [2]
    assert redundant_rows(weight @ weight.T, threshold=0.99) == {1: 0}


def test_projection_is_the_least_squares_coefficient():
    a = activations()
    expected = torch.linalg.lstsq(a[:, :1], a[:, 3:4]).solution.item()
    assert projection(a.T @ a)[0, 3].item() == pytest.approx(expected, rel=1e-4)


def test_explained_equals_cosine_squared_and_lies_between_0_and_1():
    a = activations()
    cosine = torch.cosine_similarity(a[:, 1], a[:, 4], dim=0).item()
    shares = explained(a.T @ a)
    assert shares[1, 4].item() == pytest.approx(cosine**2, abs=1e-6)
    assert shares.min() >= 0 and shares.max() <= 1 + 1e-6


def test_zero_row_is_redundant_and_explains_nothing():
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    assert redundant_rows(gram, threshold=1.0) == {1: 0}
    assert projection(gram)[1].tolist() == [0, 0, 0]


def test_redundant_rows_refuses_a_threshold_outside_its_range():
    with pytest.raises(ValueError, match=r"\(0, 1\]; got 0"):
        redundant_rows(torch.eye(2), threshold=0)


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_redundant_rows_are_explained_by_a_row_that_is_kept(seed, threshold):
    a = activations(seed, rows=4)
    gram = a.T @ a
    merged = redundant_rows(gram, threshold=threshold)
    assert not set(merged) & set(merged.values())
    assert all(explained(gram)[keeper, row] >= threshold - 1e-5 for row, keeper in merged.items())


def test_merge_columns_keeps_the_outputs_when_a_neuron_is_a_multiple():
    a = activations()
    a[:, 2] = -0.5 * a[:, 0]
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    merged = merge_columns(weight, a.T @ a, {2: 0})
    assert torch.allclose(a @ merged.T, a @ weight.T, atol=1e-5)
    assert (merged[:, 2] == 0).all()


def test_reconstruct_equals_least_squares():
    a = activations()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(a[:, kept], a @ weight.T).solution.T
    assert torch.allclose(reconstruct(weight, a.T @ a, kept, damping=0.0), expected, atol=1e-4)


def test_reconstruct_of_everything_changes_nothing():
    a = activations()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(reconstruct(weight, a.T @ a, torch.arange(6), damping=0.1), weight, atol=1e-5)


def test_reconstruct_bears_a_dead_input():
    gram = torch.diag(torch.tensor([4.0, 0.0]))
    assert reconstruct(torch.tensor([[1.0, 2.0]]), gram, torch.tensor([0, 1])).isfinite().all()
