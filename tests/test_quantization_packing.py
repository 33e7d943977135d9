"""Packing: there and back for every width and odd counts, against numpy's bits, and what a weight truly takes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import Scheme, choose_qparams, quantize
from labutils.quantization.packing import bits_per_weight, pack, unpack


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8), st.integers(0, 30), st.integers(0, 3), st.integers(0, 10_000))
def test_unpack_inverts_pack(bits, count, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), codes.to(torch.uint8))


def test_pack_of_one_bit_equals_numpy():
    bits = torch.randint(0, 2, (4, 13), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(pack(bits, 1).numpy(), np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def test_pack_by_hand():
    assert pack(torch.tensor([5, 3, 7]), 3).tolist() == [0b11_011_101, 0b1]  # 7 is cut in two


@pytest.mark.parametrize("scheme", [Scheme(bits=3), Scheme(bits=4, symmetric=False), Scheme(bits=2)])
def test_signed_codes_fit_once_they_count_from_zero(scheme):
    codes = quantize(torch.randn(3, 11), choose_qparams(torch.randn(3, 11), scheme)).int() - scheme.qmin
    assert torch.equal(unpack(pack(codes, scheme.bits), scheme.bits, 11).int(), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [([16], 4, "0 to 15; got 16"), ([-1], 4, "0 to 15; got -1"), ([0], 0, "bits must"), ([0], 9, "bits must")],
)
def test_pack_rejects(codes, bits, words):
    with pytest.raises(ValueError, match=words):
        pack(torch.tensor(codes), bits)


def test_unpack_rejects_more_than_there_is():
    with pytest.raises(ValueError, match="need 20 bits; got 16"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)


@pytest.mark.parametrize(
    ("shape", "fields", "expected"),
    [
        ((4, 64), {"bits": 8, "granularity": "tensor"}, 8 + 32 / 256),
        ((4, 64), {"bits": 8}, 8 + 32 / 64),
        ((4, 64), {"bits": 4, "symmetric": False}, 4 + (32 + 4) / 64),
        ((4, 64), {"bits": 2, "granularity": "group", "group_size": 16}, 2 + 32 / 16),
        ((1, 3), {"bits": 3, "scale_dtype": torch.float16}, (16 + 16) / 3),  # 9 bits take two bytes
    ],
)
def test_bits_per_weight_by_hand(shape, fields, expected):
    assert bits_per_weight(shape, Scheme(**fields)) == expected


@pytest.mark.parametrize("fields", [{}, {"granularity": "group", "group_size": 8}, {"granularity": "tensor"}])
def test_bits_per_weight_counts_what_is_really_stored(fields):
    scheme = Scheme(bits=3, symmetric=False, **fields)
    x = torch.randn(6, 24)
    q = choose_qparams(x, scheme)
    stored = pack(quantize(x, q).int() - q.qmin, 3).numel() * 8 + q.scale.numel() * 32 + q.zero_point.numel() * 3
    assert bits_per_weight(x.shape, scheme) == stored / x.numel()


def test_real_zero_points_count_their_own_bits():
    scheme = Scheme(bits=3, symmetric=False, granularity="group", group_size=64, scale_dtype=torch.float16)
    assert bits_per_weight((64, 64), scheme) == 3 + (16 + 3) / 64
    assert bits_per_weight((64, 64), scheme, zero_bits=16) == 3.5  # HQQ
    with pytest.raises(ValueError, match="a symmetric scheme has no zero points; got zero_bits=16"):
        bits_per_weight((64, 64), Scheme(bits=3), zero_bits=16)
