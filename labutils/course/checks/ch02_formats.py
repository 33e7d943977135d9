"""Checks of chapter 02, second half: signs, small floats, NF4, and arithmetic in integers."""

import torch

from labutils.course.checks import cases_of, exercise, expect_function, expect_true
from labutils.course.checks.passes import Watch
from labutils.quantization import binary, floats, integer, nf4


def _numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _xnor(*, form=lambda n, d: n - 2 * d, operation=torch.bitwise_xor):
    def xnor_product(x_bits, weight_bits, count):
        different = operation(x_bits[:, None], weight_bits[None])
        return form(count, binary.POPCOUNT[different.int()].sum(dim=-1))

    return xnor_product


@exercise("2.7")
def xnor_product(answer):
    """Products of signs from packed bits."""

    def case(rows, outputs, count):
        signs = [binary.binarize(_numbers(n, count, seed=n))[0] for n in (rows, outputs)]
        return dict(zip(("x_bits", "weight_bits"), map(binary.pack_signs, signs), strict=True)) | {"count": count}

    expect_function(
        answer,
        lambda x_bits, weight_bits, count: binary.xnor_product(x_bits, weight_bits, count),
        cases=[case(1, 2, 8), case(3, 4, 21)],
        mistakes=[
            (_xnor(form=lambda n, d: d), "that counts the bits that differ: each of them is a −1 in the sum"),
            (_xnor(form=lambda n, d: n - d), "that counts the bits that agree: subtract those that differ once more"),
            (_xnor(form=lambda n, d: 2 * d - n), "the sign is turned: bits that differ count −1"),
            (_xnor(operation=torch.bitwise_and), "AND finds two +1 only: two −1 also multiply to +1; use ^"),
            (_xnor(form=lambda n, d: -(-n // 8) * 8 - 2 * d), "the padding was counted: use count, not 8 × bytes"),
        ],
    )


def _float_of(*, bias=7, hidden=1.0, subnormal=True, mantissa_bits=3, signed=True):
    def decode_e4m3(code):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0 and subnormal:
            value = fraction * 2.0 ** (1 - bias)
        else:
            value = (hidden + fraction) * 2.0 ** (exponent - bias)
        return -value if sign and signed else value

    return decode_e4m3


@exercise("2.8")
def decode_e4m3(answer):
    """The number of an 8-bit code, NaN aside."""
    codes = [0b0_0111_000, 0b1_1000_100, 0b0_0000_001, 0b1_0000_111, 0b0_1111_110, 0b0_0001_000, 0]
    expect_function(
        answer,
        lambda code: floats.decode(torch.tensor([code], dtype=torch.uint8), floats.E4M3).item(),
        cases=[{"code": code} for code in codes],
        mistakes=[
            (_float_of(bias=8), "the bias is 7: half the exponent's range, minus one"),
            (_float_of(bias=0), "the bias is missing: subtract 7 from the exponent"),
            (_float_of(hidden=0.0), "the hidden 1 is missing: (1 + m/8) unless the exponent field is 0"),
            (_float_of(subnormal=False), "exponent field 0 means subnormal: no hidden 1, and the exponent is 1 − 7"),
            (_float_of(mantissa_bits=0), "the mantissa counts eighths: divide it by 8"),
            (_float_of(signed=False), "the highest bit is the sign"),
        ],
    )
    with Watch(lambda _, result: getattr(result, "dtype", None) == torch.float8_e4m3fn) as watch:
        answer(codes[0])
    expect_true(
        not watch.called, "PyTorch's own E4M3 did the work", hint="by hand: shift and mask the bits of the code"
    )


def _nearest(*, absmax=True, levels=None, scale_by=None, direction=1):
    def nf4_codes(block, levels):
        peak = scale_by(block) if scale_by else block.abs().max()
        ratio = block / peak if absmax else block
        return (ratio[:, None] - levels).abs().mul(direction).argmin(dim=1)

    return nf4_codes


@exercise("2.9")
def nf4_codes(answer):
    """The nearest of 16 levels."""
    levels = nf4.nf4_levels()
    mostly_below = torch.cat([0.03 * _numbers(63), torch.tensor([-0.2])])
    blocks = [torch.tensor([2.0, 0.0, -2.0, 0.1]), mostly_below, 5 + _numbers(64, seed=1)]

    def cut(block, levels):
        return torch.bucketize(block / block.abs().max(), levels).clamp(max=15)

    def even(block, levels):
        return torch.round((block / block.abs().max() + 1) * 7.5).long()

    expect_function(
        answer,
        lambda block, levels: nf4.nf4_quantize(block, block=len(block))[0].long(),
        cases=[{"block": block, "levels": levels} for block in blocks],
        mistakes=[
            (_nearest(absmax=False), "the levels span −1 … 1: divide the block by its max |x| first"),
            (_nearest(scale_by=lambda b: b.max()), "the scale is the largest |x|: a block may be mostly negative"),
            (_nearest(scale_by=lambda b: b.std()), "divide by max |x|, so that nothing lies outside −1 … 1"),
            (even, "that is int4, evenly spaced: look for the nearest of the given levels"),
            (cut, "that is the next level above: compare the distances on both sides"),
            (lambda block, levels: levels[_nearest()(block, levels)], "those are levels: return their numbers"),
        ],
    )


def _nvfp4(block, tensor_scale, *, form=floats.E4M3, top=6.0, undo=True, rounded=True):
    scale = block.abs().max() / (top * tensor_scale)
    if rounded:
        scale = floats.decode(floats.encode(scale, form), form)
    codes = floats.encode(block / (scale * tensor_scale), floats.E2M1)
    return floats.decode(codes, floats.E2M1) * (scale * tensor_scale if undo else scale)


def _power_of_two(block, tensor_scale):
    step = 2.0 ** (block.abs().max().log2().floor() - 2)
    return floats.decode(floats.encode(block / step, floats.E2M1), floats.E2M1) * step


@exercise("2.10")
def nvfp4_back(answer):
    """What a block of NVFP4 gives back."""

    def reference(block, tensor_scale):
        ceiling = torch.full_like(block, 6 * 448 * tensor_scale)  # a block that fixes the tensor's scale
        return floats.nvfp4_dequantize(*floats.nvfp4_quantize(torch.stack([ceiling, block])))[1]

    expect_function(
        answer,
        reference,
        cases=[
            {"block": _numbers(16, seed=seed) * size, "tensor_scale": scale}
            for seed, size, scale in ((0, 1.0, 0.002), (1, 0.2, 0.002), (2, 30.0, 0.05))
        ],
        rtol=1e-4,
        mistakes=[
            (lambda **a: _nvfp4(**a, rounded=False), "the block's scale is stored in E4M3: encode and decode it first"),
            (lambda **a: _nvfp4(**a, undo=False), "the tensor's scale is missing on the way back"),
            (lambda **a: _nvfp4(**a, top=7.0), "E2M1's largest number is 6: max |x| must land there"),
            (lambda **a: _nvfp4(**a, top=448.0), "448 is E4M3's largest; the elements are E2M1, up to 6"),
            (lambda **a: _nvfp4(**a, form=floats.E5M2), "the scale's format is E4M3, not E5M2"),
            (_power_of_two, "that scale is MXFP4's power of two: NVFP4 rounds the scale to E4M3"),
        ],
    )


def _bias(steps, end=torch.Tensor.int):
    return lambda bias, x_scale, weight_scale: end(torch.round(steps(bias, x_scale, weight_scale)))


@exercise("2.11")
def quantize_bias(answer):
    """Int32 at s_x · s_w."""
    expect_function(
        answer,
        lambda bias, x_scale, weight_scale: integer.quantize_bias(bias, x_scale, weight_scale),
        cases=cases_of(
            "bias x_scale weight_scale",
            (torch.tensor([0.6, -0.4]), 0.5, torch.tensor([0.1, 0.02])),
            (torch.tensor([3.0, -250.0]), 0.01, torch.tensor([0.003, 0.002])),
        ),
        dtype=True,
        mistakes=[
            (
                _bias(lambda b, x, w: b / w),
                "the weight's scale alone: the sums it is added to count in steps of s_x · s_w",
            ),
            (
                _bias(lambda b, x, w: b / x),
                "the input's scale alone: the sums it is added to count in steps of s_x · s_w",
            ),
            (_bias(lambda b, x, w: b * x * w), "you multiplied by the scales: a code counts steps, so divide"),
            (
                _bias(lambda b, x, w: b / (x * w), end=lambda codes: codes.clamp(-128, 127).to(torch.int8)),
                "8 bits are the article's mistake: products of two int8 are summed in int32, so is the bias",
            ),
            (_bias(lambda b, x, w: b / (x * w), end=torch.clone), "codes are integers: end with .to(torch.int32)"),
        ],
    )


def _requantized(*, half=True, clamp=True, before=False, multiply=True, shifted=True):
    def requantize(sums, multiplier, shift, zero_point):
        product = sums.long() * (multiplier if multiply else 1) + (zero_point if before else 0)
        product = product + (1 << (shift - 1) if half else 0)
        q = (product >> shift if shifted else product) + (0 if before else zero_point)
        return q.clamp(-128, 127).to(torch.int8) if clamp else q

    return requantize


def _in_floats(sums, multiplier, shift, zero_point):
    return (torch.floor(sums.double() * multiplier / 2.0**shift + 0.5) + zero_point).clamp(-128, 127).to(torch.int8)


def _in_int32(sums, multiplier, shift, zero_point):
    product = (sums.long() * multiplier + (1 << (shift - 1))).int().long()
    return ((product >> shift) + zero_point).clamp(-128, 127).to(torch.int8)


@exercise("2.12")
def requantize(answer):
    """⌊(sum · m + 2^(n−1)) / 2^n⌋ + Z, clamped."""
    sums = torch.tensor([0, 1000, -1000, 1017, -1017, 99_999, -99_999, 7], dtype=torch.int32)

    def case(real, zero_point):
        multiplier, shift = integer.fixed_point(real)
        return {"sums": sums, "multiplier": multiplier, "shift": shift, "zero_point": zero_point}

    # the product, (2^27 + 1)(2^27 − 1) = 2^54 − 1, lies just below half of 2^55: a float64 rounds it up to it
    near_half = {"sums": torch.tensor([2**27 + 1], dtype=torch.int32), "multiplier": 2**27 - 1}
    long = near_half | {"shift": 55, "zero_point": 0}

    def reference(sums, multiplier, shift, zero_point):
        return integer.requantize(sums, torch.tensor(multiplier), torch.tensor(shift), zero_point=zero_point)

    expect_function(
        answer,
        reference,
        cases=[case(0.0125, 0), case(0.0625, -9), case(0.003, 5), long],
        dtype=True,
        mistakes=[
            (_requantized(half=False), "a shift rounds down: add half of what is shifted out, 2^(shift − 1), first"),
            (_requantized(clamp=False), "the codes must fit int8: clamp to −128 … 127 and convert"),
            (_requantized(before=True), "the zero point is in output steps: add it after the shift"),
            (_in_floats, "a float64 holds 53 bits and the product up to 62: no floats, only integers"),
            (lambda **a: _requantized()(**a).to(torch.int64), "codes of eight bits: end with .to(torch.int8)"),
            (_in_int32, "the product has up to 62 bits: make the sums int64 first, with .long()"),
            (_requantized(multiply=False), "the multiplier is missing: sums · multiplier, then the shift"),
            (_requantized(shifted=False), "the shift is missing: >> shift divides by 2^shift"),
        ],
    )
