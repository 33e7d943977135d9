"""Checks of chapter 02, first half: codes, scales, groups, true bits, clipping, and noise."""

import math

import torch

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.quantization import affine, clipping, packing, theory


def _numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantize(x, scale, zero_point, qmin, qmax):
    scale, zero_point = (torch.tensor(v, dtype=t) for v, t in ((scale, torch.float64), (zero_point, torch.int32)))
    return affine.quantize(x, affine.QParams(scale, zero_point, qmin, qmax)).int()


def _codes(*, ratio=lambda x, s: x / s, rounding=torch.round, shift=1, low=True, clamp=True, early=False, whole=True):
    """The first exercise with one thing at a time gone wrong."""

    def quantize(x, scale, zero_point, qmin, qmax):
        q = rounding(ratio(x, scale))
        q = q.clamp(qmin, qmax) if early else q
        q = q + shift * zero_point
        q = q.clamp(qmin if low else None, qmax) if clamp and not early else q
        return q.int() if whole else q

    return quantize


def _rounded_together(x, scale, zero_point, qmin, qmax):
    return torch.round(x / scale + zero_point).clamp(qmin, qmax).int()


def _in_float32(x, scale, zero_point, qmin, qmax):
    return _codes()(x.float(), torch.tensor(scale), zero_point, qmin, qmax)


@exercise("2.1")
def affine_codes(answer):
    """The article's formula, repaired."""
    network = torch.tensor([[0.5, 0.3], [0.4, 0.2], [0.6, 0.4]], dtype=torch.float64)
    small = torch.tensor([-9.0, -0.75, -0.25, 0.0, 0.3, 0.75, 1.25, 6.0], dtype=torch.float64)
    expect_function(
        answer,
        _quantize,
        cases=[
            {"x": network, "scale": 1 / 255, "zero_point": 0, "qmin": 0, "qmax": 255},
            {"x": small, "scale": 0.5, "zero_point": 3, "qmin": -8, "qmax": 7},
            {"x": small, "scale": 0.25, "zero_point": -2, "qmin": -128, "qmax": 127},
        ],
        dtype=True,
        mistakes=[
            (_in_float32, "you lost float64: in float32 a tie is none any more, so keep the dtype of x"),
            (_rounded_together, "round before you add Z: rounded together, a tie moves with an odd Z"),
            (lambda **case: _codes()(**case).long(), "the codes are int32: end with .to(torch.int32)"),
            (_codes(ratio=lambda x, s: x * s), "you multiplied by the scale: the code counts steps, so divide by it"),
            (_codes(clamp=False), "codes leave the range: clamp to qmin … qmax"),
            (_codes(rounding=torch.trunc), "a conversion to int cuts the fraction off: round first"),
            (_codes(rounding=lambda r: torch.floor(r + 0.5)), "ties go to the even neighbour: torch.round does that"),
            (_codes(shift=0), "the zero point is missing: it is added after rounding"),
            (_codes(shift=-1), "the zero point is added here and subtracted on the way back"),
            (_codes(early=True), "clamp last: adding the zero point moves codes out of the range again"),
            (_codes(whole=False), "codes are integers: end with .to(torch.int32)"),
        ],
    )


def _choose_qparams(x, qmin, qmax):
    bits = (qmax - qmin).bit_length()
    scheme = affine.Scheme(bits=bits, symmetric=False, granularity="tensor")
    q = affine.choose_qparams(x, scheme)
    return q.scale.item(), q.zero_point.item() + qmin - q.qmin


def _range(*, levels=0, with_zero=True, zero=lambda low, scale, qmin: qmin - round(low / scale)):
    def choose_qparams(x, qmin, qmax):
        low, high = x.min().item(), x.max().item()
        low, high = (min(low, 0.0), max(high, 0.0)) if with_zero else (low, high)
        scale = (high - low) / (qmax - qmin + levels)
        return scale, zero(low, scale, qmin)

    return choose_qparams


def _in_float(low, scale, qmin):
    return float(qmin - round(low / scale))


@exercise("2.2")
def affine_qparams(answer):
    """Scale and zero point of a range that holds 0."""
    expect_function(
        answer,
        _choose_qparams,
        cases=[
            {"x": torch.tensor([-1.0, 0.0, 3.0]), "qmin": -8, "qmax": 7},
            {"x": torch.tensor([2.0, 6.0, 3.0]), "qmin": 0, "qmax": 255},
            {"x": torch.tensor([-0.5, -2.0]), "qmin": -128, "qmax": 127},
        ],
        mistakes=[
            (_range(levels=1), "256 levels have 255 steps between them: divide by qmax - qmin"),
            (_range(with_zero=False), "0 must have a code: stretch the range to min(low, 0) … max(high, 0)"),
            (_range(zero=lambda low, scale, qmin: -round(low / scale)), "low must land on qmin: Z = qmin - low / S"),
            (_range(zero=lambda low, scale, qmin: qmin + round(low / scale)), "a sign is wrong: Z = qmin - low / S"),
            (_range(zero=lambda low, scale, qmin: qmin - low / scale), "the zero point is a code: round it to an int"),
            (_range(zero=_in_float), "a code is an int: Python's round of a number gives one, torch.round a float"),
        ],
        dtype=True,
    )


def _group_scales(weight, qmax, group_size):
    bits = (qmax + 1).bit_length()
    scheme = affine.Scheme(bits=bits, granularity="group", group_size=group_size)
    return affine.choose_qparams(weight, scheme).scale.squeeze(-1)


def _scales(*, view=None, absolute=True, steps=lambda qmax: qmax):
    def group_scales(weight, qmax, group_size):
        groups = view(weight, group_size) if view else weight.unflatten(1, (-1, group_size))
        return (groups.abs() if absolute else groups).amax(dim=-1) / steps(qmax)

    return group_scales


def _along_outputs(weight, size):
    return weight.T.unflatten(1, (-1, size))


def _strided(weight, size):
    return weight.unflatten(1, (size, -1)).transpose(1, 2)


@exercise("2.3")
def group_scales(answer):
    """The largest |w| over qmax, of each run of neighbours in a row."""
    expect_function(
        answer,
        _group_scales,
        cases=[
            {"weight": torch.tensor([[1.0, -7.0, 2.0, 0.5], [3.0, 0.0, -14.0, 7.0]]), "qmax": 7, "group_size": 2},
            {"weight": _numbers(8, 8), "qmax": 127, "group_size": 4},
        ],
        mistakes=[
            (_scales(absolute=False), "a large negative weight needs room too: take the largest |w|"),
            (_scales(view=lambda w, g: w), "that is one scale a row: cut the row into groups first"),
            (_scales(view=_along_outputs), "those groups run down the columns: a group is neighbours in one row"),
            (_scales(view=_strided), "a group is group_size neighbours: unflatten to (-1, group_size)"),
            (_scales(steps=lambda qmax: 2 * qmax + 1), "that spreads 0 … max |w| over all codes: divide by qmax"),
            (lambda **case: _scales()(**case)[..., None], "one number a group: drop the last axis"),
        ],
    )


def _smallest(*, zero=1, per=1, strict=False, pick=min, divides=True):
    """A search over the powers of two, with one thing at a time gone wrong."""

    def smallest_group(columns, bits, scale_bits, zero_point_bits, budget):
        left = budget - bits - 1e-9 * strict
        sizes = [2**k for k in range(columns.bit_length()) if columns % 2**k == 0 or not divides]
        return pick((g for g in sizes if (scale_bits + zero * zero_point_bits) / per / g <= left), default=None)

    return smallest_group


def _reference_group(columns, bits, scale_bits, zero_point_bits, budget):
    """By the library's own count of bits, zero points as wide as the codes."""
    kind = {16: torch.float16, 32: torch.float32}[scale_bits]
    fields = {"bits": bits, "symmetric": zero_point_bits == 0, "granularity": "group", "scale_dtype": kind}
    for size in (2**power for power in range(columns.bit_length()) if columns % 2**power == 0):
        if packing.bits_per_weight((8, columns), affine.Scheme(group_size=size, **fields)) <= budget:
            return size
    return None


@exercise("2.4")
def smallest_group(answer):
    """The finest groups that a budget of bits allows."""
    cases = [(256, 4, 16, 0, 4.25), (768, 3, 16, 3, 3.6), (96, 4, 16, 4, 4.5), (128, 8, 32, 8, 8.5)]
    expect_function(
        answer,
        _reference_group,
        cases=cases_of("columns bits scale_bits zero_point_bits budget", *cases),
        mistakes=[
            (_smallest(zero=0), "the zero points are missing: an affine scheme stores one a group"),
            (_smallest(per=8), "that counts the overhead in bytes: everything is in bits"),
            (_smallest(strict=True), "what takes exactly the budget is within it: use <="),
            (_smallest(pick=max), "that is the largest size that fits: the smallest has the most scales"),
            (_smallest(divides=False), "groups of that size do not fill a row: the size must divide columns"),
            (_smallest(per=1e9), "nothing was compared with the budget"),
        ],
    )


def _best_share(x, bits, shares, *, choose=min, error=lambda e: e.square().sum(), scale_only=False):
    qmax = 2 ** (bits - 1) - 1
    peak = x.abs().max()

    def loss(share):
        scale = share * peak / qmax
        codes = torch.round(x / scale)
        return error((codes if scale_only else codes.clamp(-qmax, qmax)) * scale - x).item()

    return choose(shares, key=loss)


def _reference_share(x, bits, shares):
    """The library's own search over the same shares (evenly spaced from 1 down)."""
    scheme = affine.Scheme(bits=bits, granularity="tensor")
    high = clipping.mse_range(x, scheme, smallest=shares[-1], steps=len(shares) - 1)[1]
    return min(shares, key=lambda share: abs(share * x.max().item() - high.item()))


@exercise("2.5")
def best_share(answer):
    """The share of max |x| with the smallest squared error."""
    shares = [1 - i / 20 for i in range(17)]
    given = [
        {"x": _numbers(4000, seed=seed) ** power, "bits": bits}
        for seed, power, bits in ((0, 1, 3), (1, 3, 4), (2, 3, 2))
    ]

    def wrong(**settings):
        return lambda x, bits, shares: _best_share(x, bits, shares, **settings)

    expect_function(
        answer,
        _reference_share,
        cases=[case | {"shares": shares} for case in given],
        mistakes=[
            (wrong(scale_only=True), "without clamping nothing is ever cut, and the smallest step always wins"),
            (wrong(choose=max), "that is the worst share: take the smallest error"),
            (wrong(error=lambda e: e.abs().max()), "the largest error forbids any clipping: sum the squares"),
            (wrong(error=lambda e: e.sum()), "errors of both signs cancel: square them before the sum"),
            (wrong(error=lambda e: e.abs().sum()), "those are absolute errors: square them"),
        ],
    )


def _bits_for(*, divisor=12, factor=10, steps=lambda bits: 2 ** (bits - 1) - 1, power=True, less=0):
    def bits_for(x, target_db):
        signal = x.double().square().mean().item() if power else x.double().abs().mean().item()
        for bits in range(2, 17):
            step = x.abs().max().item() / steps(bits)
            if factor * math.log10(signal / (step * step / divisor)) >= target_db:
                return bits - less
        return None

    return bits_for


@exercise("2.6")
def bits_for(answer):
    """The fewest bits whose predicted SQNR reaches a target."""

    def reference(x, target_db):
        zero, peak = torch.tensor(0, dtype=torch.int32), x.abs().max().double()
        steps = {bits: affine.QParams(peak / (2 ** (bits - 1) - 1), zero, -1, 1) for bits in range(2, 17)}
        return next(bits for bits, q in steps.items() if theory.predicted_sqnr_db(x, q) >= target_db)

    spiky = _numbers(1000, seed=1) ** 3
    expect_function(
        answer,
        reference,
        cases=[{"x": x, "target_db": db} for x in (_numbers(100) / 10, spiky) for db in (12.0, 20.0, 33.0, 41.0, 55.0)],
        mistakes=[
            (_bits_for(divisor=1), "that takes the whole step as the error: a uniform error has variance S²/12"),
            (_bits_for(divisor=3), "the error lies within half a step on either side: its variance is S²/12, not S²/3"),
            (_bits_for(factor=20), "10 log10 for powers; 20 log10 is for amplitudes"),
            (_bits_for(power=False), "the signal's power is the mean of its squares"),
            (_bits_for(steps=lambda bits: 2**bits - 1), "half the codes are negative: max |x| gets 2^(b−1) − 1 steps"),
            (_bits_for(less=1), "those bits just miss the target: return the first that reach it"),
        ],
    )
