"""Small floats bit for bit against torch and ml_dtypes: every code, every midpoint, and numbers of all sizes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import Scheme
from labutils.quantization.floats import (
    E2M1,
    E4M3,
    E5M2,
    decode,
    encode,
    fake_quantize_float,
    mxfp4_dequantize,
    mxfp4_quantize,
    nvfp4_dequantize,
    nvfp4_quantize,
)

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}
THEIRS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def all_codes(name):
    return torch.arange(16 if name == "e2m1" else 256, dtype=torch.uint8)


def same_bits(left, right):
    """Equal numbers and equal signs of zero; NaN equals NaN."""
    left, right = torch.as_tensor(left), torch.as_tensor(right)
    nan = left.isnan() & right.isnan()
    return bool((nan | ((left == right) & (left.signbit() == right.signbit()))).all())


def trying_numbers(name):
    """Every number of the format, every midpoint, the neighbours of both, and numbers of all sizes."""
    numbers = decode(all_codes(name), FORMATS[name])
    numbers = numbers[numbers.isfinite()].sort().values
    beyond = FORMATS[name].largest * torch.tensor([1.03, 1.07, 9, -9])
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, beyond])
    x = torch.cat([x, *(torch.nextafter(x, torch.tensor(s)) for s in (-torch.inf, torch.inf))])
    generator = torch.Generator().manual_seed(0)
    return torch.cat([x, torch.randn(2000, generator=generator) * torch.logspace(-12, 6, 2000), torch.tensor([1e-45])])


@pytest.mark.parametrize("name", FORMATS)
def test_decode_equals_ml_dtypes_on_every_code(name):
    theirs = all_codes(name).numpy().view(THEIRS[name]).astype(np.float32)
    assert same_bits(decode(all_codes(name), FORMATS[name]), theirs)


@pytest.mark.parametrize("name", TORCH)
def test_decode_equals_torch_on_every_code(name):
    assert same_bits(decode(all_codes(name), FORMATS[name]), all_codes(name).view(TORCH[name]).float())


def test_largest_numbers():
    assert (E4M3.largest, E5M2.largest, E2M1.largest) == (448, 57344, 6)


def test_e2m1_has_eight_magnitudes():
    assert decode(all_codes("e2m1")[:8], E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("name", FORMATS)
def test_encode_equals_ml_dtypes(name):
    x = trying_numbers(name)
    theirs = x.numpy().astype(THEIRS[name])
    codes = encode(x, FORMATS[name], saturate=False)
    assert same_bits(decode(codes, FORMATS[name]), theirs.astype(np.float32))
    finite = np.isfinite(theirs.astype(np.float32))
    np.testing.assert_array_equal(codes.numpy()[finite], theirs.view(np.uint8)[finite])


@pytest.mark.parametrize("name", TORCH)
def test_encode_equals_torch(name):
    x = trying_numbers(name).clamp(-FORMATS[name].largest, FORMATS[name].largest)  # beyond, torch's versions differ
    x = torch.cat([x, torch.tensor([0.0, -0.0])])
    theirs = x.to(TORCH[name])
    codes = encode(x, FORMATS[name])
    assert same_bits(decode(codes, FORMATS[name]), theirs.float())
    assert torch.equal(codes, theirs.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_encode_inverts_decode(name):
    codes = all_codes(name)
    numbers = decode(codes, FORMATS[name])
    assert torch.equal(encode(numbers[numbers.isfinite()], FORMATS[name]), codes[numbers.isfinite()])


@pytest.mark.parametrize("name", FORMATS)
def test_encode_saturates_by_default(name):
    form = FORMATS[name]
    assert decode(encode(torch.tensor([1e30, -1e30]), form), form).tolist() == [form.largest, -form.largest]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_encode_makes_no_ordinary_number_of_what_is_none(bad):
    x = torch.tensor([1.0, bad])
    for form, saturate in ((E4M3, True), (E5M2, True), (E2M1, True), (E2M1, False)):
        with pytest.raises(ValueError, match="x must be finite for a cast that saturates; got inf or nan"):
            encode(x, form, saturate=saturate)
    kept = decode(encode(x, E5M2, saturate=False), E5M2)[1]
    assert same_bits(kept, x[1]) and decode(encode(x, E4M3, saturate=False), E4M3)[1].isnan()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from(list(FORMATS)), st.integers(-30, 30))
def test_fake_quantize_float_errs_by_half_a_mantissa_step(seed, name, exponent):
    form = FORMATS[name]
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    back = fake_quantize_float(x, form, Scheme(granularity="group", group_size=8))
    smallest = x.unflatten(-1, (2, 8)).abs().amax(dim=-1, keepdim=True) / form.largest * 2.0 ** (1 - form.bias)
    allowed = torch.maximum(x.abs(), smallest.expand(4, 2, 8).reshape(x.shape)) * 2.0 ** -(form.mantissa_bits + 1)
    assert ((back - x).abs() <= allowed * (1 + 1e-5)).all()
    assert back.shape == x.shape and not fake_quantize_float(torch.zeros(2, 8), form, Scheme()).any()


def test_mxfp4_equals_torchao(library_aside):
    mx = library_aside("torchao.prototype.mx_formats.mx_tensor")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]
    exponents, theirs = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    codes, ours = mxfp4_quantize(x)
    assert torch.equal(ours, exponents.view(torch.uint8))
    packed = theirs.view(torch.uint8)  # two codes a byte, the first in the low half
    assert torch.equal(codes, torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2))


def test_mxfp4_scales_are_e8m0():
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)) * 1e-3
    codes, exponents = mxfp4_quantize(x)
    scales = exponents.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    numbers = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = (numbers.reshape(3, 3, 32) * scales[..., None]).reshape(3, 96)
    np.testing.assert_array_equal(mxfp4_dequantize(codes, exponents).numpy(), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(-45, 38))
def test_mxfp4_errs_by_a_quarter_of_the_largest_at_most(seed, exponent):
    x = (torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).clamp(-3e38, 3e38)
    back = mxfp4_dequantize(*mxfp4_quantize(x))
    largest = x.unflatten(-1, (2, 32)).abs().amax(dim=-1, keepdim=True).expand(2, 2, 32).reshape(x.shape)
    assert ((back - x).abs() <= largest / 4 + 2.0**-127).all()


def test_mxfp4_of_zeros_is_zero():
    codes, exponents = mxfp4_quantize(torch.zeros(1, 32))
    assert not codes.any() and exponents.item() == 127


@pytest.mark.parametrize(
    ("x", "words"),
    [(torch.ones(2, 33), "must divide"), (torch.full((1, 32), float("nan")), "finite"), (torch.ones(0, 32), "one num")],
)
def test_mxfp4_rejects(x, words):
    with pytest.raises(ValueError, match=words):
        mxfp4_quantize(x)


def test_nvfp4_by_hand():
    x = torch.tensor([[6.0, -3.0] + [0.0] * 14 + [0.75, 0.1] + [0.0] * 14])
    codes, scales, tensor_scale = nvfp4_quantize(x)
    assert tensor_scale == pytest.approx(6 / 2688) and decode(scales, E4M3).tolist() == [[448.0, 56.0]]
    back = nvfp4_dequantize(codes, scales, tensor_scale)
    assert back[0, :2].tolist() == [6.0, -3.0] and back[0, 16:18].tolist() == pytest.approx([0.75, 0.125])  # step 1/8


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(-30, 30))
def test_nvfp4_follows_its_formula_block_by_block(seed, exponent):
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    codes, scales, tensor_scale = nvfp4_quantize(x)
    back = nvfp4_dequantize(codes, scales, tensor_scale)
    for block, scale, numbers in zip(x.split(16, 1), scales.T, back.split(16, 1), strict=True):
        step = scale.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None] * np.float32(tensor_scale)
        safe = np.where(step > 0, step, 1)
        ratio = (block.numpy() / safe).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        np.testing.assert_allclose(numbers.numpy(), ratio * step, rtol=1e-6)


def test_nvfp4_of_zeros_is_zero_and_a_tiny_block_vanishes():
    assert not nvfp4_dequantize(*nvfp4_quantize(torch.zeros(1, 16))).any()
    x = torch.cat([torch.full((1, 16), 1.0), torch.full((1, 16), 1e-9)], dim=1)  # below E4M3's smallest scale
    assert nvfp4_dequantize(*nvfp4_quantize(x))[0].tolist() == [1.0] * 16 + [0.0] * 16


def test_nvfp4_rejects_a_row_it_cannot_cut():
    with pytest.raises(ValueError, match="must divide"):
        nvfp4_quantize(torch.ones(1, 33))
