"""Integers: exact against rational numbers, near gemmlowp's two roundings, and a layer against its float twin."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import QParams, Scheme, choose_qparams, dequantize, quantize
from labutils.quantization.integer import IntegerLinear, fixed_point, quantize_bias, requantize

INT32 = st.integers(-(2**31), 2**31 - 1)
MULTIPLIERS = st.floats(2.0**-31, 2.0**28)


@settings(deadline=None, max_examples=300)
@given(MULTIPLIERS)
def test_fixed_point_is_near_and_uses_all_31_bits(multiplier):
    m, shift = fixed_point(multiplier)
    assert 2**30 <= m < 2**31 and 1 <= shift <= 62
    assert abs(Fraction(m, 2**shift) / Fraction(multiplier) - 1) <= Fraction(1, 2**31)


def test_fixed_point_carries():
    assert fixed_point(1 - 2**-40) == (2**30, 30)


@settings(deadline=None, max_examples=300)
@given(INT32, MULTIPLIERS, st.integers(-128, 127))
def test_requantize_is_exact(value, multiplier, zero_point):
    m, shift = fixed_point(multiplier)
    exact = math.floor(Fraction(value) * Fraction(m, 2**shift) + Fraction(1, 2)) + zero_point
    ours = requantize(
        torch.tensor([value], dtype=torch.int32), torch.tensor(m), torch.tensor(shift), zero_point=zero_point
    )
    assert ours.item() == min(max(exact, -128), 127)


def gemmlowp(value, m, shift):
    """SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT, in Python's integers."""
    product = value * m
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    high = abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)  # C truncates towards zero
    exponent = shift - 31
    rest, threshold = high & (2**exponent - 1), (2**exponent - 1) // 2 + (high < 0)
    return (high >> exponent) + (rest > threshold)


@settings(deadline=None, max_examples=300)
@given(st.integers(-(2**24), 2**24), st.floats(2.0**-20, 0.999))
def test_requantize_is_within_one_of_gemmlowp(value, multiplier):
    m, shift = fixed_point(multiplier)
    ours = requantize(torch.tensor([value]).int(), torch.tensor(m), torch.tensor(shift), zero_point=0, qmin=-100)
    theirs = min(max(gemmlowp(value, m, shift), -100), 127)
    assert abs(ours.item() - theirs) <= 1


def test_requantize_equals_gemmlowp_almost_always():
    m, shift = fixed_point(0.00375)
    sums = torch.arange(-20_000, 20_000, dtype=torch.int32)
    ours = requantize(sums, torch.tensor(m), torch.tensor(shift), zero_point=0)
    theirs = torch.tensor([gemmlowp(s, m, shift) for s in sums.tolist()])
    assert (ours == theirs).float().mean() > 0.99


@st.composite
def layers(draw):
    """A layer, inputs, and the scheme of its activations."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, outputs, inputs = draw(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 33)))
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((outputs, inputs), (outputs,)))
    if draw(st.booleans()):
        weight[0] = 0
    x = torch.randn(rows, inputs, generator=generator) + draw(st.sampled_from([0.0, 2.0]))
    return weight, bias, x, Scheme(symmetric=draw(st.booleans()), granularity="tensor")


def layer_of(weight, bias, x, scheme):
    x_qparams, y_qparams = choose_qparams(x, scheme), choose_qparams(x @ weight.T + bias, scheme)
    return IntegerLinear.prepare(weight, bias, x=x_qparams, y=y_qparams), x_qparams, y_qparams


@settings(deadline=None, max_examples=100)
@given(layers())
def test_integer_linear_equals_its_float_twin(drawn):
    weight, bias, x, scheme = drawn
    layer, x_qparams, y_qparams = layer_of(weight, bias, x, scheme)
    w_qparams = choose_qparams(weight, Scheme())
    codes = quantize(x, x_qparams)
    w, x_back = dequantize(quantize(weight, w_qparams), w_qparams), dequantize(codes, x_qparams)
    twin = x_back.double() @ w.double().T + bias.double()
    half = 0.5 + 0.5 * (x_qparams.scale * w_qparams.scale / y_qparams.scale).max()  # the output's and the bias's
    low, high = ((q - y_qparams.zero_point.item()) * y_qparams.scale.item() for q in (y_qparams.qmin, y_qparams.qmax))
    y = dequantize(layer(codes), y_qparams)
    assert ((y - twin.clamp(low, high)).abs() <= half * y_qparams.scale + 1e-6).all()


def test_integer_linear_by_hand():
    one = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -127, 127)
    shifted = QParams(torch.tensor(0.5), torch.tensor(10, dtype=torch.int32), -128, 127)
    layer = IntegerLinear.prepare(torch.tensor([[127.0, -127.0]]), torch.tensor([5.0]), x=shifted, y=one)
    # x = 0.5 · (12 − 10, 9 − 10) = (1, −0.5); y = 127 + 63.5 + 5 saturates; the second row gives 0 + 5
    assert layer.bias.tolist() == [10] and layer(torch.tensor([[12, 9], [10, 10]], dtype=torch.int8)).tolist() == [
        [127],
        [5],
    ]


def test_quantize_bias_rejects_what_int32_cannot_hold():
    with pytest.raises(ValueError, match="fit int32; got up to 1e"):
        quantize_bias(torch.tensor([1.0]), 1e-5, torch.tensor([1e-5]))


def test_integer_linear_rejects_sums_that_could_overflow():
    one = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -127, 127)
    with pytest.raises(ValueError, match="every sum must fit int32"):
        IntegerLinear.prepare(torch.full((1, 2**18), 1.0), torch.zeros(1), x=one, y=one)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 2.0**30, float("nan"), float("inf"), 1e-12])
def test_fixed_point_rejects(multiplier):
    with pytest.raises(ValueError, match="multiplier must lie"):
        fixed_point(multiplier)
