"""Techniques side by side: equal answers where they must be, rounds by hand, pairs kept."""

import pytest
from tiny_models import tiny_model

from labutils.applications.tasks import Task
from labutils.capstone.techniques import Technique, Written, compare, guessing, library, plain, voting
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.load import LanguageModel

PROMPTS = [[5, 6, 7, 5, 6], [9, 8, 9, 8], [3, 3, 3]]


def text_of(ids):
    return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa-tied")


def test_all_greedy_ways_write_what_transformers_writes(model):
    ways = {
        "plain": plain(FastLlama(model, max_length=64), text_of, {96}),
        "guessing": guessing(FastLlama(model, max_length=64), text_of, {96}, draft_tokens=3),
    }
    theirs = library(LanguageModel(model, None), text_of, {96})
    for prompt in PROMPTS:
        expected = theirs(prompt, 12)
        for name, write in ways.items():
            written = write(prompt, 12)
            assert (written.text, written.tokens) == (expected.text, expected.tokens), name
            assert written.seconds > 0


def test_a_stop_token_is_counted_and_not_shown(model):
    made = plain(FastLlama(model, max_length=64), text_of, set())(PROMPTS[1], 8).text.split()
    stop = next((token for token in made if token != made[0]), made[0])
    count = made.index(stop)
    decoder = FastLlama(model, max_length=64)
    for write in (
        plain(decoder, text_of, {int(stop)}),
        guessing(decoder, text_of, {int(stop)}, draft_tokens=2),
        library(LanguageModel(model, None), text_of, {int(stop)}),
    ):
        written = write(PROMPTS[1], 8)
        assert (written.tokens, written.text) == (count + 1, " ".join(made[:count]))


def test_vote_gives_the_most_frequent_answer(model):
    decoder = FastLlama(model, max_length=64)
    greedy_text = plain(decoder, text_of, set())(PROMPTS[0], 4).text
    cold = voting(decoder, text_of, set(), votes=3, temperature=1e-3, seed=0)(PROMPTS[0], 4)
    assert cold.text == greedy_text and cold.tokens == 12  # three answers were made to give one


def fake(name, seconds, texts):
    def write(prompt, new_tokens):
        return Written(texts[prompt[0]], 10, seconds[prompt[0]])

    return Technique(name, "fake", write, document_bits=((80.0, 40), (20.0, 10)))


def test_compare_by_hand():
    texts, right = [str(i) for i in range(10)], ["0", "x"] * 5
    task = Task("echo", [[i] for i in range(10)], texts)
    records = compare(
        [fake("a", [1.0] * 5 + [2.0] * 5, texts), fake("b", [1.0] * 10, right)], task, model="m", chapter="13", rounds=5
    )
    # round 0 holds requests 0 and 5: 20 tokens in 3 s
    assert records[0].samples == pytest.approx((20 / 3,) * 5) and records[0].answer_s == pytest.approx((1.5,) * 5)
    assert records[0].task_score == 1.0 and records[1].task_scores == (1.0,) + (0.0,) * 9
    assert records[0].bits_per_byte == 2.0 and records[0].prompt_tokens == 1 and records[0].family == "fake"


def test_every_request_is_served_by_all_before_the_next():
    order = []

    def way(name):
        def write(prompt, new_tokens):
            order.append((prompt[0], name))
            return Written("", 1, 1.0)

        return Technique(name, "fake", write)

    compare([way("a"), way("b")], Task("t", [[i] for i in range(6)], [""] * 6), model="m", chapter="13", rounds=5)
    assert order[2:6] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]  # after the warm-up of both


@pytest.mark.parametrize(("count", "rounds"), [(4, 5), (10, 4), (10, 11)])
def test_too_few_rounds_or_requests_are_refused(count, rounds):
    with pytest.raises(ValueError, match=f"needs a technique, 5 rounds.* got 1, {rounds} and {count}"):
        compare([fake("a", [], [])], Task("t", [[0]] * count, [""] * count), model="m", chapter="13", rounds=rounds)
    with pytest.raises(ValueError, match="got 0"):
        compare([], Task("t", [[0]] * 9, [""] * 9), model="m", chapter="13")


def test_the_same_seed_gives_the_same_vote(model):
    texts = [
        voting(FastLlama(model, max_length=64), text_of, set(), votes=1, temperature=1.0, seed=seed)(PROMPTS[1], 8).text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]
