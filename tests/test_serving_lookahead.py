"""Guesses inside the engine change how many steps the model computes, and no token."""

import functools

import pytest
import torch
from test_serving_engine import LIBRARY, REASON, decoder, engine, mixed_requests

from labutils.decoding.proposers import PromptLookup, Proposal
from labutils.generation.sampling import Sampler
from labutils.serving.blocks import check_blocks
from labutils.serving.engine import Engine, run
from labutils.serving.lookahead import Lookahead
from labutils.serving.paged import PagedLlama
from labutils.serving.scheduler import End, Request

needs_kernels = pytest.mark.skipif(LIBRARY is None, reason=REASON)


def guessing(serving, draft_tokens=4, proposer=PromptLookup):
    serving.model = Lookahead(serving.model, draft_tokens=draft_tokens, proposer=proposer)
    return serving


class Oracle:
    """Knows the texts that come out, and spoils each `every`-th guess."""

    def __init__(self, texts, every=10**9):
        self.texts, self.every = texts, every

    def propose(self, token_ids, count):
        text = next((t for t in self.texts if t[: len(token_ids)] == token_ids), [])
        right = enumerate(text[len(token_ids) : len(token_ids) + count], start=len(token_ids))
        return Proposal([(token + 1) % 97 if place % self.every == 0 else token for place, token in right])


def texts_of(requests):
    return [request.token_ids for request in requests]


def drawing(ids, new_tokens, *, seed=1, **more):
    """A request that draws its text, since the tiny model's greedy one is a single token again and again."""
    return Request(ids, new_tokens, choose=Sampler(torch.Generator().manual_seed(seed), temperature=4.0), **more)


def repeating(make=drawing):
    """Prompts that repeat themselves, of different lengths, so that lookup has something to find."""
    return [make([7, 8, 9, 5][: 1 + n % 4] * 3 + [n], 14 + n) for n in range(5)]


@needs_kernels
def test_the_texts_here_have_many_tokens():
    assert len(set(run(engine(bits=8, blocks=48), repeating())[-1].new_ids)) > 9


@needs_kernels
@pytest.mark.parametrize("draft_tokens", [1, 4, 16])
@pytest.mark.parametrize("every", [1, 3, 10**9])
def test_good_and_bad_guesses_give_the_plain_engine_s_tokens(draft_tokens, every):
    truth = run(engine(bits=8, blocks=48), repeating())
    serving = guessing(engine(bits=8, blocks=48), draft_tokens, lambda: Oracle(texts_of(truth), every))
    assert texts_of(run(serving, repeating())) == texts_of(truth)
    assert serving.model.drafted > 0 and (serving.model.accepted > 0) == (every > 1)
    check_blocks(serving.scheduler.pool, [])


def test_float_matrices_and_lookup_too():
    greedy = functools.partial(repeating, Request)
    serving = guessing(engine(blocks=48))
    assert texts_of(run(serving, greedy())) == texts_of(run(engine(blocks=48), greedy())) and serving.model.accepted
    assert texts_of(run(guessing(engine()), mixed_requests())) == texts_of(run(engine(), mixed_requests()))


@needs_kernels
def test_steps_counted_by_hand():
    """Blocks of 16, a prompt of 5, and 9 new tokens, all guessed rightly.

    The prompt gives token 1 in one step. A step reads token 1 and 4 guesses; then 4 tokens are known already. The next
    reads token 6 and 2 guesses, for of 9 tokens only 3 are missing then. Without guesses that is 9 steps.
    """

    def serving():
        return Engine(PagedLlama(decoder(64, bits=8), block_size=16))

    plain = serving()
    truth = run(plain, [drawing([1, 2, 3, 4, 5], 9)])
    assert plain.steps == 9
    made = guessing(serving(), 4, lambda: Oracle(texts_of(truth)))
    assert texts_of(run(made, [drawing([1, 2, 3, 4, 5], 9)])) == texts_of(truth)
    assert (made.steps, made.model.steps, made.model.drafted, made.model.accepted) == (9, 3, 6, 6)


@needs_kernels
def test_guesses_stay_within_the_block_that_is_there():
    """Blocks of 4 and a prompt of 4: token 1 opens a block, so 3 guesses fit behind it, and 3 behind each further."""
    plain = engine(bits=8)
    truth = run(plain, [drawing([1, 2, 3, 4], 13)])
    made = guessing(engine(bits=8), 16, lambda: Oracle(texts_of(truth)))
    assert texts_of(run(made, [drawing([1, 2, 3, 4], 13)])) == texts_of(truth)
    assert (made.model.steps, made.model.drafted) == (1 + 3, 9)  # 1 + 4 + 4 + 4 tokens


@needs_kernels
def test_nothing_is_guessed_behind_a_token_that_ends_the_text():
    def serving():
        return Engine(PagedLlama(decoder(64, bits=8), block_size=16))

    truth = run(serving(), [drawing([1, 2, 3, 4, 5], 9)])[0]
    stop = truth.new_ids[3]
    assert stop not in truth.new_ids[:3]
    made = guessing(serving(), 8, lambda: Oracle([truth.token_ids]))
    request = run(made, [drawing([1, 2, 3, 4, 5], 9, stop=frozenset([stop]))])[0]
    assert request.end is End.STOP and request.new_ids == truth.new_ids[:4]
    assert made.model.drafted == 2  # the second and the third token, not the one that ends the text


@needs_kernels
def test_a_right_guess_behind_a_wrong_one_is_not_believed():
    """Its logits are those of another text, even where the same token comes at the same place."""
    truth = texts_of(run(engine(bits=8, block_size=16), [drawing([1, 2, 3, 4, 5], 9)]))[0]

    class Once:
        def __init__(self):
            self.left = [[(truth[6] + 1) % 97, *truth[7:10]]]

        def propose(self, token_ids, count):
            return Proposal(self.left.pop()[:count] if self.left else [])

    made = guessing(engine(bits=8, block_size=16), 4, Once)
    assert texts_of(run(made, [drawing([1, 2, 3, 4, 5], 9)])) == [truth]
    assert (made.model.drafted, made.model.accepted, made.model.steps) == (4, 0, 9)


@needs_kernels
@pytest.mark.parametrize("every", [3, 10**9])
def test_preemption_loses_guesses_and_no_token(every):
    def requests():
        return [drawing([5, 6, 7, 8][:n], 12) for n in (4, 4, 4, 3, 2)]

    small = {"bits": 8, "blocks": 16, "block_size": 2, "max_positions": 19}
    truth = texts_of(run(engine(**small | {"blocks": 60}), requests()))
    serving = guessing(engine(**small), proposer=lambda: Oracle(truth, every))
    done = run(serving, requests())
    assert texts_of(done) == truth and sum(r.preemptions for r in done) and serving.model.accepted
    check_blocks(serving.scheduler.pool, [])


@needs_kernels
def test_known_logits_do_not_stand_in_for_lost_keys():
    """Preempted with a guess in hand and readmitted on cached blocks but for the last token: its keys are gone."""
    truth = texts_of(run(engine(bits=8), [drawing([1, 2, 3, 4, 5, 6], 12)]))
    serving = guessing(engine(bits=8), 4, lambda: Oracle(truth))
    request = serving.submit(drawing([1, 2, 3, 4, 5, 6], 12))
    while len(request.token_ids) < 9:  # 8 computed: two full blocks; the ninth was guessed where it was possible
        serving.step()
    serving.model.known[request][0, 8, truth[0][8]] = torch.zeros(97)  # as if a guess had reached into a next block
    serving.scheduler._preempt_last()
    run(serving, [])
    assert [request.token_ids] == truth and request.preemptions == 1


@needs_kernels
def test_a_request_that_is_cancelled_leaves_nothing_behind():
    truth = texts_of(run(engine(bits=8, blocks=48), repeating()))
    serving = guessing(engine(bits=8, blocks=48), proposer=lambda: Oracle(truth))
    others, gone = repeating(), drawing([7, 8, 9] * 4, 20)
    for request in (others[0], gone, *others[1:]):
        serving.submit(request)
    for _ in range(12):
        serving.step()
    serving.cancel(gone)
    run(serving, [])
    assert texts_of(others) == truth[:5] and gone.end is End.CANCELLED
    check_blocks(serving.scheduler.pool, [])
    del request, gone, others
    assert not serving.model.known and not serving.model.proposers


def test_a_negative_number_of_guesses_is_refused():
    with pytest.raises(ValueError, match="draft_tokens must be at least 0; got -1"):
        Lookahead(engine().model, draft_tokens=-1)
