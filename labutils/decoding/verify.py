"""Which of the drafted tokens stand: the one verifier that every proposer shares.

The target reads all drafted tokens at once, and its logits judge them from left to right:

* greedy: a drafted token stands while it is the token that the target would have chosen;
* sampled: it stands with probability min(1, p / q), and the first that falls is replaced by a draw from the residual
  max(p - q, 0) / Σ max(p - q, 0) (Leviathan et al. 2022, arXiv:2211.17192, algorithm 1; Chen et al. 2023,
  arXiv:2302.01318).

If all stand, the target's last row gives one more token, the bonus. Why the sampled law is the target's: token x
comes out as a draft that stands, q min(1, p / q) = min(p, q), or as a replacement. Some token falls with probability
1 - Σ min(p, q) = Σ max(p - q, 0), which is the residual's denominator, so a replacement adds max(p - q, 0). The two
sum to p(x).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.generation.sampling import Sampler, greedy


@dataclass(frozen=True)
class Verdict:
    """How many drafted tokens stand, and the token after them: the target's correction, or its bonus."""

    accepted: int
    token: int


def up_to_stop(token_ids: list[int], stop: Collection[int]) -> list[int]:
    """The tokens up to the first that ends a text, which is kept; all of them where none does.

    >>> up_to_stop([5, 7, 2, 9], [2, 9]), up_to_stop([5, 7], [2])
    ([5, 7, 2], [5, 7])
    """
    return token_ids[: next((i + 1 for i, token in enumerate(token_ids) if token in stop), len(token_ids))]


def verify(
    target_logits: Float[Tensor, "drafted_plus_1 vocab"],
    drafted: Sequence[int],
    draft_probs: Float[Tensor, "drafted vocab"] | None = None,
    *,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> Verdict:
    """Judges drafted tokens; row i of `target_logits` judges `drafted[i]`, and the last row gives the bonus.

    Args:
        target_logits: The target's logits before each drafted token and after the last.
        drafted: What was proposed, perhaps nothing.
        draft_probs: The distributions that the drafted tokens were drawn from, after the draft's own temperature and
            filters; None when the proposer is deterministic (q is 1 at its token). Greedy choice does not need it.
        choose: `greedy` (or any deterministic choice), or a `Sampler`, whose temperature and filters make p.

    Raises:
        ValueError: If the rows do not number one more than the drafted tokens, or a token was drawn where q is 0.

    >>> logits = torch.tensor([[0.0, 5.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> verify(logits, [1, 0]), verify(logits, [1, 2])
    (Verdict(accepted=2, token=2), Verdict(accepted=1, token=0))
    """
    if len(target_logits) != len(drafted) + 1 or (draft_probs is not None and len(draft_probs) != len(drafted)):
        rows = (len(target_logits), None if draft_probs is None else len(draft_probs))
        rule = f"{len(drafted)} drafted tokens need one more row of target_logits, and as many of draft_probs"
        raise ValueError(f"{rule}; got {rows[0]} and {rows[1]} rows")
    if isinstance(choose, Sampler):
        return _verify_sampled(choose.probs(target_logits), drafted, draft_probs, choose.generator)
    wanted = choose(target_logits).tolist()
    accepted = next((i for i, token in enumerate(drafted) if token != wanted[i]), len(drafted))
    return Verdict(accepted, wanted[accepted])


def _verify_sampled(
    target_probs: Tensor, drafted: Sequence[int], draft_probs: Tensor | None, generator: torch.Generator
) -> Verdict:
    keep = acceptance_probs(target_probs[:-1], drafted, draft_probs).tolist()
    for i, token in enumerate(drafted):
        u = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).item()
        if u >= keep[i]:
            return Verdict(
                i, _draw(residual(target_probs[i], token if draft_probs is None else draft_probs[i]), generator)
            )
    return Verdict(len(drafted), _draw(target_probs[-1], generator))


def acceptance_probs(
    target_probs: Float[Tensor, "drafted vocab"],
    drafted: Sequence[int],
    draft_probs: Float[Tensor, "drafted vocab"] | None = None,
) -> Float[Tensor, " drafted"]:
    """min(1, p / q) of each drafted token, given that those before it stand; q = 1 without `draft_probs`.

    >>> acceptance_probs(torch.tensor([[0.25, 0.75]]), [0], torch.tensor([[0.5, 0.5]])).item()
    0.5

    Raises:
        ValueError: If a token was drawn where q is 0.
    """
    place = torch.arange(len(drafted)), torch.tensor(drafted, dtype=torch.long)
    p = target_probs[place].double()
    if draft_probs is None:
        return p
    q = draft_probs[place].double()
    if (q <= 0).any():
        raise ValueError(f"a drafted token must have a draft probability above 0; got {q.tolist()}")
    return (p / q).clamp(max=1)


def residual(target_probs: Float[Tensor, " vocab"], draft: Float[Tensor, " vocab"] | int) -> Float[Tensor, " vocab"]:
    """max(p - q, 0), normalised: what replaces a rejected token; `draft` is q, or the one token of a sure draft.

    >>> residual(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.7, 0.1, 0.2])).tolist()
    [0.0, 1.0, 0.0]
    >>> residual(torch.tensor([0.5, 0.25, 0.25]), 0).tolist()
    [0.0, 0.5, 0.5]
    """
    if isinstance(draft, int):
        left = target_probs.clone()
        left[draft] = 0
    else:
        left = (target_probs - draft).clamp(min=0)
    total = left.sum()
    return left / total if total > 0 else target_probs  # equal but for rounding: nothing is left to make up for


def _draw(probs: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probs, 1, generator=generator))
