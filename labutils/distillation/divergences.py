"""How far a student's distribution is from its teacher's: each from logits (..., vocab) to nats at each position.

All are zero at equality, never negative, and the same when a constant is added to one side's logits.
"""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from labutils.lab.training.losses import Divergence, forward_kl

Logits = Float[Tensor, "*positions vocab"]
Nats = Float[Tensor, "*positions"]


def reverse_kl(student_logits: Logits, teacher_logits: Logits) -> Nats:
    """KL(student ‖ teacher): large where the student says what the teacher would not, so it settles on one mode.

    Gu et al. 2023 (MiniLLM, arXiv:2306.08543) distil language models with it.

    >>> reverse_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log())
    tensor(0.1438)
    """
    return forward_kl(teacher_logits, student_logits)


def jensen_shannon(student_logits: Logits, teacher_logits: Logits, *, beta: float = 0.5) -> Nats:
    """β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) with m = β teacher + (1 − β) student.

    Agarwal et al. 2023 (GKD, arXiv:2306.13649, equation 1). Divided by β it tends to the forward KL as β → 0, divided
    by 1 − β to the reverse KL as β → 1. Never above ln 2 at β = ½.

    Raises:
        ValueError: when beta is not between 0 and 1.

    >>> jensen_shannon(torch.tensor([20.0, -20.0]), torch.tensor([-20.0, 20.0]))
    tensor(0.6931)
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1 (use a KL at its ends); got {beta}")
    student, teacher = (log_softmax(x.float(), dim=-1) for x in (student_logits, teacher_logits))
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def total_variation(student_logits: Logits, teacher_logits: Logits) -> Nats:
    """½ Σ |p_S − p_T|, between 0 and 1: one minus it is the share of draft tokens that speculative decoding accepts.

    Wen et al. 2023 (f-distill, arXiv:2307.15190) train with it.

    >>> total_variation(torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log())
    tensor(0.2500)
    """
    return (softmax(student_logits.float(), dim=-1) - softmax(teacher_logits.float(), dim=-1)).abs().sum(dim=-1) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward KL": forward_kl,
    "reverse KL": reverse_kl,
    "Jensen-Shannon": jensen_shannon,
    "skewed JS, 0.1": partial(jensen_shannon, beta=0.1),
    "total variation": total_variation,
}


def at_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """T² · divergence between the distributions of logits ÷ T (Hinton et al. 2015, arXiv:1503.02531, section 2.1).

    The forward KL then has the gradient T (p_S − p_T, both at T) by a logit, for large T about (z_S − z_T) ÷ vocab:
    the factor T² keeps it at one size while T moves.

    Raises:
        ValueError: when the temperature is not positive.

    >>> at_temperature(forward_kl, 2.0)(torch.tensor([0.0, 0.0]), 2 * torch.tensor([0.75, 0.25]).log())
    tensor(0.5232)
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    return lambda student, teacher: temperature**2 * divergence(student / temperature, teacher / temperature)


def label_smoothing(
    student_logits: Float[Tensor, "positions vocab"], labels, *, share: float
) -> Float[Tensor, " positions"]:
    """Cross-entropy with 1 − share on the label and share spread over all: the control that knows no teacher.

    If a teacher helps no more than this, what helped was softness, not knowledge (Yuan et al. 2019, arXiv:1909.11723).

    >>> label_smoothing(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), share=0.1)
    tensor([0.6931])
    """
    return cross_entropy(student_logits.float(), labels, label_smoothing=share, reduction="none")


def article_loss(mixture_logits: Logits) -> Nats:
    """The article's −Σ p ln p: the entropy of the mixture's own distribution; neither label nor teacher is in it.

    >>> article_loss(torch.tensor([[0.0, 0.0], [100.0, 0.0]])).round(decimals=4)
    tensor([0.6931, 0.0000])
    """
    log_probs = log_softmax(mixture_logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
