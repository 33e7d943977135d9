"""Checks of chapter 12, second part: search in cells, and chrF."""

import statistics
from collections import Counter

import torch

from labutils.applications import scores
from labutils.course.checks import cases_of, exercise, expect_function


def _search(query, centres, cells, vectors, count, near):
    candidates = [i for c in (centres @ query).topk(near).indices.tolist() for i in cells[c]]
    products = (vectors[candidates] @ query).tolist()
    best = sorted(range(len(candidates)), key=lambda i: -products[i])[:count]
    return [candidates[i] for i in best]


def _positions(query, centres, cells, vectors, count, near):
    candidates = [i for c in (centres @ query).topk(near).indices.tolist() for i in cells[c]]
    products = (vectors[candidates] @ query).tolist()
    return sorted(range(len(candidates)), key=lambda i: -products[i])[:count]


def _unsorted(query, centres, cells, vectors, count, near):
    return [i for c in (centres @ query).topk(near).indices.tolist() for i in cells[c]][:count]


@exercise("12.5")
def search_cells(answer):
    """The best vectors of the nearest cells."""
    generator = torch.Generator().manual_seed(12)
    vectors = torch.nn.functional.normalize(torch.randn(24, 4, generator=generator), dim=1)
    centres = vectors[[3, 9, 14, 20]].clone()
    home = (vectors @ centres.T).argmax(dim=1)
    cells = [(home == c).nonzero().flatten().tolist() for c in range(4)]
    queries = torch.nn.functional.normalize(torch.randn(4, 4, generator=generator), dim=1)
    rows = [(queries[i], centres, cells, vectors, 3, near) for i, near in ((0, 1), (1, 2), (2, 3), (3, 2))]
    expect_function(
        answer,
        _search,
        cases=cases_of("query centres cells vectors count near", *rows),
        mistakes=[
            (
                lambda query, centres, cells, vectors, count, near: (vectors @ query).topk(count).indices.tolist(),
                "that reads every vector: only those in the nearest cells are to be looked at",
            ),
            (
                lambda query, centres, cells, vectors, count, near: _search(query, centres, cells, vectors, count, 1),
                "look into `near` cells, not only the nearest one: a neighbour may lie across a border",
            ),
            (_positions, "positions among the candidates are not indices of vectors: translate them back"),
            (
                lambda query, centres, cells, vectors, count, near: _search(
                    query, -centres, cells, vectors, count, near
                ),
                "a LARGE inner product means near: take the cells with the largest ones",
            ),
            (_unsorted, "within the cells the vectors are compared too, and the best comes first"),
        ],
    )


def _chrf(hypothesis, reference, longest=6):
    return scores.chrf([hypothesis], [reference], longest=longest)


def _chrf_wrong(*, beta=2.0, spaces=False, clip=True, swap=False, late=False):
    def answer(hypothesis, reference, longest=6):
        texts = [t if spaces else "".join(t.split()) for t in (hypothesis, reference)]
        pairs = []
        for n in range(1, longest + 1):
            h, r = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in texts)
            if h and r:
                match = (h & r).total() if clip else sum(c for gram, c in h.items() if gram in r)
                pairs.append((match / h.total(), match / r.total()))
        if swap:
            pairs = [(r, p) for p, r in pairs]
        if not any(p for p, _ in pairs):
            return 0.0
        if late:
            return statistics.fmean(_f(p, r, beta) for p, r in pairs)
        return _f(statistics.fmean(p for p, _ in pairs), statistics.fmean(r for _, r in pairs), beta)

    return answer


def _f(p, r, beta):
    return (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


@exercise("12.6")
def chrf(answer):
    """Character n-gram F-score of one pair of texts."""
    expect_function(
        answer,
        _chrf,
        cases=cases_of(
            "hypothesis reference longest",
            ("ab", "abcd", 1),
            ("the order is here", "the orders are here now", 6),
            ("aaaa", "aab", 2),
            ("订单已取消", "订单A12345已经取消。", 4),
            ("a b c d", "abcd", 3),
            ("xyz", "abc", 6),
        ),
        mistakes=[
            (_chrf_wrong(beta=1.0), "beta is 2: recall counts more than precision"),
            (_chrf_wrong(beta=2**0.5), "beta is squared in the formula: 5 P R / (4 P + R)"),
            (_chrf_wrong(spaces=True), "white space does not count: take it out first"),
            (_chrf_wrong(clip=False), "an n-gram matches at most as often as the other text has it: (h & r)"),
            (_chrf_wrong(swap=True), "precision divides by the HYPOTHESIS's n-grams, recall by the reference's"),
            (_chrf_wrong(late=True), "average P and R over n first; then combine the two, once"),
        ],
    )
