"""Scores by hand, against sacrebleu and scikit-learn's definitions, and verdicts that may be "unsure"."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.applications.scores import Difference, chrf, f1, macro_f1, paired_difference, set_f1

CHRF = pytest.importorskip("sacrebleu.metrics").CHRF


def test_paired_difference_by_hand():
    gap = paired_difference([0.0] * 4 + [1.0] * 96, [1.0] * 100)
    deviation = statistics.stdev([-1.0] * 4 + [0.0] * 96)
    assert gap.mean == pytest.approx(-0.04)
    assert gap.high - gap.mean == pytest.approx(1.959964 * deviation / 10) == pytest.approx(gap.mean - gap.low)
    assert (round(gap.low, 3), round(gap.high, 3)) == (-0.079, -0.001)


def test_no_difference_has_the_width_of_the_rule_of_three():
    gap = paired_difference([0.5] * 40, [0.5] * 40)
    assert (gap.mean, gap.low, gap.high) == (0.0, -0.075, 0.075)
    assert gap.verdict(0.1) == "keeps" and gap.verdict(0.05) == "unsure"


def test_the_interval_covers_the_truth_in_most_samples():
    rng, covered = random.Random(0), 0
    for _ in range(300):
        base = [float(rng.random() < 0.9) for _ in range(80)]
        new = [b if rng.random() < 0.8 else float(rng.random() < 0.7) for b in base]  # E = 0.2 · (0.7 − 0.9)
        gap = paired_difference(new, base)
        covered += gap.low <= -0.04 <= gap.high
    assert 0.88 * 300 <= covered < 300  # near 95%: changes are rare, so the sample deviation varies


def test_verdicts_at_their_borders():
    assert Difference(-0.3, -0.4, -0.2, 50).verdict(0.1) == "loses"
    assert Difference(-0.3, -0.4, -0.2, 50).verdict(0.4) == "keeps"
    assert Difference(-0.3, -0.4, -0.1, 50).verdict(0.1) == "unsure"


@pytest.mark.parametrize(("changed", "baseline"), [([1.0] * 4, [1.0] * 4), ([1.0] * 6, [1.0] * 5)])
def test_too_few_or_unpaired_scores_are_refused(changed, baseline):
    with pytest.raises(ValueError, match="the same 5 or more items; got"):
        paired_difference(changed, baseline)


def test_macro_f1_by_hand():
    assert f1(1, 2, 4) == pytest.approx(1 / 3)
    assert macro_f1(["a", "b", "b", "c"], ["a", "b", "a", "a"]) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    with pytest.raises(ValueError, match="1 or more items; got 0 and 0"):
        macro_f1([], [])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=20))
def test_macro_f1_lies_between_0_and_1_and_needs_all_right_for_1(pairs):
    predicted, expected = zip(*pairs, strict=True)
    value = macro_f1(predicted, expected)
    assert 0 <= value <= 1 and (value == 1) == (predicted == expected)


def test_set_f1_counts_before_it_divides():
    predicted = [{(0, 4, "name"), (5, 9, "city")}, set(), {(0, 1, "x")}]
    expected = [{(0, 4, "name")}, {(2, 3, "x")}, {(0, 1, "x")}]
    assert set_f1(predicted, expected) == pytest.approx(2 * 2 / (3 + 3))
    assert set_f1([{(0, 4, "city")}], [{(0, 4, "name")}]) == 0.0
    with pytest.raises(ValueError, match="the same texts; got 1 and 2"):
        set_f1([set()], [set(), set()])


TEXTS = [
    ("the order is here", "the orders are here now"),
    ("订单已取消。", "订单A12345已经取消。"),
    ("aaaa", "aab"),
    ("", "something"),
    ("a", "a"),
    ("same text", "same text"),
    ("x y", "completely different words"),
]


@pytest.mark.parametrize("longest", [1, 3, 6])
@pytest.mark.parametrize("pair", [*range(len(TEXTS)), None])
def test_chrf_is_sacrebleus(pair, longest):
    some = TEXTS if pair is None else [TEXTS[pair]]
    hypotheses, references = map(list, zip(*some, strict=True))
    reference = CHRF(char_order=longest).corpus_score(hypotheses, [references]).score / 100
    assert chrf(hypotheses, references, longest=longest) == pytest.approx(reference, abs=1e-9)


def test_chrf_by_hand_and_bad_input():
    assert chrf(["ab"], ["abcd"], longest=1) == pytest.approx(5 * 0.5 / (4 + 0.5))
    with pytest.raises(ValueError, match="a reference; got 1 and 0"):
        chrf(["a"], [])
