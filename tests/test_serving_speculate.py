"""Several streams drafted for at once get the tokens of each alone."""

import pytest
import torch
from test_serving_engine import LIBRARY, REASON, decoder, mixed_requests

from labutils.decoding.proposers import ModelDraft, NoDraft, PromptLookup, Proposal
from labutils.decoding.speculate import generate_speculative
from labutils.generation.sampling import Sampler
from labutils.serving.paged import PagedLlama
from labutils.serving.speculate import generate_speculative_batch

PROMPTS = [request.token_ids for request in mixed_requests(3, count=4)]


def paged(positions=128, **kind):
    return PagedLlama(decoder(positions, **kind), block_size=4)


def alone(ids, count, **kind):
    return decoder(64, **kind).generate(torch.tensor([ids]), count)[0, len(ids) :].tolist()


class Told:
    """Guesses what it was told, and notes what it was asked."""

    def __init__(self, guesses):
        self.guesses, self.asked = guesses, []

    def propose(self, token_ids, count):
        self.asked.append((len(token_ids), count))
        return Proposal(self.guesses[:count])


@pytest.mark.parametrize("make", [NoDraft, PromptLookup, lambda: ModelDraft(decoder(64))])
def test_each_stream_gets_its_own_text(make):
    made = generate_speculative_batch(paged(), [make() for _ in PROMPTS], PROMPTS, 9, draft_tokens=3)
    assert made.new_ids == [alone(ids, 9) for ids in PROMPTS]
    assert made.steps <= 8 and made.seconds > 0 and made.tokens_per_s == pytest.approx(4 * 8 / made.seconds)


@pytest.mark.skipif(LIBRARY is None, reason=REASON)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_too(bits):
    made = generate_speculative_batch(paged(bits=bits), [PromptLookup() for _ in PROMPTS], PROMPTS, 9, draft_tokens=4)
    lone = decoder(64, bits=bits)
    for ids, new in zip(PROMPTS, made.new_ids, strict=True):
        assert lone.generate(torch.tensor([ids]), 9)[0, len(ids) :].tolist() == new


def test_a_perfect_draft_takes_a_step_for_many_tokens_and_a_bad_one_costs_none():
    right = [alone(ids, 9) for ids in PROMPTS[:2]]
    proposers = [Told(right[0][1:4]), Told([96, 96, 96])]
    made = generate_speculative_batch(paged(), proposers, PROMPTS[:2], 5, draft_tokens=3)
    assert made.new_ids == [ids[:5] for ids in right]
    # one stream: 1 token from the prompt, then 3 guesses and the bonus; the other: four steps of one token
    assert (made.steps, made.accepted, made.drafted) == (4, 3, 3 + 3 + 2 + 1)
    # when all have been read, a guess is asked for at the prompt; then never more than there is room for
    assert [count for _, count in proposers[1].asked] == [1, 3, 2, 1, 0]


def test_a_stop_token_ends_its_stream_only_and_is_kept():
    first = alone(PROMPTS[0], 9)
    stop = first[2]
    made = generate_speculative_batch(
        paged(), [Told(first[1:5]), NoDraft()], PROMPTS[:2], 9, draft_tokens=4, stop=[stop]
    )
    assert made.new_ids[0] == first[: first.index(stop) + 1]
    other = alone(PROMPTS[1], 9)
    assert made.new_ids[1] == (other[: other.index(stop) + 1] if stop in other else other)


def test_one_stream_is_chapter_10_s_loop():
    for draft_tokens in (0, 1, 4):
        made = generate_speculative_batch(paged(), [PromptLookup()], PROMPTS[:1], 12, draft_tokens=draft_tokens)
        ids = torch.tensor(PROMPTS[:1])
        expected = generate_speculative(decoder(64), PromptLookup(), ids, 12, draft_tokens=draft_tokens)
        assert made.new_ids[0] == expected.token_ids[0, ids.shape[1] :].tolist()
        assert (made.steps, made.accepted, made.drafted) == (
            expected.target_steps,
            expected.accepted,
            expected.drafted,
        )


def test_sampled_streams_draw_with_the_sampler():
    def text(seed):
        choose = Sampler(torch.Generator().manual_seed(seed), temperature=2.0)
        options = {"draft_tokens": 2, "choose": choose}
        return generate_speculative_batch(paged(), [PromptLookup()], PROMPTS[:1], 12, **options).new_ids[0]

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("proposers", "prompts", "new", "draft_tokens"),
    [([], [], 1, 0), ([NoDraft()], [[]], 1, 0), ([NoDraft()], [[1], [2]], 1, 0), ([NoDraft()], [[1]], 0, 0)]
    + [([NoDraft()], [[1]], 1, -1)],
)
def test_bad_input_is_one_sentence(proposers, prompts, new, draft_tokens):
    with pytest.raises(ValueError, match="each stream needs a prompt and a proposer"):
        generate_speculative_batch(paged(), proposers, prompts, new, draft_tokens=draft_tokens)


def test_too_little_memory_is_refused():
    with pytest.raises(ValueError, match="must have room"):
        generate_speculative_batch(paged(16), [NoDraft()] * 2, [[1] * 8, [2] * 8], 4, draft_tokens=0)
