"""Affine quantization: by hand, as properties over random shapes, against torch and torchao, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.quantization.affine import (
    QParams,
    Scheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    grouped,
    observed_range,
    quantize,
)

FLOAT32_MAX = torch.finfo(torch.float32).max


@st.composite
def tensors(draw):
    """Odd shapes, any size of numbers, some rows all zero or constant; and the seed's generator."""
    shape = draw(st.sampled_from([(1,), (7,), (1, 1), (3, 12), (5, 1), (2, 3, 4), (13, 24)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-42, 37)) + draw(st.sampled_from([0, 0, 3]))
    if x.ndim > 1 and draw(st.booleans()):
        x[..., 0, :] = draw(st.sampled_from([0.0, -2.5, 7.0]))
    return x


@st.composite
def schemes(draw):
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "token"]))
    return {
        "bits": draw(st.integers(2, 8)),
        "symmetric": draw(st.booleans()),
        "granularity": granularity,
        "group_size": 1 if granularity == "group" else None,
        "full_range": draw(st.booleans()),
    }


def divisors(n):
    return [size for size in range(1, n + 1) if n % size == 0]


@settings(deadline=None, max_examples=200)
@given(tensors(), schemes(), st.data())
def test_fake_quantize_errs_by_half_a_step_at_most(x, fields, data):
    if fields["granularity"] == "group":
        fields["group_size"] = data.draw(st.sampled_from(divisors(x.shape[-1])))
    scheme = Scheme(**fields)
    qparams = choose_qparams(x, scheme)
    codes, back = quantize(x, qparams), fake_quantize(x, scheme)
    assert codes.dtype == torch.int8 and codes.shape == back.shape == x.shape and back.dtype == x.dtype
    assert codes.min() >= scheme.qmin and codes.max() <= scheme.qmax
    half_steps = (grouped(back, qparams.group_size) - grouped(x, qparams.group_size)).abs() / qparams.scale
    # an affine zero point is rounded too, so the outermost code may lie up to one step inside
    assert half_steps.max() <= (0.5 if scheme.symmetric else 1.0) + 1e-3
    assert torch.equal(quantize(dequantize(codes, qparams), qparams), codes)


@settings(deadline=None, max_examples=50)
@given(tensors(), schemes())
def test_zero_stays_exactly_zero(x, fields):
    x[..., -1] = 0
    assert (fake_quantize(x, Scheme(**fields))[..., -1] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 7.0, -2.5, 1e-36, -3e38])
def test_constants_come_back(value, symmetric):
    x = torch.full((3, 5), value)
    torch.testing.assert_close(fake_quantize(x, Scheme(bits=3, symmetric=symmetric)), x, rtol=1e-6, atol=0.0)


def test_choose_qparams_by_hand():
    q = choose_qparams(torch.tensor([[0.0, 25.5], [-12.7, 12.7]]), Scheme(symmetric=False))
    torch.testing.assert_close(q.scale, torch.tensor([[0.1], [25.4 / 255]]))
    assert q.zero_point.tolist() == [[-128], [0]] and (q.qmin, q.qmax) == (-128, 127)
    assert q.zero_point.dtype == torch.int32 and q.scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"granularity": "tensor"}, ()),
        ({"granularity": "channel"}, (4, 1)),
        ({"granularity": "token"}, (4, 1)),
        ({"granularity": "group", "group_size": 3}, (4, 2, 1)),
    ],
)
def test_choose_qparams_shape_of_the_scale(fields, shape):
    assert choose_qparams(torch.randn(4, 6), Scheme(**fields)).scale.shape == shape


def test_finer_granularity_is_never_worse_in_the_worst_step():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 8)[:, None]
    schemes = [Scheme(bits=4, granularity="tensor"), Scheme(bits=4)]
    schemes += [Scheme(bits=4, granularity="group", group_size=size) for size in (32, 16, 8)]
    errors = [(fake_quantize(x, scheme) - x).square().mean().item() for scheme in schemes]
    assert errors == sorted(errors, reverse=True)


def test_clipping_saturates():
    x = torch.tensor([[0.1, -0.4, 100.0]])
    clipped = fake_quantize(x, Scheme(), low=-1.0, high=1.0)
    assert clipped[0, 2] == pytest.approx(1.0) and clipped[0, 0] == pytest.approx(0.1, abs=0.5 / 127)
    per_row = choose_qparams(x.expand(2, 3), Scheme(), low=torch.tensor([[-1.0], [-2.0]]), high=0.0)
    torch.testing.assert_close(per_row.scale, torch.tensor([[1.0], [2.0]]) / 127)


def test_scales_can_be_stored_in_half_precision():
    x = torch.tensor([[0.1, -1.0], [1e-9, 0.0]])
    half = choose_qparams(x, Scheme(scale_dtype=torch.float16))
    assert half.scale.dtype == torch.float32 and torch.equal(half.scale, half.scale.half().float())
    assert half.scale[1] == torch.finfo(torch.float16).tiny  # so small a row has no finer step
    with pytest.raises(ValueError, match="finite in torch.float16"):
        choose_qparams(torch.tensor([1e9]), Scheme(scale_dtype=torch.float16))


def test_quantize_saturates_finite_numbers_and_no_others():
    q = QParams(torch.tensor(0.5), torch.tensor(3), -8, 7)
    assert quantize(torch.tensor([-3e38, 3e38]), q).tolist() == [-8, 7]  # 3e38 / 0.5 is infinite, 3e38 is not
    for bad in (float("-inf"), float("inf"), float("nan")):
        with pytest.raises(ValueError, match="only a finite number has a code; got inf or nan"):
            quantize(torch.tensor([1.0, bad]), q)


def test_quantize_rounds_ties_to_even():
    q = QParams(torch.tensor(1.0), torch.tensor(0), -128, 127)
    assert quantize(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), q).tolist() == [-2, 0, 0, 2, 2]


def test_quantize_holds_unsigned_bytes():
    """The source article's network, rounded properly: 127.5 and 76.5 are ties (in float64; float32 has 127.49999)."""
    network = torch.tensor([[0.5, 0.3], [0.4, 0.2], [0.6, 0.4]], dtype=torch.float64)
    codes = quantize(network, QParams(torch.tensor(1 / 255, dtype=torch.float64), torch.tensor(0), 0, 255))
    assert codes.tolist() == [[128, 76], [102, 51], [153, 102]] and codes.dtype == torch.int32


def test_stochastic_rounding_is_right_on_average():
    q = QParams(torch.tensor(1.0), torch.tensor(0), -7, 7)
    x = torch.tensor([0.25, -0.75, 2.0]).repeat(20_000, 1)
    codes = quantize(x, q, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(codes.float().mean(dim=0), x[0], rtol=0.0, atol=0.015)  # 5 standard errors
    assert set(codes[:, 0].tolist()) == {0, 1} and set(codes[:, 2].tolist()) == {2}
    again = quantize(x, q, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes, again)


def _away_from_ties(x, scale):
    """torch multiplies by 1/S, we divide by S: within one unit in the last place of a tie the two may differ."""
    fraction = (x.double() / scale.double()).frac().abs()
    return (fraction - 0.5).abs() > 1e-4


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans())
def test_fake_quantize_equals_torch_per_channel(seed, bits, symmetric):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))
    q = choose_qparams(x, Scheme(bits=bits, symmetric=symmetric))
    theirs = torch.fake_quantize_per_channel_affine(
        x, q.scale.flatten(), q.zero_point.flatten().int(), 0, q.qmin, q.qmax
    )
    sure = _away_from_ties(x, q.scale)
    torch.testing.assert_close(dequantize(quantize(x, q), q)[sure], theirs[sure], rtol=1e-6, atol=1e-7)
    assert sure.float().mean() > 0.95


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(1e-3, 10.0), st.integers(-100, 100))
def test_quantize_equals_torch_per_tensor(seed, scale, zero_point):
    x = torch.randn(301, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor(scale)
    q = QParams(scale, torch.tensor(zero_point, dtype=torch.int32), -128, 127)
    theirs = torch.quantize_per_tensor(x, scale.item(), zero_point, torch.qint8)
    sure = _away_from_ties(x, scale)
    assert torch.equal(quantize(x, q)[sure], theirs.int_repr()[sure])
    torch.testing.assert_close(dequantize(theirs.int_repr(), q), theirs.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [(6, 40), (1, 40), (1, 8)])
def test_choose_qparams_equals_torchao(block, bits, symmetric, library_aside):
    primitives = library_aside("torchao.quantization.quant_primitives")
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits))
    granularity = {(6, 40): "tensor", (1, 40): "channel", (1, 8): "group"}[block]
    size = 8 if granularity == "group" else None
    ours = choose_qparams(x, Scheme(bits=bits, symmetric=symmetric, granularity=granularity, group_size=size))
    mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    scale, zero_point = primitives.choose_qparams_affine(
        x, mapping, block, torch.int8, quant_min=ours.qmin, quant_max=ours.qmax
    )
    torch.testing.assert_close(ours.scale.flatten(), scale.flatten(), rtol=1e-7, atol=0.0)
    assert ours.zero_point.flatten().tolist() == zero_point.flatten().tolist()
    theirs = primitives.quantize_affine(x, block, scale, zero_point, torch.int8, ours.qmin, ours.qmax)
    sure = _away_from_ties(grouped(x, size), ours.scale).reshape(x.shape)
    assert torch.equal(quantize(x, ours)[sure], theirs[sure])


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.empty(0, 4), "at least one number"),
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.tensor([1.0, float("inf")]), "finite"),
        (torch.tensor([FLOAT32_MAX, -FLOAT32_MAX]), "finite in torch.float32"),
    ],
)
def test_choose_qparams_rejects(x, words):
    with pytest.raises(ValueError, match=words):
        choose_qparams(x, Scheme(symmetric=False))


def test_quantize_rejects_nan_and_an_unknown_rounding():
    q = QParams(torch.tensor(1.0), torch.tensor(0), -7, 7)
    with pytest.raises(ValueError, match="only a finite number has a code"):
        quantize(torch.tensor([float("nan")]), q)
    with pytest.raises(ValueError, match="rounding must be"):
        quantize(torch.tensor([1.0]), q, rounding="up")


def test_group_size_must_divide():
    with pytest.raises(ValueError, match="group_size=4 must divide the last axis; got shape \\(2, 6\\)"):
        observed_range(torch.ones(2, 6), Scheme(granularity="group", group_size=4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, "bits must be"),
        ({"bits": 9}, "bits must be"),
        ({"granularity": "row"}, "granularity must be"),
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 8}, "group_size"),
        ({"group_size": -1}, "group_size"),
        ({"granularity": "group", "group_size": 0}, "group_size"),
    ],
)
def test_scheme_rejects(fields, words):
    with pytest.raises(ValueError, match=words):
        Scheme(**fields)


def test_scheme_ranges():
    ranges = {bits: (Scheme(bits=bits).qmin, Scheme(bits=bits).qmax) for bits in (2, 3, 4, 8)}
    assert ranges == {2: (-1, 1), 3: (-3, 3), 4: (-7, 7), 8: (-127, 127)}
    assert Scheme(full_range=True).qmin == Scheme(symmetric=False).qmin == -128
