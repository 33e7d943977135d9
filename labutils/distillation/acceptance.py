"""How good a draft a student is: the share of its tokens that the teacher, checking them, would keep."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Probs = Float[Tensor, "*positions vocab"]


def acceptance_rate(draft_probs: Probs, target_probs: Probs) -> Float[Tensor, "*positions"]:
    """Σ min(draft, target) at each position: how often speculative sampling keeps a token drawn from the draft.

    A drawn token y is kept with probability min(1, target(y) ÷ draft(y)); on average over the draft that is one minus
    the total variation (Leviathan et al. 2022, arXiv:2211.17192, corollary 3.6).

    >>> acceptance_rate(torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5]))
    tensor(0.6000)
    """
    return torch.minimum(draft_probs, target_probs).sum(dim=-1)


def greedy_agreement(draft_probs: Probs, target_probs: Probs) -> Bool[Tensor, "*positions"]:
    """Whether both have one favourite: what is kept when the target takes its likeliest token (temperature 0).

    >>> greedy_agreement(torch.tensor([0.9, 0.1]), torch.tensor([0.6, 0.4]))
    tensor(True)
    """
    return draft_probs.argmax(dim=-1) == target_probs.argmax(dim=-1)


def tokens_per_target_step(acceptance: float, *, draft_tokens: int) -> float:
    """(1 − α^(γ+1)) ÷ (1 − α): expected tokens of one step of the target that checks γ drafted ones (equation 1).

    Raises:
        ValueError: when the acceptance is not in 0 … 1, or no token is drafted.

    >>> tokens_per_target_step(0.5, draft_tokens=2)
    1.75
    """
    if not 0 <= acceptance <= 1 or draft_tokens < 1:
        raise ValueError(
            f"acceptance must lie in 0 to 1 and draft_tokens be 1 or more; got {acceptance}, {draft_tokens}"
        )
    return sum(acceptance**n for n in range(draft_tokens + 1))
