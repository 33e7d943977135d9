import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.distributed import partition as parts

DELAYS = [0.020, 0.040, 0.160]
LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(LENGTHS, st.integers(1, 9), st.integers(50, 400))
def test_partition_keeps_every_id_once_and_both_bounds(lengths, max_requests, max_tokens):
    batches = parts.partition(lengths, max_requests=max_requests, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_requests and len(batch) * max(lengths[i] for i in batch) <= max_tokens


@given(LENGTHS.filter(bool), st.integers(1, 9))
def test_partition_by_length_pads_no_more_than_the_order_of_arrival(lengths, size):
    arrival = [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]
    by_length = parts.partition(lengths, max_requests=size)
    # sorted from the short end, only the last batch is smaller than the others, as in the order of arrival
    assert len(by_length) == len(arrival)
    if len(lengths) % size == 0:
        assert parts.padding(lengths, by_length) <= parts.padding(lengths, arrival) + 1e-12


def test_partition_by_hand_and_bad_input():
    assert parts.partition([], max_requests=2) == []
    assert parts.partition([3, 3, 1], max_requests=2) == [[2, 0], [1]]
    with pytest.raises(ValueError, match=r"a request must fit max_tokens=4; request 1 has 5"):
        parts.partition([1, 5], max_requests=2, max_tokens=4)
    with pytest.raises(ValueError, match="max_requests must be at least 1; got 0"):
        parts.partition([1], max_requests=0)


@given(st.integers(0, 500), st.lists(st.floats(0.1, 100), min_size=1, max_size=8))
def test_weighted_shares_add_up_and_stay_within_one_of_exact(count, rates):
    shares = parts.weighted_shares(count, rates)
    assert sum(shares) == count
    assert all(abs(share - count * rate / sum(rates)) < 1 + 1e-9 for share, rate in zip(shares, rates, strict=True))


def test_weighted_shares_refuses_a_node_without_a_rate():
    with pytest.raises(ValueError, match="every node needs a positive rate; got"):
        parts.weighted_shares(3, [1.0, 0.0])
    with pytest.raises(ValueError, match="every node needs a positive rate"):
        parts.weighted_shares(3, [])


def test_policies_on_the_uneven_cluster_by_hand():
    assert parts.shares_finish_s([40, 40, 40], DELAYS) == pytest.approx(6.4)
    assert parts.ideal_s(120, DELAYS) == pytest.approx(120 / 81.25)
    shares = parts.weighted_shares(120, [1 / d for d in DELAYS])
    assert shares == [74, 37, 9]
    assert parts.shares_finish_s(shares, DELAYS) == pytest.approx(1.48)
    assert parts.pull_finish_s(4, [1.0, 3.0]) == 3.0  # 1, 2 and 3 on the fast node, one on the slow
    assert parts.pull_finish_s(0, DELAYS) == 0


@given(st.integers(1, 200), st.lists(st.floats(0.01, 5), min_size=1, max_size=6))
def test_pull_loses_at_most_one_request_of_the_slowest_node(count, delays):
    finish, ideal = parts.pull_finish_s(count, delays), parts.ideal_s(count, delays)
    assert ideal * (1 - 1e-9) <= finish <= ideal + max(delays) + 1e-9


@given(st.lists(st.integers(), max_size=20), st.randoms())
def test_merge_restores_the_order_whatever_came_first_and_twice(answers, random):
    pairs = list(enumerate(answers))
    again = random.sample(pairs, k=len(pairs) // 2)
    mixed = random.sample(pairs + again, k=len(pairs) + len(again))
    merged, duplicates = parts.merge(len(answers), mixed)
    assert merged == answers and sorted(duplicates) == sorted(i for i, _ in again)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(0, "a")], r"every id needs an answer; 1 are missing: \[1\]"),
        ([(0, "a"), (1, "b"), (2, "c")], r"ids must lie in 0..1; got 2"),
        ([(0, "a"), (1, "b"), (0, "x")], r"each id has one answer; request 0 has 'a' and 'x'"),
    ],
)
def test_merge_refuses_gaps_strangers_and_contradictions(pairs, words):
    with pytest.raises(ValueError, match=words):
        parts.merge(2, pairs)
