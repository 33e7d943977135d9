"""A small cache: keeping everything changes nothing, each policy keeps what its paper says, and bounds bound."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from labutils.decoding import small_cache
from labutils.decoding.small_cache import Held, SmallCache, decode

PROMPT, NEW = 9, 6


def held(*, weight=None, watched=None, positions=range(5), keys=None):
    """One batch row, one head, two dimensions."""
    count = len(positions)
    keys = torch.zeros(1, 1, count, 2) if keys is None else keys
    flat = [torch.zeros(count) if x is None else torch.tensor(x) for x in (weight, watched)]
    return Held(keys, keys, torch.tensor(positions)[None, None], *(x[None, None] for x in flat))


def kept(policy, state, budget):
    return sorted(state.positions[0, 0][policy(state)[0, 0].topk(budget).indices].tolist())


def decoded(model, ids, cache, prompt=PROMPT):
    return torch.cat([decode(model, ids[:, :prompt], cache), decode(model, ids[:, prompt:], cache)], dim=1)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-head-dim", "qwen2", "qwen3"])
def test_decode_keeping_everything_equals_the_model(name):
    model, ids = tiny_model(name), random_ids(PROMPT + NEW, batch=3)
    with torch.no_grad():
        whole = model(ids).logits[:, PROMPT - 1 :]
    policies = [
        {},
        {"keep": small_cache.heavy_hitters(recent=2)},
        {"keep": small_cache.newest(sinks=1)},
        {"read": small_cache.page_bounds(page=4)},
        {"read": small_cache.exact_scores},
    ]
    for policy in policies:
        cache = SmallCache(budget=PROMPT + NEW, **policy)
        torch.testing.assert_close(decoded(model, ids, cache), whole, atol=2e-5, rtol=1e-4)
        assert cache.share == 1
    assert model.config._attn_implementation == "sdpa"


def test_sliding_window_with_sinks_equals_a_mask_given_to_the_model():
    model, ids, sinks, budget = tiny_model("llama-gqa-tied"), random_ids(PROMPT + NEW, batch=2), 2, 5
    query, key = torch.meshgrid(torch.arange(PROMPT + NEW), torch.arange(PROMPT + NEW), indexing="ij")
    window = (key < sinks) | (key >= query - (budget - sinks))  # what is held, and the query's own position
    sees = (key <= query) & (window | (query < PROMPT))
    mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf")).expand(2, 1, -1, -1)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits[:, PROMPT - 1 :]
    cache = SmallCache(budget=budget, keep=small_cache.newest(sinks=sinks))
    torch.testing.assert_close(decoded(model, ids, cache), wanted, atol=2e-5, rtol=1e-4)
    assert cache.layers[0].positions[0, 0].tolist() == [0, 1, 12, 13, 14]
    assert cache.share == pytest.approx(6 * NEW / sum(range(PROMPT + 1, PROMPT + NEW + 1)))
    assert cache.resident_bytes == 3 * 2 * 2 * 2 * budget * 8 * 4  # layers, K and V, batch, heads, positions, width


def test_policies_by_hand():
    state = held(weight=[0.1, 0.5, 0.2, 0.1, 0.1], watched=[0.0, 0.0, 0.9, 0.0, 0.0])
    assert kept(small_cache.newest(sinks=1), state, 3) == [0, 3, 4]
    assert kept(small_cache.newest(sinks=0), state, 3) == [2, 3, 4]
    assert kept(small_cache.heavy_hitters(recent=2), state, 3) == [1, 3, 4]
    assert kept(small_cache.observed(prompt=5, window=1, pool=1), state, 2) == [2, 4]
    assert kept(small_cache.observed(prompt=5, window=1, pool=3), state, 4) == [1, 2, 3, 4]
    assert kept(small_cache.observed(prompt=3, window=2), state, 2) == [3, 4]  # no room for all that are protected


def test_at_random_keeps_the_newest_and_reaches_all_others():
    state, generator = held(positions=range(8)), torch.Generator().manual_seed(0)
    choices = [kept(small_cache.at_random(recent=2, generator=generator), state, 4) for _ in range(60)]
    assert all(choice[-2:] == [6, 7] for choice in choices)
    assert {position for choice in choices for position in choice} == set(range(8))


@pytest.mark.parametrize("prompt", [PROMPT - 1, 3])
def test_weight_counts_the_attention_that_the_model_itself_reports(prompt):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(PROMPT, batch=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        reported = model(ids, output_attentions=True).attentions
    cache = SmallCache(watch=4)
    decoded(model, ids, cache, prompt)
    for layer, attention in zip(cache.layers, reported, strict=True):
        wanted = attention.unflatten(1, (2, 2)).sum(dim=(2, 3))
        torch.testing.assert_close(layer.weight, wanted)
        watched = attention[:, :, max(prompt - 4, 0) : prompt].unflatten(1, (2, 2)).sum(dim=(2, 3))
        torch.testing.assert_close(layer.watched, watched)


@given(seed=st.integers(0, 10_000), page=st.integers(1, 9))
def test_page_bounds_are_above_every_score_of_their_page(seed, page):
    generator = torch.Generator().manual_seed(seed)
    keys, query = (torch.randn(1, 1, n, 2, generator=generator) for n in (7, 3))
    state = held(positions=range(7), keys=keys)
    bounds, scores = small_cache.page_bounds(page=page)(state, query), query @ keys.mT
    assert (bounds >= scores.amax(dim=2) - 1e-6).all()
    if page == 1:  # a page of one key bounds exactly
        torch.testing.assert_close(bounds[..., :-1], scores.amax(dim=2)[..., :-1])


def test_upper_bound_of_a_negative_query_takes_the_lowest_key():
    query, low, high = torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 0.0]), torch.tensor([5.0, 1.0])
    assert small_cache.upper_bound(query, low, high) == 3 + 2


def test_index_scores_sum_the_positive_parts_over_all_heads():
    generator = torch.Generator().manual_seed(0)
    keys, query = torch.randn(1, 2, 6, 4, generator=generator), torch.randn(1, 2, 2, 4, generator=generator)
    flat = torch.zeros(1, 2, 6)
    state = Held(keys, keys, torch.arange(6).expand(1, 2, 6), flat, flat)
    scores = small_cache.index_scores(dims=2)(state, query)
    slow = [1, 3]  # the second of two rotary pairs, (1, 3)
    wanted = sum((query[0, h, g, slow] @ keys[0, h, 2, slow]).relu() for h in range(2) for g in range(2))
    assert scores[0, 0, 2].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (scores[0, 0] == scores[0, 1]).all() and scores[0, 0].argmax() == 5


def test_a_reading_policy_evicts_nothing_and_hides_what_it_does_not_choose():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(PROMPT + 1)
    cache = SmallCache(budget=3, read=lambda state, query: state.positions.float())  # the newest three
    found = decoded(model, ids, cache)[:, -1]
    sees = torch.arange(PROMPT + 1) > PROMPT - 3
    sees = torch.ones(PROMPT + 1, PROMPT + 1, dtype=torch.bool).tril() & (
        sees | (torch.arange(PROMPT + 1) < PROMPT)[:, None]
    )
    mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert cache.layers[0].keys.shape[2] == PROMPT + 1 and cache.share == 3 / (PROMPT + 1)


def test_fork_evicts_at_once_and_leaves_the_other_as_it_was():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(PROMPT + NEW)
    whole = SmallCache()
    decode(model, ids[:, :PROMPT], whole)
    small = whole.fork(budget=4, keep=small_cache.newest())
    decode(model, ids[:, PROMPT:], small)
    assert [x.keys.shape[2] for x in (*small.layers, *whole.layers)] == [4] * 3 + [PROMPT] * 3
    assert (small.length, whole.length) == (PROMPT + NEW, PROMPT)


def test_causal_shows_cached_positions_to_every_new_query():
    assert small_cache.causal(1, 3).tolist() == [[True] * 4]
    assert small_cache.causal(3, 0).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"watch": 0}])
def test_small_cache_refuses(wrong):
    with pytest.raises(ValueError, match="at least 1; got"):
        SmallCache(**wrong)


def test_decode_puts_the_models_attention_back_after_an_error():
    model = tiny_model("llama-gqa-tied")
    with pytest.raises(IndexError):
        decode(model, torch.tensor([[1000]]), SmallCache())
    assert model.config._attn_implementation == "sdpa"
