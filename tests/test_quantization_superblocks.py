"""Q4_K's scales of scales, and codes along a trellis."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.superblocks import BITS_PER_WEIGHT, q4_k_round
from labutils.quantization.theory import sqnr_db
from labutils.quantization.trellis import trellis_round


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_q4_k_spends_what_its_layout_says():
    assert BITS_PER_WEIGHT == 4.5 == 144 * 8 / 256  # llama.cpp's block_q4_K has 144 bytes for 256 weights


def test_q4_k_by_hand():
    x = torch.zeros(1, 256)
    x[0, :3] = torch.tensor([-7.5, 0.0, 7.5])  # one block with a range of 15: scale 1, minimum 7.5
    x[0, 32:34] = torch.tensor([-1.0, 2.0])  # range 3: scale 0.2 = 12.6 of 63 parts, so 13; minimum 1 = 8.4 of 63, so 8
    back, d, d_min = q4_k_round(x), 1 / 63, 7.5 / 63
    assert back[0, :3].tolist() == pytest.approx([-7.5, 0.5, 7.5], abs=0.01)  # 7.5 steps above the minimum: to even, 8
    step, minimum = 13 * d, 8 * d_min
    codes = [round((v + minimum) / step) for v in (-1.0, 2.0)]
    assert back[0, 32:34].tolist() == pytest.approx([c * step - minimum for c in codes], abs=0.01)
    assert not back[0, 64:].any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-2, 3))
def test_q4_k_errs_by_a_step_at_most(seed, exponent):
    x = normal(2, 512, seed=seed) * 10.0**exponent
    blocks = x.unflatten(-1, (-1, 8, 32))
    step = ((blocks.amax(-1) - blocks.amin(-1)) / 15).amax(-1, keepdim=True)[..., None]  # the super-block's largest
    assert ((q4_k_round(x).view_as(blocks) - blocks).abs() <= 1.2 * step).all()


def test_q4_k_is_near_groups_of_32_with_float_scales():
    x = normal(16, 512)
    floats = sqnr_db(x, fake_quantize(x, Scheme(bits=4, symmetric=False, granularity="group", group_size=32)))
    # 6-bit scales cost something, and minima that need not fall on a code gain some
    assert abs(sqnr_db(x, q4_k_round(x)) - floats) < 0.5


def test_q4_k_refuses_rows_it_cannot_cut():
    with pytest.raises(ValueError, match="multiple of 256; got 300"):
        q4_k_round(torch.ones(1, 300))


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 2), (2, 3), (1, 3), (2, 2)])
def test_trellis_finds_the_best_of_all_paths(bits, state_bits):
    x = normal(2, 4, seed=bits)
    generator = torch.Generator().manual_seed(3)
    found = trellis_round(x, bits=bits, state_bits=state_bits, generator=generator)
    values = torch.randn(2**state_bits, generator=torch.Generator().manual_seed(3))
    mask, paths = 2**state_bits - 1, []
    for start, *codes in itertools.product(range(2**state_bits), *[range(2**bits)] * 3):
        states = list(itertools.accumulate(codes, lambda s, c: ((s << bits) | c) & mask, initial=start))
        paths.append(values[states])
    errors = (x[:, None] - torch.stack(paths)).square().sum(-1)
    assert torch.allclose((x - found).square().sum(-1), errors.min(dim=1).values)


def test_longer_memory_is_better_and_the_bound_stays_above():
    x = normal(16, 256)
    ratios = [
        sqnr_db(x, trellis_round(x, state_bits=n, generator=torch.Generator().manual_seed(0))) for n in (4, 7, 10)
    ]
    assert ratios[0] < ratios[1] < ratios[2] < 12.04
    assert ratios[2] > 9.3  # the best scalar quantizer of 2 bits (Lloyd-Max)


def test_trellis_refuses_a_state_without_room():
    with pytest.raises(ValueError, match="at least one code; got state_bits=1 for bits=2"):
        trellis_round(normal(1, 4), bits=2, state_bits=1, generator=torch.Generator())
