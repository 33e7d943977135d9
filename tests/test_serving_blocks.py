"""Blocks: chained hashes, reference counts, copy on write, eviction, and a checker that sees each kind of damage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.serving.blocks import BlockPool, chained_hashes, check_blocks

A, B, C = chained_hashes([1, 2, 3, 4, 5, 6], 2)
TOKENS = st.lists(st.integers(0, 2), max_size=9)


def published(pool, *names):
    table = pool.allocate([], len(names))
    for block, name in zip(table, names, strict=True):
        pool.publish(block, name)
    return table


@given(TOKENS, TOKENS, st.integers(1, 3), st.sampled_from(["", "x"]), st.sampled_from(["", "x"]))
def test_hashes_agree_exactly_as_far_as_texts_and_salts_do(one, two, size, salt, other):
    first, second = chained_hashes(one, size, salt=salt), chained_hashes(two, size, salt=other)
    assert len(first) == len(one) // size
    for n, (a, b) in enumerate(zip(first, second, strict=False), start=1):
        assert (a == b) == (salt == other and one[: n * size] == two[: n * size])


def test_a_match_stops_at_the_first_unknown_block_and_takes_nothing():
    pool = BlockPool(4, block_size=2)
    table = published(pool, A, C)
    pool.release(table)
    assert pool.match([A, B, C]) == table[:1] and pool.match([B]) == []
    assert pool.references == [0] * 4 and list(pool.cached) == table[::-1]


def test_shared_blocks_are_counted_and_stay_until_the_last_holder_leaves():
    pool = BlockPool(4, block_size=2)
    first = published(pool, A)
    second = pool.allocate(pool.match([A, B]), 1)
    assert second[0] == first[0] and pool.references[first[0]] == 2
    pool.release(first)
    check_blocks(pool, [second])
    assert pool.references[second[0]] == 1 and not pool.cached
    pool.release(second)
    check_blocks(pool, [])
    assert list(pool.cached) == first and pool.available == 4


def test_eviction_takes_the_least_recently_used_end_first_and_forgets_its_hash():
    pool = BlockPool(3, block_size=2)
    pool.release(published(pool, A, B))
    pool.release(published(pool, C))
    pool.release(pool.allocate(pool.match([A]), 0))  # A is used again: now B is the oldest, then C
    pool.allocate([], 1)
    assert pool.match([B]) == [] and pool.match([C]) and pool.match([A])
    pool.allocate([], 1)
    assert pool.match([C]) == [] and pool.match([A])


def test_room_counts_a_shared_cached_block_once():
    pool = BlockPool(2, block_size=2)
    table = published(pool, A)
    pool.release(table)
    assert pool.room_for([], 2) and pool.room_for(table, 1) and not pool.room_for(table, 2)
    with pytest.raises(ValueError, match="room for 2 more blocks"):
        pool.allocate(table, 2)
    assert pool.references == [0, 0] and pool.available == 2
    check_blocks(pool, [])


def test_a_block_of_one_s_own_is_not_copied_and_a_shared_one_is():
    pool = BlockPool(3, block_size=2)
    first = published(pool, A)
    assert pool.own(first, 0) is None and pool.match([A]) == []  # what may be written is not known
    pool.publish(first[0], A)
    second = pool.allocate(first, 0)
    assert pool.own(second, 0) == (first[0], second[0]) and second[0] != first[0]
    check_blocks(pool, [first, second])
    third = pool.allocate([*first, *second], 1)
    with pytest.raises(ValueError, match="room for 1 more"):
        pool.own(third, 0)
    check_blocks(pool, [first, second, third])


def test_a_second_block_of_the_same_content_stays_unknown():
    pool = BlockPool(2, block_size=2)
    first, second = published(pool, A), published(pool, A)
    assert pool.match([A]) == first
    pool.release(second)
    check_blocks(pool, [first])
    assert list(pool.free) == second


def test_bad_input_is_refused():
    pool = BlockPool(2, block_size=2)
    with pytest.raises(ValueError, match="at least 1; got 0 and 2"):
        BlockPool(0, block_size=2)
    with pytest.raises(ValueError, match="only a block in some table"):
        pool.publish(0, A)
    table = pool.allocate([], 1)
    pool.release(table)
    with pytest.raises(ValueError, match="can be released once"):
        pool.release(table)
    check_blocks(pool, [])


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda pool: pool.references.__setitem__(0, 2), "referenced as often"),
        (lambda pool: pool.free.append(pool.free[0]), "free twice"),
        (lambda pool: pool.free.pop(), "free, cached or owned"),
        (lambda pool: pool.free.append(0), "two of them"),
        (lambda pool: pool.hash_of.pop(1), "hashes and blocks name each other"),
        (lambda pool: pool.hash_of.__setitem__(pool.free[0], B), "free blocks have no hash"),
    ],
)
def test_the_checker_sees_each_kind_of_damage(damage, rule):
    pool = BlockPool(4, block_size=2)
    table = pool.allocate([], 1)
    pool.release(other := published(pool, A))
    assert table == [0] and other == [1]
    check_blocks(pool, [table])
    damage(pool)
    with pytest.raises(AssertionError, match=rule):
        check_blocks(pool, [table])


def test_hashes_of_a_grown_text_go_on_from_the_known_ones():
    text = list(range(11))
    whole = chained_hashes(text, 3, salt="ada")
    assert len(whole) == 3
    for count in range(4):
        assert chained_hashes(text, 3, salt="ada", known=whole[:count]) == whole
    assert chained_hashes(text, 3, known=whole[:1])[1:] == whole[1:]  # the salt is in the known ones
