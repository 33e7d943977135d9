"""Quality of a changed model beside its baseline, on the same tokens: the difference with its own interval.

Two models' intervals overlap although one is worse on every document; the paired difference tells them apart.
"""

import math
from dataclasses import dataclass

from labutils.lab.data import service
from labutils.lab.data.corpus import Document, stdlib_documents
from labutils.lab.models.evaluate_text import document_bits
from labutils.lab.models.mixture import chat_text
from labutils.measurement.timing import bootstrap_interval

DocumentBits = list[tuple[float, int]]  # bits and bytes of each document


@dataclass(frozen=True)
class PairedQuality:
    """Bits per byte of a model and its baseline; `interval` is the 95% interval of the difference."""

    bits_per_byte: float
    baseline_bits_per_byte: float
    interval: tuple[float, float]
    documents: int

    @property
    def difference(self) -> float:
        """How many bits per byte the change costs (negative: it gains)."""
        return self.bits_per_byte - self.baseline_bits_per_byte

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.bits_per_byte:.4f} bits per byte, {self.difference:+.4f} [{low:+.4f}, {high:+.4f}] against the "
            f"baseline ({self.documents} documents)"
        )


def held_out_documents(*, limit_bytes: int, split: str = "test") -> list[Document]:
    """The beginnings of the held-out modules: one fixed, small set for comparisons within a chapter.

    Raises:
        ValueError: when nothing would be left.
    """
    if limit_bytes < 1:
        raise ValueError(f"limit_bytes must be at least 1; got {limit_bytes}")
    return [Document(d.name, d.text.encode()[:limit_bytes].decode(errors="ignore")) for d in stdlib_documents(split)]


def held_out_dialogues(*, bundles: int = 17, each: int = 3) -> list[Document]:
    """Held-out service dialogues, English and Chinese, in their chat format: `each` dialogues to a document.

    Raises:
        ValueError: when nothing would be left.
    """
    if bundles < 1 or each < 1:
        raise ValueError(f"bundles and each must be at least 1; got {bundles} and {each}")
    drawn = (service.dialogues(seed=seed, split="test", count=each) for seed in range(bundles))
    texts = ["".join(chat_text(d.messages) for d in some) for some in drawn]
    return [Document(f"dialogues {i}", text, is_chat=True) for i, text in enumerate(texts)]


def bits_by_document(model, tokenizer, documents: list[Document], *, context: int = 512) -> DocumentBits:
    """Bits and bytes of every document: keep the baseline's, and compare every variant with it.

    Raises:
        ValueError: when the model predicts NaN.
    """
    measured = [document_bits(model, tokenizer, document, context=context) for document in documents]
    broken = [d.name for d, (bits, _) in zip(documents, measured, strict=True) if math.isnan(bits)]
    if broken:
        raise ValueError(f"a model must predict numbers; got nan on {', '.join(broken)}")
    return measured


def paired_quality(changed: DocumentBits, baseline: DocumentBits, *, resamples: int = 1000) -> PairedQuality:
    """The two bits per byte, and the difference's percentile bootstrap interval over documents.

    Raises:
        ValueError: when the two were not measured on the same documents, or on fewer than five.

    >>> quality = paired_quality([(6.0, 4)] * 5, [(4.0, 4)] * 5)
    >>> quality.bits_per_byte, quality.difference, quality.interval
    (1.5, 0.5, (0.5, 0.5))
    """
    sizes = [[size for _, size in measured] for measured in (changed, baseline)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a pair is measured on the same documents; got sizes {sizes[0]} and {sizes[1]}")
    pairs = [(bits, base, size) for (bits, size), (base, _) in zip(changed, baseline, strict=True)]

    def difference(sample) -> float:
        return sum(bits - base for bits, base, _ in sample) / sum(size for *_, size in sample)

    total = sum(sizes[0])
    low, high = bootstrap_interval(pairs, statistic=difference, resamples=resamples)
    return PairedQuality(
        bits_per_byte=sum(bits for bits, _ in changed) / total,
        baseline_bits_per_byte=sum(bits for bits, _ in baseline) / total,
        interval=(low, high),
        documents=len(pairs),
    )
