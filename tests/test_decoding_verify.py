"""The verifier: scripted logits token by token, and the law of what comes out, summed exactly over every draft."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch.testing import assert_close

from labutils.decoding import verify as module
from labutils.decoding.verify import Verdict, acceptance_probs, residual, verify
from labutils.generation.sampling import Sampler, greedy
from labutils.lab.models.drafting_text import text_prompts
from labutils.lab.models.load import load_model

VOCAB = 5
SAMPLERS = {"plain": {}, "hot": {"temperature": 1.7}, "cool, top-p": {"temperature": 0.7, "top_p": 0.8}}


def sampler(seed=0, **settings):
    return Sampler(torch.Generator().manual_seed(seed), **settings)


def scripted(*tokens):
    """Logits that leave no doubt: +50 for the wanted token of each row, -50 for the others."""
    return torch.full((len(tokens), VOCAB), -50.0).scatter(1, torch.tensor(tokens)[:, None], 50.0)


@pytest.mark.parametrize("choose", [greedy, sampler()], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("wanted", "drafted", "verdict"),
    [
        ([3], [], Verdict(0, 3)),
        ([3, 1, 2], [3, 1], Verdict(2, 2)),
        ([3, 1, 2], [3, 4], Verdict(1, 1)),
        ([3, 1, 2], [0, 1], Verdict(0, 3)),
        ([3, 1, 2, 0], [3, 4, 2], Verdict(1, 1)),  # a token behind the first wrong one never counts
        ([4, 4, 4, 4, 4], [4, 4, 4, 4], Verdict(4, 4)),
    ],
)
def test_scripted_logits_token_by_token(choose, wanted, drafted, verdict):
    assert verify(scripted(*wanted), drafted, choose=choose) == verdict
    assert verify(scripted(*wanted), drafted, torch.full((len(drafted), VOCAB), 0.2), choose=choose) == verdict


def test_acceptance_and_residual_by_hand():
    target, draft = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.6, 0.1, 0.3]])
    assert_close(acceptance_probs(target, [0], draft), torch.tensor([5 / 6]).double())
    assert_close(acceptance_probs(target, [1], draft), torch.tensor([1.0]).double())
    assert_close(acceptance_probs(target, [2]), torch.tensor([0.2]).double())
    assert_close(residual(target[0], draft[0]), torch.tensor([0.0, 1.0, 0.0]))
    assert_close(residual(target[0], 1), torch.tensor([5 / 7, 0.0, 2 / 7]))
    assert_close(residual(target[0], target[0]), target[0])


class Toy:
    """A language model of five tokens whose next-token logits depend on the whole text, as a table at random."""

    def __init__(self, seed, *, like=None, noise=2.0):
        self.seed, self.like, self.noise = seed, like, noise

    def __call__(self, text):
        made = torch.Generator().manual_seed(hash((self.seed, *text)) % 2**31)
        logits = self.noise * torch.randn(VOCAB, generator=made)
        return logits if self.like is None else logits + self.like(text)


def law_of_verdicts(monkeypatch, logits, drafted, draft_probs, choose):
    """{verdict: probability} of the real `verify`: every way its coins can fall, weighed exactly.

    The coins are scripted: to fall just below and just above what `acceptance_probs` says, which proves that number;
    the distribution of the token that follows is caught on its way to the draw.
    """
    law, caught = {}, []
    keep = acceptance_probs(choose.probs(logits)[:-1], drafted, draft_probs).tolist()
    monkeypatch.setattr(module, "_draw", lambda probs, generator: caught.append(probs) or 0)
    for fall in range(len(drafted) + 1):
        if fall < len(drafted) and keep[fall] == 1:
            continue
        coins = iter([max(k - 1e-9, 0.0) for k in keep[:fall]] + ([keep[fall] + 1e-9] if fall < len(drafted) else []))
        if any(k == 0 for k in keep[:fall]):
            continue
        monkeypatch.setattr(torch, "rand", lambda *a, coins=coins, **k: torch.tensor(next(coins), dtype=torch.float64))
        assert verify(logits, drafted, draft_probs, choose=choose).accepted == fall
        monkeypatch.undo()
        monkeypatch.setattr(module, "_draw", lambda probs, generator: caught.append(probs) or 0)
        weight = torch.tensor(keep[:fall]).prod().item() * (1 - keep[fall] if fall < len(drafted) else 1)
        for token, probability in enumerate(caught[-1].tolist()):
            law[Verdict(fall, token)] = law.get(Verdict(fall, token), 0) + weight * probability
    monkeypatch.undo()
    return law


def law_of_text(monkeypatch, target, draft, target_settings, draft_settings, count, sure):
    """The law of the first `count` + 1 tokens that drafting and verifying make, by summing over every draft."""
    p, q = sampler(**target_settings), sampler(**draft_settings)
    law = torch.zeros([VOCAB] * (count + 1), dtype=torch.float64)
    alone = functools.cache(lambda text, more: law_alone(target, p, text, more))
    for drafted in itertools.product(range(VOCAB), repeat=count):
        rows = torch.stack([draft(drafted[:i]) for i in range(count)])
        probs = q.probs(rows)
        chance = 1.0 if sure else probs[range(count), list(drafted)].double().prod().item()
        if chance == 0 or (sure and list(drafted) != rows.argmax(1).tolist()):
            continue
        logits = torch.stack([target(drafted[:i]) for i in range(count + 1)])
        verdicts = law_of_verdicts(monkeypatch, logits, list(drafted), None if sure else probs, p)
        for verdict, probability in verdicts.items():
            text = (*drafted[: verdict.accepted], verdict.token)
            law[text] += chance * probability * alone(text, count + 1 - len(text))
    return law


def law_alone(target, p, text, more):
    """The law of the next tokens when the target goes on alone; a number 1 where there are none."""
    if more == 0:
        return torch.ones((), dtype=torch.float64)
    first = p.probs(target(text)[None])[0].double()
    return torch.stack([first[token] * law_alone(target, p, (*text, token), more - 1) for token in range(VOCAB)])


@pytest.mark.parametrize(
    ("target_settings", "draft_settings"),
    [("plain", "plain"), ("plain", "cool, top-p"), ("cool, top-p", "hot"), ("cool, top-p", "cool, top-p")],
)
@pytest.mark.parametrize("sure", [False, True], ids=["sampled draft", "sure draft"])
def test_the_law_of_the_text_is_exactly_the_targets(monkeypatch, target_settings, draft_settings, sure):
    target, its = Toy(1), SAMPLERS[target_settings]
    expected = law_alone(target, sampler(**its), (), 3)
    for draft in (Toy(2, like=target, noise=0.5), Toy(3, noise=4.0)):  # a good one, and a bad one
        law = law_of_text(monkeypatch, target, draft, its, SAMPLERS[draft_settings], 2, sure)
        assert_close(law, expected, atol=1e-6, rtol=0)


def g_test(counts, probs):
    """P-value of Σ 2 O ln(O / E), categories with an expectation below 5 taken together."""
    expected = probs * counts.sum()
    rare = expected < 5
    groups = [(counts[~rare], expected[~rare])]
    groups += [(counts[rare].sum()[None], expected[rare].sum()[None])] * bool(rare.any())
    o, e = (torch.cat(parts) for parts in zip(*groups, strict=True))
    assert not o[e == 0].any(), "a token came out that has no probability"
    o, e = o[e > 0], e[e > 0]
    g = 2 * (o[o > 0] * (o[o > 0] / e[o > 0]).log()).sum().item()
    return chi2.sf(g, len(e) - 1)


def first_tokens(judge, target_probs, draft_probs, draws):
    p = sampler()
    logits = torch.stack([target_probs.log(), torch.zeros_like(target_probs)])
    tokens = [judge(logits, draft_probs, p) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=len(target_probs)).double()


def judged(logits, drafted, draft_probs, p):
    verdict = verify(logits, [drafted], draft_probs[None], choose=p)
    return drafted if verdict.accepted else verdict.token


def drawn_and_judged(logits, draft_probs, p):
    return judged(logits, int(torch.multinomial(draft_probs, 1, generator=p.generator)), draft_probs, p)


def favourite_judged_by_full_q(logits, draft_probs, p):  # transformers#32867
    return judged(logits, int(draft_probs.argmax()), draft_probs, p)


def test_draws_pass_a_g_test_and_a_favourite_judged_by_the_full_q_fails_it():
    target = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    draft = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.2])
    assert g_test(first_tokens(drawn_and_judged, target, draft, 1500), target) > 0.001
    assert g_test(first_tokens(favourite_judged_by_full_q, target, draft, 1500), target) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("place", [40, 90, 170])
def test_draws_on_real_contexts_pass_the_g_test_too(place):
    """LabLM-small drafts for LabLM at places of held-out code where both hesitate, with temperature and top-p."""
    (target, tokenizer), draft = load_model("lablm"), load_model("lablm-small").model
    text = text_prompts("code", tokenizer, 1)[0]
    laws = sampler(temperature=0.8, top_p=0.95)
    with torch.no_grad():
        p, q = (laws.probs(model(text).logits[0]) for model in (target, draft))
    hesitates = torch.where((p.amax(-1) < 0.6) & (q.amax(-1) < 0.6))[0]
    place = hesitates[hesitates >= place][0]
    assert 0.2 < torch.minimum(p[place], q[place]).sum() < 0.95
    assert g_test(first_tokens(drawn_and_judged, p[place], q[place], 2000), p[place].double()) > 0.001
    assert g_test(first_tokens(favourite_judged_by_full_q, p[place], q[place], 2000), p[place].double()) < 1e-6


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.3, 3.0), st.one_of(st.none(), st.floats(0.1, 1.0)))
def test_a_draft_equal_to_the_target_always_stands(seed, temperature, top_p):
    p = sampler(seed, temperature=temperature, top_p=top_p)
    logits = 3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(seed))
    probs = p.probs(logits)
    drafted = torch.multinomial(probs[:3], 1, generator=p.generator)[:, 0].tolist()
    assert verify(logits, drafted, probs[:3], choose=p).accepted == 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_a_filtered_token_never_comes_out(seed):
    p = sampler(seed, top_p=0.5)
    logits = 2 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(seed))
    drafted = [seed % VOCAB, seed // VOCAB % VOCAB]
    verdict = verify(logits, drafted, choose=p)
    for place, token in enumerate([*drafted[: verdict.accepted], verdict.token]):
        assert p.probs(logits)[place, token] > 0


def test_verify_bad_input_states_the_rule():
    with pytest.raises(ValueError, match="2 drafted tokens need one more row .* got 2 and None rows"):
        verify(scripted(1, 2), [1, 2])
    with pytest.raises(ValueError, match="as many of draft_probs; got 3 and 1 rows"):
        verify(scripted(1, 2, 3), [1, 2], torch.full((1, VOCAB), 0.2))
    with pytest.raises(ValueError, match=r"above 0; got \[0.0\]"):
        verify(scripted(1, 2), [1], torch.eye(VOCAB)[:1], choose=sampler())
