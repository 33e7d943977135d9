"""Binary weights: the best scale, and counting bits against multiplying floats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.binary import binarize, pack_signs, ternarize, xnor_product


def test_binarize_by_hand():
    signs, alpha = binarize(torch.tensor([[0.5, -1.5, 0.0, -2.0]]))
    assert signs.tolist() == [[1, -1, 1, -1]] and alpha.tolist() == [[1.0]]


def test_alpha_is_the_best_scale():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    signs, alpha = binarize(x)
    error = (x - alpha * signs).square().sum()
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert error < (x - factor * alpha * signs).square().sum()
    least_squares = (x * signs).sum(dim=1, keepdim=True) / 40
    torch.testing.assert_close(alpha, least_squares)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 70), st.integers(0, 10_000))
def test_xnor_product_equals_the_float_product(rows, outputs, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (binarize(torch.randn(n, count, generator=generator))[0] for n in (rows, outputs))
    product = xnor_product(pack_signs(x), pack_signs(weight), count)
    assert torch.equal(product.float(), x.float() @ weight.float().T)


@pytest.mark.parametrize("x", [torch.empty(2, 0), torch.tensor([float("nan")]), torch.tensor([float("inf")])])
def test_binarize_rejects(x):
    with pytest.raises(ValueError, match="all finite"):
        binarize(x)


def test_ternarize_by_hand_and_keeps_three_values():
    codes, scale = ternarize(torch.tensor([[3.0, -1.0, 0.5, -3.5]]))
    assert codes.tolist() == [[1, 0, 0, -1]] and scale.item() == 2.0
    assert not ternarize(torch.zeros(2, 3))[0].any()
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite numbers only; got inf or nan"):
            ternarize(torch.tensor([1.0, bad]))


@given(seed=st.integers(0, 10_000))
def test_ternarize_forgets_the_size_and_keeps_the_sign(seed):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    codes, scale = ternarize(x)
    doubled, twice = ternarize(2 * x)
    assert torch.equal(codes, doubled) and twice.item() == pytest.approx(2 * scale.item())
    assert (codes * x >= 0).all() and torch.equal(codes != 0, (x.abs() / scale).round() > 0)
