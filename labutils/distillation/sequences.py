"""Learning from whole texts: the teacher's own answers, or the student's answers judged by the teacher.

Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947) trains on what the teacher writes. On-policy
distillation (Agarwal et al. 2023, GKD, arXiv:2306.13649) lets the *student* write and asks the teacher about every
token: the student learns in the situations that it gets itself into.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from labutils.lab.training.loop import Part
from labutils.lab.training.losses import IGNORED


@torch.no_grad()
def written(
    model: nn.Module,
    prompts: Sequence[Int[Tensor, " _"]],
    *,
    max_new_tokens: int,
    end_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Part:
    """What the model writes after each prompt, as ids and labels (only what it wrote counts), padded on the right.

    Prompts of one length are read together. No cache: a student's texts are short here, and the reference stays plain.

    Args:
        model: a causal LM; it is asked in evaluation mode and left as it was.
        prompts: token ids.
        max_new_tokens: at most.
        end_id: stops a text, counts itself, and serves as padding, which never counts.
        temperature: 0 takes the likeliest token.
        generator: needed for a temperature above 0.

    Raises:
        ValueError: without a prompt.
    """
    if not prompts:
        raise ValueError("writing needs at least one prompt; got none")
    was_training = model.training
    model.eval()
    rows: list[tuple[Tensor, Tensor]] = [None] * len(prompts)
    try:
        for length in sorted({len(prompt) for prompt in prompts}):
            places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            texts = _continued(
                model, torch.stack([prompts[i] for i in places]), max_new_tokens, end_id, temperature, generator
            )
            for i, text in zip(places, texts, strict=True):
                rows[i] = _row(text, length, end_id)
    finally:
        model.train(was_training)
    ids, labels = zip(*rows, strict=True)
    return pad_sequence(ids, True, end_id), pad_sequence(labels, True, IGNORED)


def _continued(model, ids: Tensor, max_new_tokens: int, end_id: int, temperature: float, generator) -> Tensor:
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        chosen = torch.where(done, end_id, chosen)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        done = done | (chosen == end_id)
        if done.all():
            break
    return ids


def _row(text: Tensor, prompt_length: int, end_id: int) -> tuple[Tensor, Tensor]:
    """A text up to its first end after the prompt, and labels that count what was written."""
    ends = (text[prompt_length:] == end_id).nonzero().flatten()
    text = text if len(ends) == 0 else text[: prompt_length + int(ends[0]) + 1]
    labels = text.clone()
    labels[:prompt_length] = IGNORED
    return text, labels


@dataclass(frozen=True)
class OnPolicySchedule:
    """Share of steps on the student's own texts: rises in a straight line to `final` over the first `rising_steps`."""

    final: float = 0.5
    rising_steps: int = 1
    seed: int = 0

    def share(self, step: int) -> float:
        """The share at a step, counted from 0.

        >>> [OnPolicySchedule(final=0.5, rising_steps=4).share(step) for step in (0, 2, 9)]
        [0.0, 0.25, 0.5]
        """
        return self.final * min(1.0, step / self.rising_steps)

    def generator(self, step: int) -> torch.Generator:
        """Randomness of one step, the same however often the run was killed."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def on_policy_parts(
    student: nn.Module,
    parts_of: Callable[[int], Sequence[Part]],
    prompts_of: Callable[[int], Sequence[Tensor]],
    schedule: OnPolicySchedule,
    *,
    max_new_tokens: int,
    end_id: int,
    temperature: float = 1.0,
) -> Callable[[int], Sequence[Part]]:
    """Parts for `fit_`: the data's, or, in the schedule's share of steps, what the student writes at that moment.

    Train on them with a divergence from the teacher and no weight on the hard part: a student's own words are no truth.
    No gradient flows through the writing (GKD, section 3).
    """

    def parts(step: int) -> Sequence[Part]:
        generator = schedule.generator(step)
        if torch.rand((), generator=generator).item() >= schedule.share(step):
            return parts_of(step)
        ids, labels = written(
            student,
            prompts_of(step),
            max_new_tokens=max_new_tokens,
            end_id=end_id,
            temperature=temperature,
            generator=generator,
        )
        return [(ids, labels, torch.ones_like(ids))]  # a prompt may begin as it likes: all of it is text

    return parts
