"""The checks of generation loops name the mistake whatever the learner's model writes, even always the same token."""

from pathlib import Path

import pytest
import torch
from lanes import read_wrong_answers
from tiny_models import random_ids, tiny_model

from labutils.course.checks import CheckFailed, ch01
from labutils.course.checks.passes import generation_cases, watched
from labutils.generation.cache import KVCache
from labutils.generation.decode import decode_one_token, generate_cached, generate_naive, prefill

ANSWERS = read_wrong_answers(Path(__file__).parent / "wrong_answers" / "01_how_generation_works.py")
LOOPS = [answer for answer in ANSWERS if answer.exercise in {"greedy_naive", "greedy_cached"}]
GREEDY = {"greedy_naive": generate_naive, "greedy_cached": generate_cached}
NAMES = {"torch": torch, "KVCache": KVCache, "prefill": prefill, "decode_one_token": decode_one_token}


@pytest.fixture(scope="module", params=[0.02, 0.08], ids=["repeats itself", "varied"])
def model(request):
    return tiny_model("llama-gqa-tied", std=request.param)


@pytest.mark.parametrize("wrong", LOOPS, ids=lambda answer: f"{answer.exercise}: {answer.words}")
def test_check_of_a_loop_names_the_mistake_on_any_model(model, wrong):
    namespace = dict(NAMES)
    exec(wrong.source, namespace)
    with pytest.raises(CheckFailed) as caught:
        getattr(ch01, wrong.exercise)(namespace[wrong.exercise], model, random_ids(12))
    assert wrong.words in caught.value.hint


def right(name):
    """The course's own loop, with the exercise's argument names."""
    return lambda model, token_ids, new_tokens: GREEDY[name](model, token_ids, new_tokens)


def test_check_of_a_loop_lets_a_right_answer_pass(model, capsys):
    ch01.greedy_naive(right("greedy_naive"), model, random_ids(12))
    ch01.greedy_cached(right("greedy_cached"), model, random_ids(12))
    assert capsys.readouterr().out == "✓ 1.4 greedy_naive\n✓ 1.6 greedy_cached\n"


def test_check_of_greedy_naive_does_not_stop_at_an_end_token(model):
    ids = random_ids(12)
    model.generation_config.eos_token_id = int(generate_naive(model, ids, 2)[0, -1])
    try:
        ch01.greedy_naive(right("greedy_naive"), model, ids)
    finally:
        model.generation_config.eos_token_id = None


def test_generation_cases_are_the_same_each_time_and_leave_the_seed_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again = (generation_cases("model", torch.tensor([[7]]), new_tokens=2) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [case()["token_ids"].shape for case in first] == [(1, 1), (1, 6), (1, 6)]
    for one, other in zip(first[1:], again[1:], strict=True):
        assert torch.equal(one()["token_ids"], other()["token_ids"])
        weights = (case()["model"].state_dict().values() for case in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_watched_lists_what_each_pass_read():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(5)
    tokens, read, held, first = watched(generate_cached, model=model, token_ids=ids, new_tokens=3)
    assert (read, held) == ([5, 1, 1], [0, 5, 6])
    assert first == [tokens[0][0], *tokens[0][5:7]]
    assert tokens == generate_naive(model, ids, 3).tolist()
    assert not model._forward_pre_hooks
