"""Checks of chapter 03's exercises on speed: half bytes, a saturating instruction, a product by blocks."""

import numpy as np
import torch

from labutils.course.checks import exercise, expect_function
from labutils.quantization.affine import QParams
from labutils.quantization.packed import PackedLinear, PackedWeight, pack_codes
from labutils.quantization.packed_ops import quantize_tokens


def _kernels_halves(codes):
    """What the kernels read of one row: `pack_codes` lays out eight alike, of which the first is taken."""
    packed = pack_codes(torch.from_numpy(codes).expand(8, -1), bits=4)
    return packed.view(-1, 8, 4)[:, 0].flatten().numpy()


def _halves(codes, *, shape=(-1, 2, 16), axis=1, shift=4, swap=False):
    """Halves taken along an axis of a shape, with one thing at a time gone wrong."""
    first, second = np.moveaxis(codes.reshape(shape), axis, 0)
    low, high = (second, first) if swap else (first, second)
    return (low | high << shift).astype(np.uint8).reshape(-1)


@exercise("3.8")
def pack_halves(answer):
    """Two 4-bit codes a byte, as kernels.c wants them."""
    make = np.random.default_rng(0)
    cases = [{"codes": np.arange(32, dtype=np.uint8) % 16}]
    cases += [{"codes": make.integers(0, 16, 32 * chunks, dtype=np.uint8)} for chunks in (1, 3)]
    expect_function(
        answer,
        _kernels_halves,
        cases=cases,
        dtype=True,
        mistakes=[
            (lambda codes: _halves(codes, shape=(-1, 2)), "you paired neighbours: pair code k with code k + 16"),
            (lambda codes: _halves(codes, swap=True), "the halves are swapped: the first 16 codes go low"),
            (lambda codes: _halves(codes, shift=0), "the second code lies over the first: shift it up by 4 bits"),
            (lambda codes: _halves(codes, shape=(2, -1), axis=0), "you halved the whole row: halve every 32 codes"),
            (lambda codes: _halves(codes, shift=8), "shifted by 8, the second code falls out of the byte: shift by 4"),
            (lambda codes: _halves(codes).astype(np.int64), "a byte is stored in eight bits: return dtype uint8"),
        ],
    )


def _maddubs(unsigned, signed, *, finish=lambda sums: sums.clip(-(2**15), 2**15 - 1), first=np.int32, pairs=(-1, 2)):
    """Pairs of products with one thing at a time gone wrong."""
    products = unsigned.astype(first).astype(np.int32) * signed.astype(np.int32)
    axis = 1 if pairs == (-1, 2) else 0
    return finish(products.reshape(pairs).sum(axis=axis)).astype(np.int16)


@exercise("3.9")
def maddubs(answer):
    """One AVX2 instruction, saturation included."""
    make, byte = np.random.default_rng(0), np.iinfo(np.int8)
    cases = [
        {"unsigned": np.array([1, 2, 3, 4], np.uint8), "signed": np.array([1, -1, 2, 1], np.int8)},
        {"unsigned": make.integers(0, 16, 32, dtype=np.uint8), "signed": make.integers(-127, 128, 32, dtype=np.int8)},
        {"unsigned": np.full(32, 255, np.uint8), "signed": np.repeat([byte.max, byte.min], 16).astype(np.int8)},
        {"unsigned": make.integers(0, 256, 32, dtype=np.uint8), "signed": make.integers(-128, 128, 32, dtype=np.int8)},
    ]
    expect_function(
        answer,
        _maddubs,
        cases=cases,
        dtype=True,
        mistakes=[
            (lambda **a: _maddubs(**a, finish=lambda s: s), "your sums wrap around: this instruction saturates"),
            (lambda **a: _maddubs(**a, finish=lambda s: s.clip(-128, 127)), "the results are int16: saturate there"),
            (lambda **a: _maddubs(**a, first=np.int8), "you read unsigned codes as signed: 255 became -1"),
            (lambda **a: _maddubs(**a, pairs=(2, -1)), "neighbours are added: 0 and 1, 2 and 3, not the two halves"),
            (_products_that_wrap, "the products overflowed 8 bits: widen both before you multiply"),
            (lambda **a: _maddubs(**a).astype(np.int32), "the instruction leaves int16: return that dtype"),
            (_never_narrow, "nothing saturates in int32, but the instruction has 16 bits a sum: clip"),
        ],
    )


def _products_that_wrap(unsigned, signed):
    return (unsigned.astype(np.int8) * signed).reshape(-1, 2).sum(axis=1).astype(np.int16)


def _never_narrow(unsigned, signed):
    return (unsigned.astype(np.int32) * signed).reshape(-1, 2).sum(axis=1)


def _packed_layer(codes, scale, x_codes, x_scales):
    """The product by labutils' own packed layer, whose inputs round to the same codes again."""
    zero_point = torch.zeros(len(codes), 1, dtype=torch.int32)
    qparams = QParams(torch.from_numpy(scale)[:, None], zero_point, -128, 127)
    signed = (torch.from_numpy(codes).int() - 128).to(torch.int8)
    x = torch.from_numpy(x_codes.reshape(len(x_scales), -1) * x_scales[:, None]).reshape(1, -1)
    return PackedLinear(PackedWeight.from_codes(signed, qparams))(x)[0].numpy()


def _blocks(codes, scale, x_codes, x_scales, *, zero=128, wide=np.int64, centred=None, spread=lambda s: s):
    """The sum over blocks with one thing at a time gone wrong."""
    q = (codes.astype(wide) if centred is None else centred(codes)).reshape(len(codes), len(x_scales), -1)
    p = x_codes.astype(wide).reshape(len(x_scales), -1)
    dots = (q * p).sum(axis=2, dtype=wide) - (zero * p.sum(axis=1, dtype=wide) if centred is None else 0)
    return (scale[:, None] * spread(x_scales) * dots).sum(axis=1).astype(np.float32)


@exercise("3.10")
def block_product(answer):
    """The formula at the head of kernels.c."""
    cases, make = [], torch.Generator().manual_seed(0)
    for rows, blocks in ((2, 1), (5, 3)):
        x = torch.randn(1, 64 * blocks, generator=make) * torch.arange(1, blocks + 1).repeat_interleave(64)
        p, steps = quantize_tokens(x, padded=64 * blocks, block=64)
        codes = torch.randint(0, 256, (rows, 64 * blocks), generator=make, dtype=torch.uint8)
        scale = torch.rand(rows, generator=make) + 0.5
        arrays = (codes, scale, p.flatten(), steps.flatten())
        cases.append(dict(zip(("codes", "scale", "x_codes", "x_scales"), (a.numpy() for a in arrays), strict=True)))
    expect_function(
        answer,
        _packed_layer,
        cases=cases,
        rtol=1e-4,
        atol=1e-3,
        mistakes=[
            (lambda **a: _blocks(**a, centred=lambda c: c - np.uint8(128)), "uint8 − 128 wraps around: widen first"),
            (lambda **a: _blocks(**a, zero=0), "the zero point is missing: 128 times the sum of each block's x_codes"),
            (lambda **a: _blocks(**a, zero=-128), "the zero point is subtracted, and you added it"),
            (lambda **a: _blocks(**a, zero=8), "8 is the middle of 4-bit codes; these have 8 bits, and 128"),
            (lambda **a: _blocks(**a, spread=lambda s: s.mean()), "each block has a scale of its own: sum afterwards"),
            (lambda **a: _blocks(**a, spread=lambda s: s[:1]), "you used the first block's scale for all of them"),
            (lambda **a: _blocks(**a, spread=np.ones_like), "the inputs' scales are missing"),
            (lambda **a: _blocks(**(a | {"scale": np.ones_like(a["scale"])})), "the weights' scale is missing"),
            (lambda **a: _blocks(**a, wide=np.int16), "sums of 64 products overflow int16: sum in int32 or wider"),
        ],
    )
