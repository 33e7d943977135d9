"""What a language model has to beat: general-purpose compression and a bigram model, in bits per byte."""

import lzma
from collections import Counter
from math import log2

from labutils.lab.data.corpus import Document


def xz_bits_per_byte(documents: list[Document]) -> float:
    """Size after `xz -9e` of each document's text, all in one stream, in bits per UTF-8 byte.

    >>> xz_bits_per_byte([Document("zeros.txt", "0" * 10_000)]) < 0.2
    True
    """
    text = _joined(documents)
    return 8 * _xz_bytes(text) / len(text)


def primed_xz_bits_per_byte(documents: list[Document], training: list[Document]) -> float:
    """What the documents add to an xz stream that has read the training text first, in bits per UTF-8 byte.

    The dictionary is as large as both together, so that xz may copy from all it has read.
    """
    prime, text = _joined(training), _joined(documents)
    return 8 * (_xz_bytes(prime + text) - _xz_bytes(prime)) / len(text)


def bigram_bits_per_byte(documents: list[Document], training: list[Document]) -> float:
    """A byte-bigram model p(b | a) = (n(ab) + ½) / (n(a) + 128), counted on the training text (Krichevsky-Trofimov)."""
    prime, text = _joined(training), _joined(documents)
    pairs = Counter(zip(prime, prime[1:], strict=False))
    firsts = Counter(prime[:-1])
    wanted = Counter(zip(text, text[1:], strict=False))
    bits = sum(n * log2((firsts[a] + 128) / (pairs[a, b] + 0.5)) for (a, b), n in wanted.items())
    return (bits + 8) / len(text)  # the first byte costs 8 bits


def _joined(documents: list[Document]) -> bytes:
    joined = "".join(document.text for document in documents).encode()
    if not joined:
        raise ValueError("documents must hold text; got none")
    return joined


def _xz_bytes(data: bytes) -> int:
    size = max(4096, min(len(data), 1 << 30))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))
