"""Requests served together get the tokens that each gets alone, in float32 and on packed weights."""

import functools
import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from labutils.generation.fast_llama import FastLlama
from labutils.generation.sampling import Sampler
from labutils.lab.models.quantized import fast_float_llama, fast_packed_llama
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import find_kernels
from labutils.quantization.packed import pack_model_
from labutils.serving.blocks import check_blocks
from labutils.serving.engine import Engine, run, run_static
from labutils.serving.paged import PagedLlama
from labutils.serving.scheduler import End, Limits, Refusal, Request

LIBRARY, REASON = find_kernels()
MAKERS = {None: functools.partial(FastLlama, matvec="numpy"), 32: fast_float_llama}  # by bits; others are packed
NEAR_TIE = 1e-4  # logits so close may change places where sums are rounded in another order


@functools.cache
def model(name="llama-gqa-tied", bits=None):
    plain = tiny_model(name)
    return pack_model_(plain, Scheme(bits)) if bits in (4, 8) else plain


def decoder(max_length, name="llama-gqa-tied", bits=None):
    make = MAKERS.get(bits, fast_packed_llama)
    return make(model(name, bits), max_length=max_length)


def engine(*, blocks=24, block_size=4, name="llama-gqa-tied", bits=None, **limits):
    settings = {"token_budget": 8, "max_running": 4, "max_waiting": 64, "max_positions": 60}
    paged = PagedLlama(decoder(blocks * block_size, name, bits), block_size=block_size)
    return Engine(paged, Limits(**settings | limits))


def mixed_requests(seed=0, count=6):
    rng = random.Random(seed)
    common = [rng.randrange(97) for _ in range(12)]
    texts = [
        common[: rng.choice([0, 8, 12])] + [rng.randrange(97) for _ in range(rng.randint(1, 9))] for _ in range(count)
    ]
    return [Request(text, max_new_tokens=rng.randint(1, 8)) for text in texts]


def assert_as_alone(requests, **kind):
    """Each greedy text is its decoder's own; where it first departs, the two best logits are a near tie."""
    for request in requests:
        lone = decoder(64, **kind)
        logits = lone.prefill(torch.tensor([request.token_ids[: request.prompt]]))
        for token in request.new_ids:
            best, second = logits[0].topk(2).values.tolist()
            if int(logits.argmax()) != token:
                assert kind.get("bits") is None and best - second < NEAR_TIE, "another text than alone"
                break
            logits = lone.decode_one_token(torch.tensor([token]))


@pytest.mark.parametrize("name", ["llama-untied-bias", "qwen2"])
def test_requests_together_get_the_tokens_of_each_alone(name):
    serving = engine(name=name)
    done = run(serving, mixed_requests())
    assert all(r.end is End.LENGTH and len(r.new_ids) == r.max_new_tokens for r in done)
    assert any(r.cached for r in done)
    assert_as_alone(done, name=name)


@pytest.mark.skipif(LIBRARY is None, reason=REASON)
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_weights_in_c_serve_many_with_the_tokens_of_each_alone(bits):
    done = run(engine(bits=bits), mixed_requests(1))
    for request in done:
        lone = decoder(64, bits=bits)
        text = lone.generate(torch.tensor([request.token_ids[: request.prompt]]), request.max_new_tokens)
        assert request.token_ids == text[0].tolist()


@pytest.mark.skipif(LIBRARY is None, reason=REASON)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("block_size", "budget"), [(3, 60), (16, 7), (64, 41)])
def test_a_token_in_c_has_the_same_bits_in_any_blocks_and_chunks(bits, block_size, budget):
    lone, prompt = decoder(64, bits=bits), random.Random(4).choices(range(97), k=45)
    expected = [lone.extend([token]).clone() for token in prompt][-1]
    paged, seen = PagedLlama(decoder(192, bits=bits), block_size=block_size), {}
    serving = Engine(paged, Limits(budget, 4, 64, 60))

    def watched(step):
        rows = paged(step)
        seen.update(zip([id(c.request) for c in step.chunks if c.samples], rows, strict=True))
        return rows

    serving.model = watched
    request = Request(prompt, max_new_tokens=1)
    run(serving, [*(Request([7, token], max_new_tokens=9) for token in prompt[:3]), request])
    assert torch.equal(seen[id(request)], expected[0])


def test_two_requests_made_of_one_list_do_not_spoil_each_other():
    prompt = [5, 6, 7, 8]
    one, two = run(engine(), [Request(prompt, max_new_tokens=6), Request(prompt, max_new_tokens=6)])
    assert prompt == [5, 6, 7, 8] and one.token_ids == two.token_ids and len(one.new_ids) == len(two.new_ids) == 6


def test_texts_survive_preemption_and_copies():
    serving, copies = engine(blocks=9, block_size=2, max_positions=19), []
    plain = serving.model
    serving.model = lambda step: copies.extend(step.copies) or plain(step)
    done = run(serving, [Request([5, 6, 7, 8][:n], max_new_tokens=12) for n in (4, 4, 4, 3, 2)])
    assert sum(r.preemptions for r in done) and copies
    check_blocks(serving.scheduler.pool, [])
    assert_as_alone(done)


def test_one_request_alone_has_the_bits_of_the_decoder():
    serving, lone = engine(token_budget=60), decoder(64)
    request = serving.submit(Request([3, 1, 4, 1, 5], max_new_tokens=4))
    seen, plain = [], serving.model
    serving.model = lambda step: seen.append(plain(step).clone()) or seen[-1]
    run(serving, [])
    logits = lone.prefill(torch.tensor([request.token_ids[:5]]))
    for ours, token in zip(seen, request.new_ids, strict=True):
        assert torch.equal(ours, logits)
        logits = lone.decode_one_token(torch.tensor([token]))


def test_every_request_draws_with_its_own_settings():
    def drawn(serving, others):
        wanted = Sampler(torch.Generator().manual_seed(7), temperature=1.5, top_k=20)
        request = Request([9, 8, 7], max_new_tokens=8, choose=wanted)
        run(serving, [*others, request])
        return request.new_ids

    noise = [Request([n], max_new_tokens=6, choose=Sampler(torch.Generator().manual_seed(n))) for n in range(5)]
    assert drawn(engine(), noise) == drawn(engine(), []) != drawn(engine(), [])[::-1]


def test_a_request_that_goes_wrong_ends_alone():
    def broken(logits):
        raise RuntimeError("no token")

    serving = engine()
    bad, good = Request([1, 2], max_new_tokens=3, choose=broken), Request([1, 2, 3], max_new_tokens=3)
    run(serving, [bad, good])
    assert (bad.end, good.end) == (End.ERROR, End.LENGTH)
    assert_as_alone([good])
    check_blocks(serving.scheduler.pool, [])


def test_a_model_that_fails_or_gives_no_numbers_ends_the_step_s_requests_only():
    serving = engine()
    plain = serving.model
    for fault in (lambda step: 1 / 0, lambda step: plain(step) * np.nan):
        serving.model = fault
        assert run(serving, [Request([1], max_new_tokens=2)])[0].end is End.ERROR
        serving.model = plain
        assert_as_alone(run(serving, [Request([1], max_new_tokens=2)]))


def test_a_row_without_numbers_ends_its_request_alone_and_a_tie_goes_to_the_first():
    serving = engine()
    rows = torch.tensor([[0.0, 2.0, 2.0], [0.0, np.nan, 2.0], [np.inf, 0.0, 1.0], [3.0, 1.0, 3.0]])
    serving.model = lambda step: rows
    requests = run(serving, [Request([1], max_new_tokens=1) for _ in rows])
    assert [(r.end, r.new_ids) for r in requests] == [
        (End.LENGTH, [1]),
        (End.ERROR, []),
        (End.ERROR, []),
        (End.LENGTH, [0]),
    ]


def test_a_stop_token_ends_a_text_and_is_kept():
    free = run(engine(), [Request([3, 1, 4], max_new_tokens=6)])[0].new_ids
    stopped = run(engine(), [Request([3, 1, 4], max_new_tokens=6, stop=frozenset({free[2]}))])[0]
    assert stopped.end is End.STOP and stopped.new_ids == free[: free.index(free[2]) + 1]


def test_continuous_batching_takes_fewer_steps_than_static():
    lengths = [10, 1, 1, 1, 10, 1, 1, 1]

    def steps(how, **settings):
        serving = engine(max_running=2, blocks=64)
        how(serving, [Request([n + 1], max_new_tokens=new) for n, new in enumerate(lengths)], **settings)
        return serving.steps

    # batches of two: 10 + 1 + 10 + 1; two places refilled at once: the short ones pass by beside a long one, 26 tokens
    assert steps(run_static, batch=2) == 22
    assert steps(run) == 13


def test_times_are_noted_by_the_engine_s_clock():
    ticks = iter(range(100))
    serving = engine()
    serving.clock = lambda: float(next(ticks))
    (request,) = run(serving, [Request([1, 2], max_new_tokens=3)])
    # submitted at 0; a step looks at the clock before and after: 1 and 2, 3 and 4, 5 and 6
    assert request.times.ttft_s == 2.0 and request.times.itl_s == (2.0, 2.0)


def test_cancelling_and_refusals_pass_through():
    serving = engine()
    request = serving.submit(Request([1], max_new_tokens=5))
    serving.step()
    serving.cancel(request)
    assert not serving.busy and serving.step() == []
    with pytest.raises(Refusal, match="60 tokens together"):
        serving.submit(Request([1] * 60, max_new_tokens=1))
    with pytest.raises(ValueError, match="must hold a block of 8 positions; got 4"):
        PagedLlama(decoder(4), block_size=8)


def test_a_model_must_give_a_row_of_logits_for_each_request_that_is_due():
    for count in (0, 2):
        serving = engine()
        serving.model = lambda step, count=count: torch.ones(count, 3)
        with pytest.raises(ValueError, match="zip"):
            run(serving, [Request([1], max_new_tokens=1)])
