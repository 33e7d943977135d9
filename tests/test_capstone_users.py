"""Users within a second: the rule on counts, the search, and a run that is given up."""

import math

import pytest
import torch
from tiny_models import tiny_model

from labutils.capstone.users import (
    THINK_S,
    Crowd,
    Questions,
    allowed_late,
    busiest,
    serve_crowd,
    users_within,
)
from labutils.generation.fast_llama import FastLlama
from labutils.serving.engine import Engine, run_at
from labutils.serving.paged import PagedLlama
from labutils.serving.scheduler import End, Limits, Request


class Paced:
    """A model whose every step takes the same time, by a clock of its own; always the same token."""

    blocks, block_size = 4096, 16

    def __init__(self, step_s):
        self.step_s, self.now = step_s, 0.0

    def __call__(self, step):
        self.now += self.step_s
        return torch.eye(8)[3].expand(sum(chunk.samples for chunk in step.chunks), 8)


@pytest.fixture
def paced(monkeypatch):
    """Time that passes only in the steps and sleeps of the model made last."""
    made, real = [], Engine.__init__
    monkeypatch.setattr("labutils.capstone.users.time.monotonic", lambda: made[-1].now)
    monkeypatch.setattr("labutils.serving.engine.time.sleep", lambda s: setattr(made[-1], "now", made[-1].now + s))
    monkeypatch.setattr(Engine, "__init__", lambda self, m, limits=None: real(self, m, limits, clock=lambda: m.now))

    def make(step_s):
        made.append(Paced(step_s))
        return made[-1]

    return make


@pytest.mark.parametrize(("count", "late"), [(100, 1), (99, 0), (300, 3), (1, 0), (150, 1)])
def test_allowed_late_leaves_99_percent(count, late):
    assert allowed_late(count) == late
    assert (count - late) / count >= 0.99 and (count - late - 1) / count < 0.99


def test_crowd_counts_answers_that_never_came_as_late():
    assert Crowd(5, (0.5,) * 99 + (math.inf,)).served
    assert not Crowd(5, (0.5,) * 98 + (1.5, math.inf)).served
    assert Crowd(5, (1.0,) * 100).served  # at the limit is within it


def test_latencies_of_a_paced_model_by_hand(paced):
    # 4 tokens an answer, 0.1 s a step; one user in 20 s meets nobody: the prompt's step brings the first token
    crowd = serve_crowd(paced(0.1), Questions([[1, 2]], frozenset(), new_tokens=4, fewest=20), 1, running=1, seed=0)
    assert len(crowd.latency_s) == 20 and min(crowd.latency_s) == pytest.approx(0.4)
    assert crowd.served


def test_a_server_that_is_too_slow_fails_and_gives_up_early(paced):
    model = paced(0.1)
    crowd = serve_crowd(model, Questions([[1, 2]], frozenset(), new_tokens=4, fewest=150), 200, running=1, seed=0)
    assert not crowd.served and crowd.latency_s.count(math.inf) > 100
    assert model.now < 150 / (200 / THINK_S)  # it did not wait for the last arrival


def test_one_slot_serves_as_many_as_queueing_theory_allows(paced):
    # service 0.1 s, so at most 10 questions/s = 200 users; batches of 8 serve more
    questions = Questions([[1]], frozenset(), new_tokens=1, fewest=300)
    bracket = users_within(lambda n: serve_crowd(paced(0.1), questions, n, running=1, seed=1), start=50)
    assert 100 <= bracket.served < 200
    many = users_within(lambda n: serve_crowd(paced(0.1), questions, n, running=8, seed=1), start=50)
    assert many.served > 4 * bracket.served


@pytest.mark.parametrize("truth", [1, 7, 70, 1000])
@pytest.mark.parametrize("start", [1, 10, 5000])
def test_search_brackets_the_truth(truth, start):
    bracket = users_within(lambda n: Crowd(n, (0.5 if n <= truth else 2.0,)), start=start)
    assert bracket.served <= truth < bracket.not_served
    assert bracket.not_served <= max(bracket.served + 1, 1.25 * bracket.served)
    assert len(bracket.runs) < 25


def test_search_ends_where_nobody_or_everybody_is_served():
    assert users_within(lambda n: Crowd(n, (2.0,)), start=100).served == 0
    assert users_within(lambda n: Crowd(n, (0.1,)), start=100, most=1000).served == 1000


def test_run_at_keeps_the_arrival_and_cancels_what_is_given_up(paced):
    model = paced(0.5)
    engine = Engine(model, Limits(max_running=1))
    requests = [Request([1], 2) for _ in range(3)]
    done = run_at(engine, requests, [0.0, 0.1, 50.0], give_up=lambda outputs: model.now > 1.2)
    assert [r.end for r in done] == [End.LENGTH, End.CANCELLED, None]
    assert done[1].arrival_s == 0.1 and engine.scheduler.pool.available == model.blocks


def test_a_real_model_answers_a_crowd_as_it_answers_one():
    paged = PagedLlama(FastLlama(tiny_model("llama-gqa-tied"), max_length=512), block_size=16)
    questions = Questions([[5, 6, 7], [9, 8]], frozenset(), new_tokens=5, duration_s=1.5, fewest=20)
    crowd = serve_crowd(paged, questions, 2000, running=8, seed=0)
    assert len(crowd.latency_s) == 150 and busiest(paged, questions, running=8) >= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: serve_crowd(Paced(1), Questions([[1]], frozenset()), 0, running=1, seed=0),
            "users must be at least 1; got 0",
        ),
        (lambda: Questions([], frozenset()), "a run needs prompts"),
        (lambda: Questions([[1]], frozenset(), duration_s=1.0), "more than 1.0 s; got .* 1.0$"),
        (lambda: users_within(lambda n: None, start=0), "start must be at least 1"),
        (lambda: users_within(lambda n: None, start=1, factor=1), "factor above 1; got 1 and 1"),
    ],
)
def test_bad_input_is_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
