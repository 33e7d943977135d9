"""Word error rate: by hand, by its properties, and as jiwer counts."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.speech.edit_distance import Edits, align, count_edits, edit_table, total_edits

sentences = st.lists(st.sampled_from("abcd"), max_size=6)


def test_table_by_hand():
    assert edit_table(["red", "coat"], ["a", "red", "boat"]) == [[0, 1, 2, 3], [1, 1, 1, 2], [2, 2, 2, 2]]


def test_each_kind_of_edit_is_counted():
    edits = count_edits("please return the red coat", "return the bread coat now")
    assert edits == Edits(words=5, substitutions=1, deletions=1, insertions=1)
    assert edits.rate == pytest.approx(0.6)


def test_insertions_can_push_the_rate_above_one():
    assert count_edits("yes", "yes of course sir").rate == 3


def test_edits_add_up_over_words_not_sentences():
    assert total_edits([("no", "yes"), ("a b c d", "a b c d")]).rate == pytest.approx(1 / 5)


def test_a_rate_needs_words():
    with pytest.raises(ValueError, match="at least one word in the reference; got 0"):
        count_edits("", "hello").rate  # noqa: B018


@given(sentences, sentences)
def test_alignment_is_a_shortest_one_and_keeps_both_texts(said, heard):
    pairs = align(said, heard)
    assert [a for a, _ in pairs if a is not None] == said
    assert [b for _, b in pairs if b is not None] == heard
    assert sum(a != b for a, b in pairs) == edit_table(said, heard)[-1][-1]


@given(sentences, sentences, sentences)
def test_edit_distance_is_a_metric(a, b, c):
    def distance(x, y):
        return edit_table(x, y)[-1][-1]

    assert distance(a, b) == distance(b, a) and (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@pytest.mark.slow
def test_rates_are_those_of_jiwer(library_aside):
    library_aside("rapidfuzz")
    jiwer = library_aside("jiwer")
    rng = random.Random(0)
    words = ["return", "the", "red", "coat", "to", "london", "please"]
    pairs = [tuple(" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(2)) for _ in range(200)]
    for said, heard in pairs:
        assert count_edits(said, heard).rate == pytest.approx(jiwer.wer(said, heard))
    assert total_edits(pairs).rate == pytest.approx(jiwer.wer([a for a, _ in pairs], [b for _, b in pairs]))
