"""NF4 against the published levels, a naive nearest level, and its own bookkeeping of bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.nf4 import (
    double_quantize,
    nf4_bits_per_weight,
    nf4_dequantize,
    nf4_levels,
    nf4_quantize,
)
from labutils.quantization.theory import sqnr_db

PUBLISHED = [  # Dettmers et al. 2023 (arXiv:2305.14314), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def test_levels_are_the_published_ones():
    torch.testing.assert_close(nf4_levels(), torch.tensor(PUBLISHED), rtol=0.0, atol=3e-7)
    assert nf4_levels()[[0, 7, 15]].tolist() == [-1, 0, 1] and not nf4_levels()[7].signbit()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([1, 4, 16]))
def test_quantize_takes_the_nearest_level(seed, block):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    codes, absmax = nf4_quantize(x, block=block)
    ratio = x.unflatten(-1, (-1, block)) / absmax[..., None]
    naive = (ratio[..., None] - nf4_levels()).abs().argmin(dim=-1)
    assert torch.equal(codes, naive.reshape(x.shape).to(torch.uint8))
    back = nf4_dequantize(codes, absmax)
    assert back.shape == x.shape and torch.equal(nf4_quantize(back, block=block)[0], codes)


def test_beats_int4_on_normal_numbers_and_loses_on_uniform_ones():
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme(bits=4, granularity="group", group_size=64)
    gains = []
    for x in (torch.randn(64, 256, generator=generator), torch.rand(64, 256, generator=generator) - 0.5):
        gains.append(sqnr_db(x, nf4_dequantize(*nf4_quantize(x))) - sqnr_db(x, fake_quantize(x, scheme)))
    assert gains[0] > 0.5 and gains[1] < -0.5


def test_zeros_stay_zeros():
    assert not nf4_dequantize(*nf4_quantize(torch.zeros(2, 64))).any()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 300)])
def test_double_quantize_keeps_scales_within_half_a_step(shape):
    absmax = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    back = double_quantize(absmax)
    assert back.shape == absmax.shape
    assert (back - absmax).abs().max() <= (absmax - absmax.mean()).abs().max() / 127 / 2 + 1e-6


def test_bits_by_hand():
    assert nf4_bits_per_weight(double=False) == 4 + 32 / 64
    assert nf4_bits_per_weight() == 4 + 8 / 64 + 32 / (64 * 256)
    assert 0.37 < nf4_bits_per_weight(double=False) - nf4_bits_per_weight() < 0.38  # the paper's 0.373


@pytest.mark.parametrize(("x", "words"), [(torch.ones(2, 63), "must divide"), (torch.full((64,), torch.inf), "finite")])
def test_quantize_rejects(x, words):
    with pytest.raises(ValueError, match=words):
        nf4_quantize(x)
