"""Error theory against measurement, and where it has to fail."""

import math

import pytest
import torch

from labutils.quantization.affine import Scheme, choose_qparams, fake_quantize
from labutils.quantization.clipping import mse_range
from labutils.quantization.theory import gaussian_bound_db, gaussian_sqnr_db, predicted_sqnr_db, sqnr_db

TENSOR = {"granularity": "tensor"}


def uniform(count=200_000):
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normal(count=200_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_sqnr_by_hand():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_prediction_holds_for_many_codes(bits):
    x, scheme = uniform(), Scheme(bits=bits, **TENSOR)
    assert predicted_sqnr_db(x, choose_qparams(x, scheme)) == pytest.approx(
        sqnr_db(x, fake_quantize(x, scheme)), abs=0.15
    )


def test_prediction_grows_by_six_decibels_a_bit():
    x = uniform()
    scheme = [Scheme(bits=bits, symmetric=False, **TENSOR) for bits in (7, 8)]
    low, high = (predicted_sqnr_db(x, choose_qparams(x, s)) for s in scheme)
    assert high - low == pytest.approx(20 * math.log10(2), abs=0.04)  # 255 steps to 127, not 256 to 128


def test_prediction_fails_for_clipping_and_for_zeros():
    x, scheme = normal(), Scheme(**TENSOR)
    too_good = predicted_sqnr_db(x, choose_qparams(x, scheme, low=-1, high=1))
    assert too_good > sqnr_db(x, fake_quantize(x, scheme, low=-1, high=1)) + 20
    sparse = x * (torch.rand(len(x), generator=torch.Generator().manual_seed(1)) < 0.1)
    predicted = predicted_sqnr_db(sparse, choose_qparams(sparse, scheme))
    assert sqnr_db(sparse, fake_quantize(sparse, scheme)) > predicted + 9


@pytest.mark.parametrize(("bits", "clip"), [(8, 4.0), (8, 2.0), (6, 3.0), (5, 2.5)])
def test_gaussian_prediction_equals_measurement(bits, clip):
    x, scheme = normal(), Scheme(bits=bits, full_range=True, symmetric=False, **TENSOR)
    measured = sqnr_db(x, fake_quantize(x, scheme, low=-clip, high=clip))
    assert gaussian_sqnr_db(bits, clip) == pytest.approx(measured, abs=0.35)


def test_gaussian_optimum_is_where_the_search_finds_it():
    x, scheme = normal(), Scheme(bits=8, **TENSOR)
    best = max((clip / 100 for clip in range(200, 600)), key=lambda clip: gaussian_sqnr_db(8, clip))
    low, high = mse_range(x, scheme, smallest=0.5, steps=25)
    assert high.item() == pytest.approx(best, abs=0.25)
    measured = sqnr_db(x, fake_quantize(x, scheme, low=low, high=high))
    assert gaussian_sqnr_db(8, best) == pytest.approx(measured, abs=0.15)


def test_gaussian_prediction_by_hand():
    """Clip 1, steps of 0.5: Q(1) = 0.158655 and φ(1) = 0.241971, so 0.25/12 · 0.68269 + 2 · 0.075339 = 0.164901."""
    assert gaussian_sqnr_db(2, 1.0) == pytest.approx(-10 * math.log10(0.164901), abs=1e-3)


def test_gaussian_bound_is_six_decibels_a_bit_and_water_fills():
    for bits in (1, 2, 4):
        assert gaussian_bound_db(bits, torch.full((5,), 3.0)) == pytest.approx(20 * math.log10(2) * bits, abs=1e-6)
    # one part has all the power: the other, below the water, gets no bits, and the first gets 2 for each of ours
    assert gaussian_bound_db(1, torch.tensor([1.0, 1e-9])) == pytest.approx(20 * math.log10(4), abs=1e-3)


def test_no_quantizer_of_normal_numbers_passes_the_bound():
    for bits in (2, 4, 6):
        scheme = Scheme(bits=bits, **TENSOR)
        low, high = mse_range(normal(), scheme)
        reached = sqnr_db(normal(), fake_quantize(normal(), scheme, low=low, high=high))
        assert reached < gaussian_bound_db(bits, torch.ones(1))
