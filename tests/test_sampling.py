"""Sampling equals transformers' warpers, alone and in order, and draws what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from labutils.generation.sampling import Sampler, apply_temperature, greedy, keep_top_k, keep_top_p

seeds = st.integers(0, 2**31)


def random_logits(seed: int, *, batch: int = 3, vocab: int = 17, tied: bool = False) -> torch.Tensor:
    logits = 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.round() if tied else logits


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert keep_top_k(logits, 2).exp().tolist()[0][2:] == [0.0, 0.0]
    assert (keep_top_p(logits, 0.7).exp() > 0).tolist() == [[True, True, False, False]]
    assert (keep_top_p(logits, 0.8).exp() > 0).tolist() == [[True, True, True, False]]
    assert apply_temperature(torch.tensor([[3.0]]), 0.5).tolist() == [[6.0]]


def test_greedy_by_hand():
    assert greedy(torch.tensor([[1.0, 3.0, 3.0], [5.0, 4.0, 0.0]])).tolist() == [1, 0]
    assert greedy(torch.tensor([[1.0, float("-inf")]])).tolist() == [0]
    with pytest.raises(ValueError, match="got NaN"):  # PyTorch's argmax takes it for the largest
        greedy(torch.tensor([[0.0, 1.0], [3.0, float("nan")]]))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 30), st.booleans())
def test_top_k_equals_transformers(seed, k, tied):
    logits = random_logits(seed, tied=tied)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.01, 1.0), st.booleans())
def test_top_p_equals_transformers(seed, p, tied):
    logits = random_logits(seed, tied=tied)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.1, 5), st.integers(1, 17), st.floats(0.1, 1.0))
def test_sampler_applies_temperature_then_top_k_then_top_p(seed, temperature, k, p):
    logits = random_logits(seed)
    expected = logits
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        expected = warper(None, expected)
    probs = Sampler(torch.Generator(), temperature=temperature, top_k=k, top_p=p).probs(logits)
    assert torch.equal(probs, expected.softmax(-1))


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, p):
    logits = random_logits(seed, batch=1)[0].double()
    probs, kept = logits.softmax(-1), keep_top_p(logits[None], p)[0] > -torch.inf
    assert probs[kept].sum() >= p - 1e-9
    assert probs[kept].sum() - probs[kept].min() < p + 1e-9
    assert not kept.all() or probs.min() > 0


def test_sampler_draws_with_the_probabilities_it_reports():
    sampler = Sampler(torch.Generator().manual_seed(0), temperature=0.7, top_k=4, top_p=0.95)
    logits = random_logits(5, batch=1)
    counts = torch.bincount(sampler(logits.expand(20_000, -1)), minlength=17)
    probs = sampler.probs(logits)[0]
    assert counts[probs == 0].sum() == 0
    expected = 20_000 * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 99.9% quantile with 3 degrees of freedom
    assert (probs > 0).sum() <= 4


def test_sampler_repeats_itself_with_the_same_seed_only():
    logits = random_logits(1, batch=50)
    first, second, other = (Sampler(torch.Generator().manual_seed(s))(logits) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda x: apply_temperature(x, 0), "positive .* got 0"),
        (lambda x: keep_top_k(x, 0), "at least 1; got 0"),
        (lambda x: keep_top_p(x, 0.0), r"\(0, 1\]; got 0.0"),
        (lambda x: keep_top_p(x, 1.5), r"\(0, 1\]; got 1.5"),
    ],
)
def test_sampling_bad_input_states_the_rule(call, rule):
    with pytest.raises(ValueError, match=rule):
        call(random_logits(0))
