"""Two losses that more than one topic trains with: the text's own next token, and a teacher's distribution over it.

A loss takes ids and labels of shape (sequences, tokens) and returns the mean over the labels that count, in nats per
token. Labels are not shifted: the one at place t is predicted from what stands before t, so the first never counts.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax

IGNORED = -100  # a label that does not count: prompt, padding
Ids = Int[Tensor, "sequences tokens"]
LossOf = Callable[[Tensor, Tensor], Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]  # student's and teacher's logits (..., vocab) to nats (...)


def forward_kl(
    student_logits: Float[Tensor, "*places vocab"], teacher_logits: Float[Tensor, "*places vocab"]
) -> Float[Tensor, "*places"]:
    """KL(teacher ‖ student) = Σ p_T (ln p_T − ln p_S) at each place, in nats.

    It is large where the student gives little to what the teacher finds likely: the student learns to cover everything.

    >>> forward_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log())
    tensor(0.1308)
    """
    predicted = log_softmax(student_logits.float(), dim=-1)
    return kl_div(predicted, softmax(teacher_logits.float(), dim=-1), reduction="none").sum(dim=-1)


def counted(labels: Ids) -> Bool[Tensor, "sequences places"]:
    """Which of the n − 1 predicted places count."""
    return labels[:, 1:] != IGNORED


def mean_over(values: Float[Tensor, "*places"], counts: Bool[Tensor, "*places"]) -> Float[Tensor, ""]:
    """Mean of the values that count.

    Raises:
        ValueError: when none does.

    >>> mean_over(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    if not counts.any():
        raise ValueError("a loss needs at least one label that counts; got none")
    return values[counts].mean()


def text_loss(model: nn.Module) -> LossOf:
    """Cross-entropy with the text's own next token."""
    return lambda ids, labels: model(input_ids=ids, labels=labels, use_cache=False).loss


def teacher_loss(model: nn.Module, teacher: nn.Module, divergence: Divergence = forward_kl) -> LossOf:
    """Divergence from the teacher's distribution over the next token.

    Raises:
        ValueError: when the teacher is in training mode: with dropout it would say something else each time.
    """
    if teacher.training:
        raise ValueError("a teacher must be in evaluation mode: call teacher.eval() first")

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        predicted = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return mean_over(divergence(predicted, target), counted(labels))

    return loss
