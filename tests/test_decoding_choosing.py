"""How many tokens to draft: the paper's formula on a flat curve, a number by hand, refusal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.decoding.choosing import best_draft_tokens, curve_of, predicted_speedup
from labutils.distillation.acceptance import tokens_per_target_step


@settings(max_examples=60)
@given(st.floats(0, 0.99), st.integers(1, 8), st.floats(0, 2))
def test_predicted_speedup_on_a_flat_curve_is_leviathans(alpha, count, cost):
    expected = tokens_per_target_step(alpha, draft_tokens=count) / (count * cost + 1)
    assert predicted_speedup(alpha, count, [2.0] * 9, 2 * cost) == pytest.approx(expected)


def test_best_draft_tokens_by_hand():
    assert best_draft_tokens(0.0, [1.0, 1.0], 0.0) == (0, 1.0)  # nothing stands: the smallest of equals
    assert best_draft_tokens(1.0, [1.0, 1.25, 2.0, 8.0], 0.0) == (1, 1.6)
    assert best_draft_tokens(1.0, [1.0, 1.0, 1.0], 0.5) == (2, 1.5)
    assert best_draft_tokens(0.9, [1.0, 2.0, 3.0], 0.0)[0] == 0  # rows that share nothing never pay


def test_curve_of_keeps_the_measured_points():
    assert curve_of({1: 1.0, 2: 1.5, 8: 3.0}, up_to=8)[::7] == [1.0, 3.0]


@pytest.mark.parametrize(("alpha", "count"), [(1.1, 1), (-0.1, 1), (0.5, 3), (0.5, -1)])
def test_predicted_speedup_bad_input_states_the_rule(alpha, count):
    with pytest.raises(ValueError, match=f"draft_tokens in 0 to 2; got {alpha} and {count}"):
        predicted_speedup(alpha, count, [1.0] * 3, 0.0)
