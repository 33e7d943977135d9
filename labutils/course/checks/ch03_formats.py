"""Checks of chapter 03's exercises on other libraries' formats: a GGUF block, two roundings, packed zero points."""

from functools import partial

import numpy as np
import torch

from labutils.course.checks import exercise, expect_function
from labutils.lab.models.compressed_tensors import from_words, to_words
from labutils.lab.models.gguf_blocks import encode_q4_0
from labutils.lab.models.gguf_read import decode_q4_0 as decode_blocks


def _decoded(block, *, sign=1, middle=8, swap=False, neighbours=False, wraps=False):
    """A Q4_0 block with one thing at a time gone wrong."""
    scale = block[:2].view(np.float16).astype(np.float32)
    low, high = block[2:] & 15, block[2:] >> 4
    pair = (high, low) if swap else (low, high)
    codes = np.stack(pair, axis=1).reshape(-1) if neighbours else np.concatenate(pair)
    steps = (codes - np.uint8(8)).astype(np.float32) if wraps else codes.astype(np.float32) - middle
    return (np.abs(scale) if sign < 0 else scale) * steps


@exercise("3.11")
def decode_q4_0(answer):
    """One GGUF block of 32 weights, whose scale may be negative."""
    make = np.random.default_rng(0)
    rows = [np.linspace(-2, 7, 32), np.linspace(-7, 2, 32), make.normal(size=32)]
    blocks = [encode_q4_0(row[None].astype(np.float32))[0] for row in rows]
    wrong = {
        "the scale's sign belongs to it: where the largest weight is positive, the scale is negative": {"sign": -1},
        "codes count from 0 to 15 and stand for −8 to 7: subtract 8": {"middle": 0},
        "the middle is 8, not 7.5: −8 has no opposite in this format": {"middle": 7.5},
        "the halves are swapped: the first 16 weights lie in the low halves": {"swap": True},
        "a byte holds weights j and j + 16, not two neighbours": {"neighbours": True},
        "uint8 has no negative numbers, so 3 − 8 became 251: make floats before you subtract": {"wraps": True},
    }
    expect_function(
        answer,
        lambda block: decode_blocks(block[None])[0],
        cases=[{"block": block} for block in blocks],
        rtol=1e-5,
        atol=1e-5,
        mistakes=[(partial(_decoded, **change), hint) for hint, change in wrong.items()],
    )


def _away(ratio):
    return np.trunc(ratio + np.copysign(0.5, ratio))


ANOTHER_SCALE = "with another divisor other numbers are ties: the scale is max|w| / 127"


def _differing(row, *, one=_away, other=np.rint, levels=127, finish=np.flatnonzero):
    ratio = row / (np.abs(row).max() / levels)
    return finish(one(ratio) != other(ratio))


@exercise("3.12")
def differing_codes(answer):
    """Where ties away from zero and ties to even give different codes."""
    cases = [
        np.array([127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -2.5, 0.3]),
        np.array([0.25, -63.5, 0.75, -0.25, 1.25, 10.0, -1.25]),
        np.array([1.0, -31.75, 0.125, 0.625, -0.375, -0.625]),
    ]
    expect_function(
        answer,
        _differing,
        cases=[{"row": row.astype(np.float32)} for row in cases],
        mistakes=[
            (partial(_differing, one=lambda r: np.floor(r + 0.5)), "that rounds halves up: away from zero, −0.5 is −1"),
            (partial(_differing, one=np.trunc), "that cuts the fraction off: add a half of the same sign first"),
            (
                partial(_differing, one=lambda r: r % 1 == 0.5, other=lambda r: False),
                "1.5 is a tie as well, and both ways give 2: compare the codes, not the fractions",
            ),
            *((partial(_differing, levels=levels), ANOTHER_SCALE) for levels in (127.5, 128)),
            (partial(_differing, finish=lambda m: m), "those are booleans: return the places, with np.flatnonzero"),
            (partial(_differing, finish=lambda m: int(m.sum())), "that is how many: return which, with np.flatnonzero"),
        ],
    )


def _unpacked(packed, outputs, *, offset=8, shifts=tuple(range(0, 32, 4)), cut=True, across=False):
    """Zero points out of words, with one thing at a time gone wrong."""
    places = np.array(shifts)
    if across:
        codes = (packed[:, :, None] >> places & 15).reshape(len(packed), -1)
    else:
        codes = (packed[:, None, :] >> places[:, None] & 15).reshape(-1, packed.shape[1])
    return (codes[:outputs] if cut else codes) - offset


@exercise("3.13")
def unpack_zero_points(answer):
    """compressed-tensors' 4-bit zero points, packed down the outputs."""
    make = np.random.default_rng(0)
    zeros = [torch.from_numpy(make.integers(-8, 8, size)) for size in ((8, 2), (12, 3), (20, 5))]
    expect_function(
        answer,
        lambda packed, outputs: from_words(torch.from_numpy(packed).T, 4, outputs).T.numpy(),
        cases=[{"packed": to_words(z.T, 4).T.contiguous().numpy(), "outputs": len(z)} for z in zeros],
        mistakes=[
            (
                partial(_unpacked, across=True, cut=False),
                "you unpacked along the groups: a word holds the zero points of eight outputs, one above the other",
            ),
            (partial(_unpacked, offset=0), "the codes count from 0: subtract 8"),
            (partial(_unpacked, shifts=tuple(range(28, -1, -4))), "the first output lies in the lowest four bits"),
            (partial(_unpacked, cut=False), "the last word is filled up with padding: keep the first `outputs` rows"),
            (lambda packed, outputs: _unpacked(packed, outputs).T, "turned: the shape is (outputs, groups)"),
        ],
    )
