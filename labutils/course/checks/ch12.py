"""Checks of chapter 12, first part: what a difference proves, scores of classes and spans, choices."""

import math
import statistics

from labutils.applications import scores
from labutils.course.checks import cases_of, exercise, expect_function


def _keeps(changed, baseline, margin):
    return scores.paired_difference(changed, baseline).verdict(margin)


def _verdict(mean, half, margin):
    if mean - half >= -margin:
        return "keeps"
    return "loses" if mean + half < -margin else "unsure"


def _keeps_wrong(*, paired=True, root=True, floor=True, sign=1.0):
    def answer(changed, baseline, margin):
        n = len(changed)
        gaps = [sign * (new - old) for new, old in zip(changed, baseline, strict=True)]
        spread = statistics.stdev(gaps)
        if not paired:
            spread = math.hypot(statistics.stdev(changed), statistics.stdev(baseline))
        half = 1.96 * spread / (n**0.5 if root else 1)
        return _verdict(statistics.fmean(gaps), max(half, 3 / n) if floor else half, margin)

    return answer


def _by_mean(changed, baseline, margin):
    return "keeps" if statistics.fmean(changed) - statistics.fmean(baseline) >= -margin else "loses"


def _is_zero_inside(changed, baseline, margin):
    gap = scores.paired_difference(changed, baseline)
    return "keeps" if gap.low <= 0 <= gap.high else "loses"


@exercise("12.1")
def keeps_metric(answer):
    """Whether a changed model keeps a metric, from paired scores."""
    ones, half = [1.0] * 60, [1.0] * 50 + [0.0] * 50
    expect_function(
        answer,
        _keeps,
        cases=cases_of(
            "changed baseline margin",
            (ones, ones, 0.04),
            (ones, ones, 0.06),
            ([0.0] * 2 + half[2:], half, 0.06),
            ([0.0] * 30 + [1.0] * 70, [1.0] * 100, 0.1),
            ([0.0] * 12 + [1.0] * 88, [1.0] * 100, 0.1),
            ([1.0] * 100, [0.0] * 30 + [1.0] * 70, 0.1),
            ([0.0] * 8 + [1.0] * 92, [1.0] * 100, 0.2),
        ),
        mistakes=[
            (_keeps_wrong(floor=False), "equal scores give an interval of no width: it is at least 3/n to each side"),
            (_by_mean, "a mean alone proves nothing: ask on which side of -margin the whole interval lies"),
            (_is_zero_inside, "zero inside the interval is no proof of equality: compare the interval with -margin"),
            (_keeps_wrong(paired=False), "the requests are the same: take the deviation of the differences"),
            (_keeps_wrong(root=False), "the deviation of a MEAN of n differences is s divided by the root of n"),
            (_keeps_wrong(sign=-1.0), "a loss is negative: take changed minus baseline"),
        ],
    )


def _class_scores(predicted, expected):
    for c in sorted(set(predicted) | set(expected)):
        right = sum(p == e == c for p, e in zip(predicted, expected, strict=True))
        yield right, predicted.count(c), expected.count(c)


def _accuracy(predicted, expected):
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def _only_expected(predicted, expected):
    rows = [row for row in _class_scores(predicted, expected) if row[2]]
    return statistics.fmean(scores.f1(*row) for row in rows)


def _macro_recall(predicted, expected):
    return statistics.fmean(
        right / wanted if wanted else 0.0 for right, _, wanted in _class_scores(predicted, expected)
    )


def _weighted(predicted, expected):
    rows = list(_class_scores(predicted, expected))
    return sum(scores.f1(*row) * row[2] for row in rows) / len(expected)


def _f1_of_means(predicted, expected):
    rows = list(_class_scores(predicted, expected))
    p = statistics.fmean(right / given if given else 0.0 for right, given, _ in rows)
    r = _macro_recall(predicted, expected)
    return 2 * p * r / (p + r) if p + r else 0.0


@exercise("12.2")
def macro_f1(answer):
    """The mean over classes of F1."""
    expect_function(
        answer,
        scores.macro_f1,
        cases=cases_of(
            "predicted expected",
            (["a", "a", "a", "a"], ["a", "a", "a", "b"]),
            (["a", "c", "b", "a", "a"], ["a", "a", "b", "b", "a"]),
            (["x", "y", "y"], ["x", "y", "y"]),
            (["n", "n", "p", "n", "p", "n", "n"], ["n", "n", "n", "n", "p", "p", "n"]),
        ),
        mistakes=[
            (_accuracy, "that is accuracy (or micro-F1), in which the large class decides: average over classes"),
            (_only_expected, "a class that is only predicted has F1 = 0 and counts too"),
            (_weighted, "a mean weighted by class size hears the large class again: each class counts alike"),
            (_macro_recall, "that is recall: predictions of a class that are wrong cost as well"),
            (_f1_of_means, "take F1 class by class, then the mean: not the F1 of mean precision and mean recall"),
        ],
    )


def _span_wrong(*, key=lambda s: s, per_text=False, empty=1.0, pool=False):
    def answer(predicted, expected):
        pairs = [({key(s) for s in p}, {key(s) for s in e}) for p, e in zip(predicted, expected, strict=True)]
        if pool:
            pairs = [(set().union(*(p for p, _ in pairs)), set().union(*(e for _, e in pairs)))]
        if per_text:
            return statistics.fmean(scores.f1(len(p & e), len(p), len(e)) for p, e in pairs)
        right, total = sum(len(p & e) for p, e in pairs), sum(len(p) + len(e) for p, e in pairs)
        return 2 * right / total if total else empty

    return answer


def _overlapping(predicted, expected):
    def touches(s, others):
        return any(max(s[0], o[0]) < min(s[1], o[1]) and s[2] == o[2] for o in others)

    right = sum(touches(s, e) for p, e in zip(predicted, expected, strict=True) for s in p)
    total = sum(map(len, predicted)) + sum(map(len, expected))
    return 2 * right / total if total else 1.0


@exercise("12.3")
def span_f1(answer):
    """Micro-averaged F1 of exact spans."""
    first, second = {(0, 4, "name"), (9, 15, "city")}, {(2, 8, "order"), (9, 15, "city")}
    expect_function(
        answer,
        scores.set_f1,
        cases=cases_of(
            "predicted expected",
            ([{(0, 4, "name")}, second], [first, second]),
            ([{(0, 5, "name"), (9, 15, "city")}, set()], [first, {(3, 5, "count")}]),
            ([{(0, 4, "city"), (9, 15, "name")}, {(2, 8, "order")}], [first, second]),
            ([{(2, 8, "order")}, {(0, 4, "name")}], [{(0, 4, "name")}, {(2, 8, "order")}]),
            ([set(), set()], [set(), set()]),
        ),
        mistakes=[
            (_span_wrong(key=lambda s: s[:2]), "the label counts too: a city in a name's place is wrong"),
            (_overlapping, "a span that only overlaps is wrong: start and end must be exact"),
            (_span_wrong(per_text=True), "sum up over all texts first: the mean of texts is another number"),
            (_span_wrong(pool=True), "spans of one text must not be matched with another's: intersect text by text"),
            (_span_wrong(empty=0.0), "nothing wanted and nothing given is right: 1.0"),
        ],
    )


def _choice_probs(token_log_probs):
    return _softmax([sum(row) for row in token_log_probs])


def _softmax(values):
    parts = [math.exp(value - max(values)) for value in values]
    return [part / sum(parts) for part in parts]


def _softmax_unsafe(token_log_probs):
    parts = [math.exp(sum(row)) for row in token_log_probs]
    return [part / sum(parts) for part in parts]


@exercise("12.4")
def choice_probs(answer):
    """The probability of each choice, from the ln p of its tokens."""
    ln = math.log
    expect_function(
        answer,
        _choice_probs,
        cases=cases_of(
            "token_log_probs",
            ([[ln(0.5)], [ln(0.5), ln(0.5)]],),
            ([[ln(0.2), ln(0.9), ln(0.9)], [ln(0.3), ln(0.1)], [ln(0.4)]],),
            ([[-400.0, -400.0], [-801.0], [-900.0, 0.0]],),
        ),
        mistakes=[
            (
                lambda token_log_probs: _softmax([sum(row) / len(row) for row in token_log_probs]),
                "a mean over tokens is no probability: it favours long choices, so add the logarithms",
            ),
            (
                lambda token_log_probs: [math.exp(sum(row)) for row in token_log_probs],
                "together the choices must have probability 1: divide by their sum",
            ),
            (
                lambda token_log_probs: _softmax([row[0] for row in token_log_probs]),
                "the first token is not the choice: all tokens count",
            ),
            (
                lambda token_log_probs: _softmax([ln(sum(map(math.exp, row)) + 1e-300) for row in token_log_probs]),
                "probabilities of successive tokens are multiplied, not added",
            ),
            (_softmax_unsafe, "sums of -800 become 0 under exp: subtract the largest sum first"),
        ],
    )
