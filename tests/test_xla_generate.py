"""Generation in compiled pieces: the tokens of torch, few programs, and a cache that is given away."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_here import devices  # noqa: F401
from tiny_models import random_ids, tiny_model

from labutils.generation.decode import generate_cached
from labutils.lab.models.evaluate_text import token_nats
from labutils.lab.models.load import load_model
from labutils.xla import generate, runtime
from labutils.xla.generate import AsTorch, XlaLlama, bucket_for, decode_scan, padding_share
from labutils.xla.lazy import jax, jnp


@pytest.fixture(scope="module")
def tiny(devices):  # noqa: F811
    model = tiny_model("llama-gqa-tied")
    return model, XlaLlama(model, max_length=48, buckets=(8, 16))


@pytest.mark.parametrize("in_one_program", [True, False])
@pytest.mark.parametrize("length", [1, 8, 9, 20])
def test_generate_makes_the_tokens_of_torch(tiny, length, in_one_program):
    model, decoder = tiny
    ids = random_ids(length, seed=length)
    expected = generate_cached(model, ids, 12)[0, length:].tolist()
    assert decoder.generate(ids[0].tolist(), 12, in_one_program=in_one_program) == expected


def test_generate_lablm_s_greedy_tokens_are_torch_s():
    model, tokenizer = load_model("lablm")
    ids = tokenizer(tokenizer.bos_token + "import os\n\n\ndef walk(", return_tensors="pt").input_ids
    expected = generate_cached(model, ids, 40)[0, ids.shape[1] :].tolist()
    decoder = XlaLlama(model, max_length=96)
    assert decoder.generate(ids[0].tolist(), 40) == expected


def test_generate_a_single_token_and_too_many(tiny):
    _, decoder = tiny
    assert len(decoder.generate([1, 2, 3], 1)) == 1
    assert len(decoder.generate([1, 2, 3], 45)) == 45
    for new_tokens in (0, 46):
        with pytest.raises(ValueError, match="1 to max_length=48 positions; got 3 \\+"):
            decoder.generate([1, 2, 3], new_tokens)


@pytest.mark.parametrize("token_id", [-1, 97])
def test_an_id_that_is_no_token_s_is_refused(tiny, token_id):
    model, decoder = tiny
    assert model.config.vocab_size == 97
    for read in (decoder.read, lambda ids: decoder.generate(ids, 2), lambda ids: AsTorch(decoder)(torch.tensor([ids]))):
        read([0, 96])
        with pytest.raises(IndexError, match=f"^token ids must be 0 to 96; got {token_id}$"):
            read([0, token_id, 5])


def test_one_program_for_all_lengths_of_a_bucket():
    decoder = XlaLlama(tiny_model("llama-gqa-tied"), max_length=32, buckets=(8, 16))
    with runtime.compilations("prefill") as seen:
        for length in (3, 5, 8, 9, 16, 2):
            decoder.read(list(range(length)))
    assert len(seen) == 2 and all(program.seconds > 0 for program in seen)
    with runtime.compilations("prefill") as seen:
        decoder.read([1, 2, 3, 4])
    assert seen == []


def test_one_step_program_serves_every_position(tiny):
    _, decoder = tiny
    decoder.generate([1, 2, 3], 4, in_one_program=False)
    with runtime.compilations() as seen:
        decoder.generate([1, 2, 3], 9, in_one_program=False)
    assert seen == []


def test_donated_cache_is_gone_and_aliased():
    model = tiny_model("llama-gqa-tied")
    giving, keeping = (XlaLlama(model, max_length=32, donate=donate) for donate in (True, False))
    aliased = {}
    for decoder in (giving, keeping):
        _, cache = decoder.read([1, 2, 3])
        compiled = decoder.step.lower(decoder.params, np.int32(1), cache, np.int32(3)).compile()
        aliased[decoder] = compiled.memory_analysis().alias_size_in_bytes
        decoder.step(decoder.params, np.int32(1), cache, np.int32(3))
        assert cache[0].is_deleted() == (decoder is giving)
    cache_bytes = 2 * 3 * 2 * 32 * 8 * 4  # keys and values, layers, KV heads, positions, head_dim, bytes
    assert aliased == {giving: cache_bytes, keeping: 0}


def test_decode_scan_by_hand():
    """A step that answers token + position, out of ten, and counts its calls in the cache."""

    def step(token, cache, position):
        return jax.nn.one_hot((token + position) % 10, 10), cache + 1

    tokens, calls = jax.jit(partial(decode_scan, step, new_tokens=4))(jnp.int32(5), jnp.int32(0), jnp.int32(3))
    assert tokens.tolist() == [3, 7, 2, 8] and int(calls) == 9


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1), st.sets(st.integers(1, 63), max_size=4))
def test_bucket_for_is_the_least_that_holds_and_more_buckets_pad_less(lengths, more):
    buckets = (64, *more)
    for length in lengths:
        chosen = bucket_for(length, buckets)
        assert chosen in buckets and chosen >= length and not any(length <= b < chosen for b in buckets)
    assert 0 <= padding_share(lengths, buckets) <= padding_share(lengths, (64,)) < 1


def test_bucket_for_refuses_what_fits_nowhere():
    for length in (0, 65):
        with pytest.raises(ValueError, match=f"1 to the largest bucket, 64; got {length}"):
            bucket_for(length, (16, 64))


def test_decoders_can_share_their_weights_and_keep_their_own_programs(tiny):
    model, decoder = tiny
    twin = XlaLlama(model, max_length=48, buckets=(8, 16), params=decoder.params)
    assert twin.params is decoder.params
    decoder.read([1, 2, 3])
    with runtime.compilations("prefill") as seen:
        twin.read([1, 2, 3])
    assert len(seen) == 1


def test_buckets_end_at_max_length():
    assert XlaLlama(tiny_model("llama-gqa-tied"), max_length=100).buckets == (16, 64, 100)


def test_as_torch_gives_the_logits_and_the_quality_of_torch(tiny):
    model, decoder = tiny
    ids = random_ids(11, batch=2)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    worn = AsTorch(decoder)
    torch.testing.assert_close(worn(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    text = random_ids(60)[0]
    for left, right in zip(token_nats(worn, text, context=40), token_nats(model, text, context=40), strict=True):
        assert left.item() == pytest.approx(right.item(), abs=1e-3)


def test_padding_share_by_hand():
    assert generate.padding_share([5, 16, 17], (16, 32)) == 1 - 38 / 64
