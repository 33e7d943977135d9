"""Clipping: percentiles by hand and against NumPy, the search against every share it could have taken."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.clipping import mse_range, percentile_range
from labutils.quantization.theory import sqnr_db

GROUPS = Scheme(bits=3, granularity="group", group_size=8)
SCHEMES = [Scheme(bits=3), GROUPS, Scheme(bits=4, symmetric=False), Scheme(bits=2, granularity="tensor")]


def heavy_tailed(seed, shape=(5, 24)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("percent", [60, 90, 99, 100])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_percentile_range_equals_numpy(scheme, percent):
    x = heavy_tailed(0)
    low, high = percentile_range(x, scheme, percent=percent)
    parts = x.reshape({"tensor": (1, -1), "channel": (5, 24), "group": (15, 8)}[scheme.granularity])
    expected = np.percentile(parts.numpy(), percent, axis=1, method="inverted_cdf")
    np.testing.assert_array_equal(high.flatten().numpy(), expected)
    np.testing.assert_array_equal(-low.flatten().numpy(), np.percentile(-parts, percent, axis=1, method="inverted_cdf"))


def test_percentile_range_of_everything_is_min_max():
    x = heavy_tailed(1)
    clipped = percentile_range(x, GROUPS, percent=100)
    assert torch.equal(fake_quantize(x, GROUPS, low=clipped[0], high=clipped[1]), fake_quantize(x, GROUPS))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(SCHEMES))
def test_mse_range_is_never_worse_than_any_share_it_tried(seed, scheme):
    x = heavy_tailed(seed)
    low, high = mse_range(x, scheme, smallest=0.5, steps=5)
    squares = (fake_quantize(x, scheme, low=low, high=high) - x).square()
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        low, high = percentile_range(x, scheme, percent=100)
        other = (fake_quantize(x, scheme, low=low * share, high=high * share) - x).square()
        assert squares.sum() <= other.sum() * (1 + 1e-5)


def test_mse_range_gains_most_where_tails_are_heavy():
    scheme = Scheme(bits=3)
    gains = []
    for x in (torch.rand(4, 1000) - 0.5, heavy_tailed(0, (4, 1000))):
        low, high = mse_range(x, scheme)
        gains.append(sqnr_db(x, fake_quantize(x, scheme, low=low, high=high)) - sqnr_db(x, fake_quantize(x, scheme)))
    assert 0 <= gains[0] < gains[1] - 0.5


def test_mse_range_of_zeros_keeps_zeros():
    low, high = mse_range(torch.zeros(2, 8), GROUPS)
    assert not fake_quantize(torch.zeros(2, 8), GROUPS, low=low, high=high).any()


@pytest.mark.parametrize("percent", [50, 101, float("nan")])
def test_percentile_range_rejects(percent):
    with pytest.raises(ValueError, match="percent must be"):
        percentile_range(torch.ones(3), Scheme(), percent=percent)


@pytest.mark.parametrize("smallest", [0.0, 1.0])
def test_mse_range_rejects(smallest):
    with pytest.raises(ValueError, match="smallest must be"):
        mse_range(torch.ones(3), Scheme(), smallest=smallest)


@pytest.mark.parametrize("function", [mse_range, lambda x, s: percentile_range(x, s, percent=90)])
def test_ranges_need_finite_numbers(function):
    with pytest.raises(ValueError, match="finite"):
        function(torch.tensor([1.0, float("inf")]), Scheme())
