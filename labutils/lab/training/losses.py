"""Two losses that more than one topic trains with: the text's own next token, and a teacher's distribution over it.

A loss takes ids and labels of shape (sequences, tokens) and returns the mean over the labels that count, in nats per
token. Labels are not shifted: the one at position t is predicted from what stands before t, so the first never counts.
Rows padded on the right need no mask, as no text sees what follows it; rows padded on the left need the tokenizer's.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax

IGNORED = -100  # a label that does not count: prompt, padding on the right
Ids = Int[Tensor, "sequences tokens"]
Texts = Int[Tensor, "sequences kept"]
LossOf = Callable[..., Tensor]  # ids, labels and perhaps an attention mask to the mean loss
Divergence = Callable[[Tensor, Tensor], Tensor]  # student's and teacher's logits (..., vocab) to nats (...)


def forward_kl(
    student_logits: Float[Tensor, "*positions vocab"], teacher_logits: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions"]:
    """KL(teacher ‖ student) = Σ p_T (ln p_T − ln p_S) at each position, in nats.

    It is large where the student gives little to what the teacher finds likely: the student learns to cover everything.

    >>> forward_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log())
    tensor(0.1308)
    """
    predicted = log_softmax(student_logits.float(), dim=-1)
    return kl_div(predicted, softmax(teacher_logits.float(), dim=-1), reduction="none").sum(dim=-1)


def counted(labels: Ids) -> Bool[Tensor, "sequences positions"]:
    """Which of the n − 1 predicted positions count."""
    return labels[:, 1:] != IGNORED


def mean_over(values: Float[Tensor, "*positions"], counts: Bool[Tensor, "*positions"]) -> Float[Tensor, ""]:
    """Mean of the values that count.

    Raises:
        ValueError: when none does.

    >>> mean_over(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    if not counts.any():
        raise ValueError("a loss needs at least one label that counts; got none")
    return values[counts].mean()


def text_first(
    ids: Ids, labels: Int[Tensor, "sequences _"], mask: Tensor | None = None
) -> tuple[Texts, Int[Tensor, "sequences _"]]:
    """Moves every row's text to its beginning, in order, and cuts off what no row needs; padding is ignored.

    A causal model then reads each text as if it stood alone, whatever positions, attention or state it works with.

    Raises:
        ValueError: when the mask has another shape.

    >>> text_first(torch.tensor([[1, 1, 8, 9]]), torch.tensor([[1, 1, 8, 9]]), torch.tensor([[0, 0, 1, 1]]))
    (tensor([[8, 9]]), tensor([[8, 9]]))
    """
    if mask is None:
        return ids, labels
    if mask.shape != ids.shape:
        raise ValueError(f"an attention mask must have the ids' shape {tuple(ids.shape)}; got {tuple(mask.shape)}")
    longest = max(int((mask != 0).sum(dim=1).max()), 1)
    order = (mask == 0).int().argsort(dim=1, stable=True)[:, :longest]
    return ids.gather(1, order), labels.masked_fill(mask == 0, IGNORED).gather(1, order)


def checked_rows(model: nn.Module, ids: Ids, labels: Ids, mask: Tensor | None) -> tuple[Texts, Texts]:
    """`text_first`, or without a mask a look at how the rows begin.

    Raises:
        ValueError: when no label counts, or when a row without a mask looks padded on the left: it begins with the
            model's pad token, or with one id again and again whose labels do not count.
    """
    ids_first, labels_first = text_first(ids, labels, mask)
    counts = counted(labels_first).any(dim=1)
    if not counts.any():
        raise ValueError("a loss needs at least one label that counts; got none")
    if mask is None:
        same = ids == ids[:, :1]
        config = model.config if hasattr(model, "config") else None
        pad, start = (getattr(config, name, None) for name in ("pad_token_id", "bos_token_id"))
        ignored = (same & (labels == IGNORED)).cumprod(dim=1).sum(dim=1) > 1
        padded = (ids[:, 0] == (-1 if pad is None else pad)) & (same.cumprod(dim=1).sum(dim=1) > int(pad == start))
        if (counts & (ignored | padded)).any():
            row = int((counts & (ignored | padded)).nonzero()[0])
            raise ValueError(f"rows padded on the left need the tokenizer's attention mask; row {row} looks like one")
    return ids_first, labels_first


def text_loss(model: nn.Module) -> LossOf:
    """Cross-entropy with the text's own next token."""

    def loss(ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        ids, labels = checked_rows(model, ids, labels, mask)
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    return loss


def teacher_loss(model: nn.Module, teacher: nn.Module, divergence: Divergence = forward_kl) -> LossOf:
    """Divergence from the teacher's distribution over the next token.

    Raises:
        ValueError: when the teacher is in training mode: with dropout it would say something else each time.
    """
    if teacher.training:
        raise ValueError("a teacher must be in evaluation mode: call teacher.eval() first")

    def loss(ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        ids, labels = checked_rows(model, ids, labels, mask)
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        predicted = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return mean_over(divergence(predicted, target), counted(labels))

    return loss
