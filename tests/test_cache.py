"""Caches: what a model sees of them, growth, views, rollback, and refusal."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from labutils.acceleration.graphs import CaptureError, Tape
from labutils.generation.cache import CompiledKVCache, KVCache, StaticKVCache

CONFIG = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=12)
KINDS = ["growing", "static", "compiled"]


def make(kind: str, max_length: int = 8, batch: int = 1):
    if kind == "growing":
        return KVCache()
    return {"static": StaticKVCache, "compiled": CompiledKVCache}[kind](CONFIG, max_length=max_length, batch=batch)


def numbered(start: int, count: int) -> torch.Tensor:
    """Keys whose every number is their position plus one."""
    return (torch.arange(start, start + count) + 1.0).view(1, 1, count, 1).expand(1, 2, count, 3)


def store(cache, start: int, count: int) -> torch.Tensor:
    for layer in range(2):
        keys, values = cache.update(numbered(start, count), -numbered(start, count), layer)
    assert torch.equal(values, -keys)
    return keys


@pytest.mark.parametrize("kind", KINDS)
def test_update_returns_all_positions_in_order(kind):
    cache = make(kind)
    store(cache, 0, 3)
    keys = store(cache, 3, 1)
    expected = [1.0, 2.0, 3.0, 4.0] + ([0.0] * 4 if kind == "compiled" else [])
    assert keys[0, 1, :, 2].tolist() == expected
    assert int(cache.get_seq_length()) == int(cache.get_query_offset()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_mask_sizes_announce_what_update_returns(kind):
    cache = make(kind)
    for start, count in ((0, 3), (3, 1), (4, 2)):
        announced, offset = cache.get_mask_sizes(count, 0)
        assert store(cache, start, count).shape[2] == announced
        assert offset == 0


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_forgets_and_the_next_update_overwrites(kind):
    cache = make(kind)
    store(cache, 0, 5)
    cache.truncate(2)
    assert int(cache.get_seq_length()) == int(cache.get_seq_length(1)) == 2
    keys = store(cache, 10, 1)
    assert keys[0, 0, :3, 0].tolist() == [1.0, 2.0, 11.0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_caches_hold_what_transformers_dynamic_cache_holds(steps):
    ours, static, reference = KVCache(), make("static", max_length=64), DynamicCache()
    length = 0
    for count, forget in steps:
        for layer in range(2):
            theirs = reference.update(numbered(length, count), -numbered(length, count), layer)
        assert torch.equal(store(ours, length, count), theirs[0])
        assert torch.equal(store(static, length, count), theirs[0])
        length = max(length + count - forget, 0)
        if forget:  # crop(0) forgets everything before transformers 5.23
            reference.crop(length - reference.get_seq_length())
        ours.truncate(length)
        static.truncate(length)


def test_static_cache_never_moves_its_buffers_and_hands_out_views():
    cache = make("static")
    addresses = [buffer.data_ptr() for buffer in cache.keys]
    keys = store(cache, 0, 3)
    store(cache, 3, 2)
    assert [buffer.data_ptr() for buffer in cache.keys] == addresses and keys.data_ptr() == addresses[1]


def test_resident_bytes_by_hand():
    cache = make("static", max_length=8, batch=3)
    assert (
        cache.resident_bytes == 2 * 2 * 3 * 2 * 8 * 3 * 4
    )  # K and V, layers, batch, heads, positions, head size, bytes
    growing = KVCache()
    store(growing, 0, 5)
    assert growing.resident_bytes == 2 * 2 * 1 * 2 * 5 * 3 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_refuses_where_the_cache_has_never_been(kind):
    cache = make(kind)
    store(cache, 0, 3)
    for length in (4, -1):
        with pytest.raises(ValueError, match=rf"0\.\.3 positions; got {length}"):
            cache.truncate(length)


def test_restart_truncates_without_asking_the_device():
    cache = make("compiled")
    store(cache, 0, 5)
    Tape.record(lambda: cache.restart(2))
    assert int(cache.get_seq_length()) == int(cache.get_seq_length(1)) == 2
    with pytest.raises(CaptureError, match="item"):
        Tape.record(lambda: cache.truncate(1))


def test_static_cache_refuses_more_than_it_holds():
    cache = make("static", max_length=2)
    with pytest.raises(ValueError, match="max_length=2 positions; got position 3"):
        store(cache, 0, 3)
    with pytest.raises(ValueError, match="at least 1; got 0 and 1"):
        StaticKVCache(CONFIG, max_length=0)
