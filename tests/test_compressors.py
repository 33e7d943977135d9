"""Compression baselines, against numbers worked by hand and the xz container."""

import lzma
from math import log2

import pytest

from labutils.lab.data import compressors
from labutils.lab.data.corpus import Document

CODE = Document("code.py", "".join(f"def f{i}(x):\n    return x * {i * 7919 % 1000}\n" for i in range(400)))


def test_xz_is_close_to_the_xz_file_format():
    container = 8 * len(lzma.compress(CODE.text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(CODE.text)
    assert compressors.xz_bits_per_byte([CODE]) == pytest.approx(container, rel=0.05)


def test_priming_with_the_same_text_makes_it_almost_free():
    assert compressors.primed_xz_bits_per_byte([CODE], [CODE]) < 0.05 * compressors.xz_bits_per_byte([CODE])


def test_bigram_by_hand():
    # Training "abab": n(ab) = 2, n(ba) = 1, n(a) = 2, n(b) = 1. Text "ab": 8 bits, then p(b|a) = 2.5 / 130.
    got = compressors.bigram_bits_per_byte([Document("t", "ab")], [Document("p", "abab")])
    assert got == pytest.approx((8 + log2(130 / 2.5)) / 2)


def test_bigram_learns_from_training():
    unrelated = compressors.bigram_bits_per_byte([CODE], [Document("p", "zzzz")])
    assert compressors.bigram_bits_per_byte([CODE], [CODE]) < unrelated


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="documents must hold text; got none"):
        compressors.xz_bits_per_byte([])
