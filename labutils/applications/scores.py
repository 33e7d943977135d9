"""Scores of tasks, and whether a faster model keeps them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

Z_95 = 1.959964  # 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Difference:
    """Mean difference of paired scores and its 95% interval."""

    mean: float
    low: float
    high: float
    items: int

    def verdict(self, margin: float) -> str:
        """What can be said of a loss of `margin`: "keeps" it out, "loses" that much, or "unsure".

        >>> Difference(-0.01, -0.03, 0.01, 100).verdict(0.05), Difference(-0.01, -0.03, 0.01, 100).verdict(0.02)
        ('keeps', 'unsure')
        """
        if self.low >= -margin:
            return "keeps"
        return "loses" if self.high < -margin else "unsure"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_difference(changed: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of changed − baseline, item by item, with mean ± max(1.96 s / √n, 3 / n).

    The floor is the rule of three (Hanley and Lippman-Hand 1983, JAMA 249:1743): where none of n items changed, up to
    3/n of all may still change. Without it n equal scores would give an interval of no width.

    Raises:
        ValueError: If the items differ in number, or there are fewer than five.

    >>> str(paired_difference([1.0] * 60, [1.0] * 60))
    '+0.000 [-0.050, +0.050]'
    """
    if len(changed) != len(baseline) or len(changed) < 5:
        raise ValueError(f"paired scores are of the same 5 or more items; got {len(changed)} and {len(baseline)}")
    gaps = [new - old for new, old in zip(changed, baseline, strict=True)]
    mean, n = statistics.fmean(gaps), len(gaps)
    half = max(Z_95 * statistics.stdev(gaps) / math.sqrt(n), 3 / n)
    return Difference(mean, mean - half, mean + half, n)


def f1(right: int, given: int, wanted: int) -> float:
    """2 · right ÷ (given + wanted), the harmonic mean of precision and recall; 1 where nothing was given or wanted.

    >>> f1(2, 4, 4), f1(0, 0, 0)
    (0.5, 1.0)
    """
    return 2 * right / (given + wanted) if given + wanted else 1.0


def macro_f1(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """The mean over classes of each class's F1; a class counts if it is expected or predicted at least once.

    >>> round(macro_f1(["a"] * 4, ["a", "a", "a", "b"]), 3)  # accuracy 0.75
    0.429

    Raises:
        ValueError: If the lengths differ or there is no item.
    """
    if len(predicted) != len(expected) or not expected:
        raise ValueError(f"predictions are of the same 1 or more items; got {len(predicted)} and {len(expected)}")
    right = Counter(p for p, e in zip(predicted, expected, strict=True) if p == e)
    given, wanted = Counter(predicted), Counter(expected)
    return statistics.fmean(f1(right[c], given[c], wanted[c]) for c in given | wanted)


def set_f1(predicted: Sequence[Collection[Hashable]], expected: Sequence[Collection[Hashable]]) -> float:
    """Micro-averaged F1 of sets, one pair a text: counts are summed over all texts before they are divided.

    For spans an element is (start, end, label): a span is right when both ends and the label are.

    >>> set_f1([{(0, 4, "name")}, set()], [{(0, 4, "name")}, {(2, 8, "city")}])
    0.6666666666666666

    Raises:
        ValueError: If the texts differ in number.
    """
    if len(predicted) != len(expected):
        raise ValueError(f"predictions are of the same texts; got {len(predicted)} and {len(expected)}")
    pairs = [(set(p), set(e)) for p, e in zip(predicted, expected, strict=True)]
    right = sum(len(p & e) for p, e in pairs)
    return f1(right, sum(len(p) for p, _ in pairs), sum(len(e) for _, e in pairs))


def _grams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def chrf(hypotheses: Sequence[str], references: Sequence[str], *, longest: int = 6, beta: float = 2.0) -> float:
    r"""Character n-gram F-score of a corpus, 0 … 1 (Popović 2015, W15-3049), as sacrebleu counts it.

    For each n up to `longest`, matches and n-grams of both sides are summed over all texts, white space left out; a
    text whose reference is shorter than n adds nothing. Precision P and recall R are averaged over the n that both
    sides have.

    $$\text{chrF} = (1 + \beta^2)\,\frac{P R}{\beta^2 P + R}$$

    >>> chrf(["abc"], ["abc"]), round(chrf(["ab"], ["abcd"], longest=1), 3)  # P = 1, R = 1/2
    (1.0, 0.556)

    Raises:
        ValueError: If the texts differ in number.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"every hypothesis needs a reference; got {len(hypotheses)} and {len(references)}")
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        pairs = [(_grams(h, n), _grams(r, n)) for h, r in zip(hypotheses, references, strict=True)]
        match = sum((h & r).total() for h, r in pairs)
        given, wanted = sum(h.total() for h, r in pairs if r), sum(r.total() for _, r in pairs)
        if given and wanted:
            precisions.append(match / given)
            recalls.append(match / wanted)
    if not precisions:
        return 0.0
    p, r = statistics.fmean(precisions), statistics.fmean(recalls)
    return (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0
