"""Speculative decoding: a proposer guesses, the target reads all guesses in one step, `verify` says which stand.

Invariant of the loop: the target's cache holds the whole text but its last token. A step feeds that token and the
drafted ones, so γ drafted tokens give γ + 1 rows of logits; what did not stand is rewound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from labutils.decoding.proposers import Proposer
from labutils.decoding.target import Target
from labutils.decoding.verify import up_to_stop, verify
from labutils.generation.sampling import greedy


@dataclass(frozen=True)
class Step:
    """One step of the target: tokens drafted, how many of them stood, tokens made, and the seconds of both sides."""

    drafted: int
    accepted: int
    made: int
    draft_s: float
    target_s: float


@dataclass(frozen=True)
class Speculation:
    """A finished text and one set of metrics for every proposer.

    Attributes:
        token_ids: The prompt and its continuation.
        prefill_s: Seconds until the first token, which the prompt's own logits give.
        steps: What each later step of the target did.
    """

    token_ids: Int[Tensor, "1 longer"]
    prefill_s: float
    steps: tuple[Step, ...]

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """Drafted tokens that stood."""
        return sum(step.accepted for step in self.steps)

    @property
    def judged(self) -> int:
        """Drafted tokens up to the first that fell, in each step: the ones behind it were never judged."""
        return sum(min(step.accepted + 1, step.drafted) for step in self.steps)

    @property
    def acceptance(self) -> float:
        """Accepted ÷ judged: the α of the formulas; nan where nothing was drafted."""
        return self.accepted / self.judged if self.judged else float("nan")

    @property
    def target_steps(self) -> int:
        """Steps of the target after the prompt."""
        return len(self.steps)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one step of the target makes; nan where the prompt's own logits made them all."""
        return sum(step.made for step in self.steps) / len(self.steps) if self.steps else float("nan")

    @property
    def draft_s(self) -> float:
        """Seconds in the proposer."""
        return sum(step.draft_s for step in self.steps)

    @property
    def target_s(self) -> float:
        """Seconds in the target and the verifier, without the prompt."""
        return sum(step.target_s for step in self.steps)


def generate_speculative(
    target: Target,
    proposer: Proposer,
    token_ids: Int[Tensor, "1 positions"],
    max_new_tokens: int,
    *,
    draft_tokens: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    stop: Collection[int] = (),
) -> Speculation:
    """Generates from an empty cache what the target alone would: the same tokens, or the same law of tokens.

    Args:
        target: Decides; what its cache holds is forgotten first.
        proposer: Guesses.
        token_ids: One prompt.
        max_new_tokens: At most this many tokens.
        draft_tokens: γ: ask for at most this many guesses a step; 0 is plain decoding.
        choose: `greedy` or a `Sampler`.
        stop: Ids that end the text; the stop token itself is kept.

    Raises:
        ValueError: For an empty prompt, several prompts, a text that the target has no room for, no new token, or a
            negative number of drafted tokens; the target is unchanged then.
    """
    _check(target, token_ids, max_new_tokens, draft_tokens)
    target.rewind(target.length)
    began = time.perf_counter()
    text = token_ids[0].tolist()
    end = len(text) + max_new_tokens
    text.append(int(choose(target.prefill(token_ids))))
    prefill_s, steps = time.perf_counter() - began, []
    while len(text) < end and text[-1] not in stop:
        steps.append(_step(target, proposer, text, min(draft_tokens, end - len(text) - 1), choose, stop))
    return Speculation(torch.tensor([text], device=token_ids.device), prefill_s, tuple(steps))


def _step(target: Target, proposer: Proposer, text: list[int], count: int, choose, stop: Collection[int]) -> Step:
    """Lengthens the text by the drafted tokens that stand and one more, up to a stop token."""
    began = time.perf_counter()
    proposal = proposer.propose(text, count)
    drafted = proposal.token_ids
    if len(drafted) > count:
        raise ValueError(f"a proposer must return at most {count} tokens; got {len(drafted)}")
    proposed = time.perf_counter()
    logits = target.extend([text[-1], *drafted])
    verdict = verify(logits, drafted, proposal.probs, choose=choose)
    target.rewind(len(drafted) - verdict.accepted)
    new = up_to_stop([*drafted[: verdict.accepted], verdict.token], stop)
    text += new
    return Step(len(drafted), verdict.accepted, len(new), proposed - began, time.perf_counter() - proposed)


def _check(target: Target, token_ids: Tensor, max_new_tokens: int, draft_tokens: int) -> None:
    prompts, positions = token_ids.shape
    room = float("inf") if target.max_length is None else target.max_length
    rules = {
        "speculation needs one prompt of at least one token": (tuple(token_ids.shape), prompts == 1 and positions >= 1),
        "max_new_tokens must be at least 1": (max_new_tokens, max_new_tokens >= 1),
        "draft_tokens must be at least 0": (draft_tokens, draft_tokens >= 0),
        f"the text must fit into max_length={target.max_length} positions": (
            positions + max_new_tokens - 1,
            positions + max_new_tokens - 1 <= room,
        ),
    }
    for rule, (value, holds) in rules.items():
        if not holds:
            raise ValueError(f"{rule}; got {value}")
