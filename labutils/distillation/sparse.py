"""A teacher's distribution in a few numbers: its k likeliest tokens and the rest, or k tokens drawn from it.

Stored in full, a vocabulary of 128,000 takes 256 kB a token. The k likeliest alone, rescaled to 1, teach a student that
nothing else exists. Two cures: one bucket for the rest, or tokens *drawn* from the teacher, whose counts are right on
average (Anshumann et al. 2025, arXiv:2503.16870).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

TINY = 1e-7


@dataclass(frozen=True)
class SparseTargets:
    """k token ids at each position and what the teacher gives them; what is missing to 1 belongs to all others."""

    ids: Int[Tensor, "*positions k"]
    probs: Float[Tensor, "*positions k"]

    def to(self, device: torch.device | str) -> "SparseTargets":
        """The same on another device."""
        return SparseTargets(self.ids.to(device), self.probs.to(device))

    def rescaled(self) -> "SparseTargets":
        """Summing to 1: what forgets the rest of the vocabulary."""
        return SparseTargets(self.ids, self.probs / self.probs.sum(dim=-1, keepdim=True))


def top_k(teacher_logits: Float[Tensor, "*positions vocab"], k: int) -> SparseTargets:
    """The k likeliest tokens with their own probabilities, not rescaled.

    Raises:
        ValueError: when k is not in 1 … vocab.

    >>> top_k(torch.tensor([0.5, 0.3, 0.2]).log(), 2).ids.tolist()
    [0, 1]
    """
    if not 1 <= k <= teacher_logits.shape[-1]:
        raise ValueError(f"k must lie in 1 to the vocabulary's {teacher_logits.shape[-1]}; got {k}")
    probs, ids = softmax(teacher_logits.float(), dim=-1).topk(k, dim=-1)
    return SparseTargets(ids, probs)


def drawn(
    teacher_logits: Float[Tensor, "*positions vocab"], draws: int, *, generator: torch.Generator
) -> SparseTargets:
    """`draws` tokens drawn from the teacher, each worth 1 ÷ draws: a token drawn twice stands there twice.

    The expectation of the loss, and of its gradient, is that of the whole distribution.

    Raises:
        ValueError: when draws is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}")
    probs = softmax(teacher_logits.float(), dim=-1)
    ids = torch.multinomial(probs.flatten(0, -2), draws, replacement=True, generator=generator)
    ids = ids.view(*probs.shape[:-1], draws)
    return SparseTargets(ids, torch.full(ids.shape, 1 / draws, device=ids.device))


def sparse_cross_entropy(
    student_logits: Float[Tensor, "*positions vocab"], targets: SparseTargets
) -> Float[Tensor, "*positions"]:
    """−Σ p_T ln p_S over the stored tokens, and the rest of both sides as one bucket more.

    Where the stored probabilities sum to 1 (drawn, or rescaled) there is no rest. The gradient is the forward KL's: the
    two differ by the teacher's entropy, which no student changes.

    >>> targets = SparseTargets(torch.tensor([0]), torch.tensor([0.5]))
    >>> sparse_cross_entropy(torch.tensor([0.0, 0.0]), targets)
    tensor(0.6931)
    """
    log_probs = log_softmax(student_logits.float(), dim=-1).gather(-1, targets.ids)
    inside = -(targets.probs * log_probs).sum(dim=-1)
    rest = 1 - targets.probs.sum(dim=-1)
    has_rest = rest > TINY
    students_rest = (1 - log_probs.exp().sum(dim=-1)).clamp(min=TINY).log()
    return inside - torch.where(has_rest, rest * students_rest, 0.0)
