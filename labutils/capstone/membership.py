"""Membership inference: was this text in the training data? Attacks that only see losses, and how to score them.

An attack gives each text a *score*, the higher the likelier a member; nothing depends on where a threshold lies.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from labutils.lab.training.losses import IGNORED
from labutils.measurement.timing import quantile

Scores = Sequence[float]


@torch.no_grad()
def text_losses(model: nn.Module, texts: Sequence[Sequence[int]]) -> Float[Tensor, " texts"]:
    """Mean loss of each text, in nats per predicted token.

    −loss is the attack of Yeom et al. 2018 (arXiv:1709.01604); the loss of the model before its training minus this
    one takes out that some texts are easy for every model.

    Raises:
        ValueError: For a text of fewer than two tokens.
    """
    if min(map(len, texts)) < 2:
        raise ValueError("a loss needs a text of at least two tokens; got a shorter one")
    losses = []
    for start in range(0, len(texts), 16):
        rows = [torch.tensor(text) for text in texts[start : start + 16]]
        ids, labels = (nn.utils.rnn.pad_sequence(rows, True, value) for value in (0, IGNORED))
        logits, wanted = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        nats = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        losses.append(nats.view(wanted.shape).sum(dim=1) / (wanted != IGNORED).sum(dim=1))
    return torch.cat(losses)


def _check(members: Scores, others: Scores) -> None:
    if not len(members) or not len(others):
        raise ValueError(f"an attack is scored on members and others; got {len(members)} and {len(others)}")


def roc(members: Scores, others: Scores) -> tuple[list[float], list[float]]:
    """Shares of others and of members at or above each threshold, from (0, 0) to (1, 1).

    >>> roc([3, 1], [2, 0])
    ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])

    Raises:
        ValueError: If there are no members or no others.
    """
    _check(members, others)
    thresholds = sorted({*members, *others}, reverse=True)
    rates = [[sum(s >= t for s in some) / len(some) for t in thresholds] for some in (others, members)]
    return [0.0, *rates[0]], [0.0, *rates[1]]


def auc(members: Scores, others: Scores) -> float:
    """P(member > other) + ½ P(equal): the area under the ROC (Hanley and McNeil 1982).

    >>> auc([3, 1], [2, 0]), auc([1, 1], [1])
    (0.75, 0.5)

    Raises:
        ValueError: If there are no members or no others.
    """
    _check(members, others)
    ranked = sorted(others)
    beaten = sum(bisect_left(ranked, score) + bisect_right(ranked, score) for score in members)
    return beaten / 2 / (len(members) * len(others))


def tpr_at(members: Scores, others: Scores, fpr: float) -> float:
    """The largest share of members that a threshold finds while it accuses at most a share `fpr` of the others.

    A mean over all thresholds hides whether *some* people can be accused with confidence (Carlini et al. 2022,
    arXiv:2112.03570).

    >>> tpr_at([3, 1], [2, 0], 0.01)
    0.5

    Raises:
        ValueError: If there are no members or no others.
    """
    return max(found for wrong, found in zip(*roc(members, others), strict=True) if wrong <= fpr)


def auc_interval(members: Scores, others: Scores, *, resamples: int = 300, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of `auc`; members and others are drawn anew, each among themselves."""
    rng = Random(seed)
    drawn = [auc(rng.choices(members, k=len(members)), rng.choices(others, k=len(others))) for _ in range(resamples)]
    return quantile(drawn, 0.025), quantile(drawn, 0.975)
