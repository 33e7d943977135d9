"""A draft's acceptance: by hand, beside total variation, and beside speculative sampling played out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.distillation.acceptance import acceptance_rate, greedy_agreement, tokens_per_target_step
from labutils.distillation.divergences import total_variation


def logits(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_acceptance_rate_by_hand():
    draft, target = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    torch.testing.assert_close(acceptance_rate(draft, target), torch.tensor([0.6, 1.0]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_acceptance_rate_is_one_minus_total_variation_whichever_drafts(seed):
    draft, target = logits(seed, 4, 7), logits(seed + 1, 4, 7)
    kept = acceptance_rate(draft.softmax(-1), target.softmax(-1))
    torch.testing.assert_close(kept, 1 - total_variation(draft, target))
    torch.testing.assert_close(kept, acceptance_rate(target.softmax(-1), draft.softmax(-1)))


def test_acceptance_rate_follows_speculative_sampling_played_out():
    draft, target, coin = logits(0, 5).softmax(-1), logits(1, 5).softmax(-1), torch.Generator().manual_seed(2)
    tokens = torch.multinomial(draft, 20_000, replacement=True, generator=coin)
    kept = torch.rand(20_000, generator=coin) < target[tokens] / draft[tokens]
    assert kept.float().mean().item() == pytest.approx(acceptance_rate(draft, target).item(), abs=0.015)


def test_greedy_agreement_by_hand():
    draft, target = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    assert greedy_agreement(draft, target).tolist() == [True, False]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_tokens_per_target_step_follows_the_closed_form(rate):
    assert tokens_per_target_step(rate, draft_tokens=4) == pytest.approx((1 - rate**5) / (1 - rate))


def test_tokens_per_target_step_at_its_ends_and_beyond():
    assert tokens_per_target_step(1.0, draft_tokens=4) == 5.0
    with pytest.raises(ValueError, match=r"must lie in 0 to 1 .* got 1.2, 4"):
        tokens_per_target_step(1.2, draft_tokens=4)
    with pytest.raises(ValueError, match="got 0.5, 0"):
        tokens_per_target_step(0.5, draft_tokens=0)
