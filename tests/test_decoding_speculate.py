"""The loop: the same text as plain decoding whatever is proposed, with every cache, and one set of metrics."""

import copy
import math

import pytest
import torch
from shapes import unchecked
from tiny_models import random_ids, tiny_model

from labutils.decoding.proposers import ModelDraft, NoDraft, PromptLookup, Proposal, SuffixAutomaton
from labutils.decoding.speculate import generate_speculative
from labutils.decoding.target import ModelTarget
from labutils.generation.cache import CompiledKVCache, KVCache, StaticKVCache
from labutils.generation.decode import forward_logits, generate_naive
from labutils.generation.fast_llama import FastLlama

MODEL = tiny_model("llama-untied-bias")
PROMPT = random_ids(9)
PLAIN = generate_naive(MODEL, PROMPT, 16)
TARGETS = {
    "growing": lambda: ModelTarget(MODEL, KVCache()),
    "static": lambda: ModelTarget(MODEL, StaticKVCache(MODEL.config, max_length=40)),
    "compiled": lambda: ModelTarget(MODEL, CompiledKVCache(MODEL.config, max_length=40)),
    "fast": lambda: FastLlama(MODEL, max_length=40),
}


class Scripted:
    """Proposes the tokens that will come, the first `right` of each draft true and the others false."""

    def __init__(self, right):
        self.right = right

    def propose(self, token_ids, count):
        truth = PLAIN[0, len(token_ids) : len(token_ids) + count].tolist()
        return Proposal([t if i < self.right else (t + 1) % 97 for i, t in enumerate(truth)])


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param]()


@pytest.mark.parametrize("right", [0, 2, 4], ids=["none", "some", "all"])
def test_the_text_is_the_targets_own_whether_none_some_or_all_stand(target, right):
    done = generate_speculative(target, Scripted(right), PROMPT, 16, draft_tokens=4)
    assert torch.equal(done.token_ids, PLAIN)
    per_step = right + 1
    assert done.target_steps == math.ceil(15 / per_step)
    assert done.accepted == 15 - done.target_steps if right else done.accepted == 0
    assert done.tokens_per_step == 15 / done.target_steps
    assert done.acceptance == (1.0 if right == 4 else pytest.approx(done.accepted / done.judged))
    assert target.length == 9 + 16 - 1  # the last token is never read
    assert torch.equal(generate_speculative(target, Scripted(1), PROMPT, 16, draft_tokens=4).token_ids, PLAIN)


@pytest.mark.parametrize("proposer", [NoDraft(), PromptLookup(shortest=1), SuffixAutomaton(shortest=1)])
def test_free_proposers_change_nothing(target, proposer):
    assert torch.equal(generate_speculative(target, proposer, PROMPT, 16, draft_tokens=5).token_ids, PLAIN)


def test_a_draft_equal_to_the_target_always_stands_and_another_seldom(target):
    same = ModelDraft(ModelTarget(MODEL))
    other = ModelDraft(ModelTarget(tiny_model("llama-untied-bias", seed=5)))
    for draft, low, high in ((same, 1.0, 1.0), (other, 0.0, 0.2)):
        done = generate_speculative(target, draft, PROMPT, 16, draft_tokens=3)
        assert torch.equal(done.token_ids, PLAIN)
        assert low <= done.acceptance <= high


def test_cache_after_rewind_equals_never_having_been_there(target):
    target.prefill(PROMPT)
    expected = forward_logits(MODEL, PLAIN[:, :14])[0]
    target.extend([1, 2, 3])
    target.rewind(3)
    torch.testing.assert_close(target.extend(PLAIN[0, 9:12].tolist()), expected[9:12], atol=1e-4, rtol=0)
    target.rewind(0)
    torch.testing.assert_close(target.extend(PLAIN[0, 12:14].tolist()), expected[12:14], atol=1e-4, rtol=0)
    for count in (15, -1):
        with pytest.raises(ValueError, match=rf"rewound by 0\.\.14 positions; got {count}"):
            target.rewind(count)
    assert target.length == 14


def test_stop_tokens_end_the_text_wherever_they_fall(target):
    for stop in {int(PLAIN[0, 9]), int(PLAIN[0, 12]), int(PLAIN[0, 13])}:
        end = PLAIN[0, 9:].tolist().index(stop) + 10
        done = generate_speculative(target, Scripted(4), PROMPT, 16, draft_tokens=4, stop=[stop])
        assert torch.equal(done.token_ids, PLAIN[:, :end])


def test_max_new_tokens_is_never_exceeded(target):
    for count in range(1, 8):
        done = generate_speculative(target, Scripted(4), PROMPT, count, draft_tokens=4)
        assert torch.equal(done.token_ids, PLAIN[:, : 9 + count])
        assert target.length == 9 + count - 1


def test_a_text_may_fill_the_cache_to_the_last_position_and_no_further():
    for name in ("static", "fast"):
        target = TARGETS[name]()
        done = generate_speculative(target, Scripted(4), PROMPT, 16, draft_tokens=4)
        target.rewind(2)
        with pytest.raises(ValueError, match="max_length=40 positions; got 41"):
            generate_speculative(target, NoDraft(), PROMPT, 33, draft_tokens=0)
        assert target.length == 22  # nothing was touched
        assert generate_speculative(target, NoDraft(), PROMPT, 32, draft_tokens=4).token_ids.shape == (1, 41)
        assert torch.equal(done.token_ids, PLAIN)


@pytest.mark.parametrize(
    ("prompt", "settings", "rule"),
    [
        (PROMPT[:, :0], {}, r"one prompt of at least one token; got \(1, 0\)"),
        (PROMPT.expand(2, -1), {}, r"got \(2, 9\)"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        (PROMPT, {"draft_tokens": -1}, "draft_tokens must be at least 0; got -1"),
    ],
)
def test_bad_input_states_the_rule(prompt, settings, rule):
    with unchecked(), pytest.raises(ValueError, match=rule):
        generate_speculative(
            ModelTarget(MODEL), NoDraft(), prompt, **({"max_new_tokens": 4, "draft_tokens": 2} | settings)
        )


def test_a_proposer_that_returns_too_much_is_refused():
    class Eager:
        def propose(self, token_ids, count):
            return Proposal([1] * (count + 1))

    with pytest.raises(ValueError, match="at most 2 tokens; got 3"):
        generate_speculative(ModelTarget(MODEL), Eager(), PROMPT, 8, draft_tokens=2)


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 1.0, 1.0), (0.02, 0.1, 0.95), (1.0, 0.0, 0.3)])
def test_transformers_assisted_decoding_takes_as_many_steps_to_the_same_text(noise, low, high):
    assistant, generator = copy.deepcopy(MODEL), torch.Generator().manual_seed(0)
    for parameter in assistant.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    done = generate_speculative(ModelTarget(MODEL), ModelDraft(ModelTarget(assistant)), PROMPT, 17, draft_tokens=3)
    # `generate` reads the assistant's settings from the assistant, not from its own arguments
    assistant.generation_config.update(
        num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    calls = []
    hook = MODEL.register_forward_hook(lambda *_: calls.append(1))
    try:  # its first step drafts at once; ours first reads the prompt, and that makes a token
        prompt = done.token_ids[:, : PROMPT.shape[1] + 1]
        settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
        theirs = MODEL.generate(prompt, **settings, assistant_model=assistant)
    finally:
        hook.remove()
    assert torch.equal(theirs, done.token_ids)
    assert len(calls) == done.target_steps
    assert low <= done.acceptance <= high
