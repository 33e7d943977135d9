"""The parts of a distillation loss and their weights, for any pair of Hugging Face causal language models."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from labutils.distillation.divergences import at_temperature
from labutils.distillation.hidden import Projections, attention_loss, cosine_loss, hidden_loss, layer_map
from labutils.distillation.sparse import SparseTargets, sparse_cross_entropy
from labutils.lab.training.losses import IGNORED, Divergence, LossOf, checked_rows, counted, forward_kl, mean_over


@dataclass(frozen=True)
class Recipe:
    """Weights of the parts; the default is Hinton's λ T² KL + (1 − λ) CE with λ = ½ and T = 2."""

    soft: float = 0.5  # the teacher's distribution, times T²
    hard: float = 0.5  # the text's own token
    temperature: float = 2.0
    divergence: Divergence = forward_kl
    cosine: float = 0.0  # direction of the last hidden state
    hidden: float = 0.0  # matched hidden states
    attention: float = 0.0  # matched attention; both models must compute it eagerly


# Sanh et al. 2019 (arXiv:1910.01108): 5 · soft + 2 · hard + 1 · cosine, T = 2.
DISTILBERT = Recipe(soft=5.0, hard=2.0, cosine=1.0)


def distillation_loss(
    student: nn.Module, teacher: nn.Module, recipe: Recipe, *, projections: Projections | None = None
) -> LossOf:
    """The loss of `recipe` as `fit_` and `models.training.train` take it.

    Args:
        student: a causal LM; one with other widths needs `projections` for cosine and hidden.
        teacher: in evaluation mode, over the same vocabulary; it gets no gradient.
        recipe: the weights.
        projections: one for each of the student's hidden states, the embedding's output included; train them as well.

    Raises:
        ValueError: when the teacher is in training mode or the vocabularies differ.
    """
    if teacher.training:
        raise ValueError("a teacher must be in evaluation mode: call teacher.eval() first")
    if student.config.vocab_size != teacher.config.vocab_size:
        sizes = (student.config.vocab_size, teacher.config.vocab_size)
        raise ValueError(f"student and teacher must predict over one vocabulary; got {sizes[0]} and {sizes[1]} tokens")
    wanted = {
        "output_hidden_states": recipe.cosine > 0 or recipe.hidden > 0,
        "output_attentions": recipe.attention > 0,
        "use_cache": False,
    }

    def loss(ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        ids, labels = checked_rows(student, ids, labels, mask)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, **wanted)
        ours = student(input_ids=ids, **wanted)
        return _weighted(ours, theirs, labels, recipe, projections)

    return loss


def _weighted(ours, theirs, labels: Tensor, recipe: Recipe, projections: Projections | None) -> Tensor:
    """Sum of the parts that have a weight; positions whose label does not count are in none of them."""
    counts, total = counted(labels), 0.0
    logits, target = ours.logits[:, :-1], theirs.logits[:, :-1]
    if recipe.soft:
        divergence = at_temperature(recipe.divergence, recipe.temperature)
        total = total + recipe.soft * mean_over(divergence(logits, target), counts)
    if recipe.hard:
        total = total + recipe.hard * hard_loss(logits, labels)
    kept = torch.cat([counts, torch.zeros_like(counts[:, :1])], dim=1)  # the positions that predict what counts
    if recipe.cosine or recipe.hidden:
        states = list(ours.hidden_states) if projections is None else projections(ours.hidden_states)
        targets = [theirs.hidden_states[g] for g in layer_map(len(states) - 1, len(theirs.hidden_states) - 1)]
        if recipe.cosine:
            total = total + recipe.cosine * cosine_loss(states[-1], targets[-1], kept)
        if recipe.hidden:
            total = total + recipe.hidden * hidden_loss(states, targets, kept)
    if recipe.attention:
        layers = layer_map(len(ours.attentions), len(theirs.attentions))[1:]
        total = total + recipe.attention * attention_loss(
            ours.attentions, [theirs.attentions[g - 1] for g in layers], kept
        )
    return total


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the text's own token, over the labels that count; labels are one longer than the logits."""
    return cross_entropy(logits.float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED)


def stored_loss(student: nn.Module, targets_of: Callable[[Tensor], SparseTargets], recipe: Recipe) -> LossOf:
    """As `distillation_loss` at temperature 1, but the teacher's answers come from a store (see `TeacherCache`).

    Args:
        student: a causal LM.
        targets_of: ids (sequences, n) to targets at the first n − 1 positions.
        recipe: soft and hard count; anything else needs the teacher itself.

    Raises:
        ValueError: when the recipe asks for more than stored probabilities can give.
    """
    if recipe != Recipe(soft=recipe.soft, hard=recipe.hard, temperature=1.0):
        raise ValueError(f"stored targets give the forward KL at temperature 1 only; got {recipe}")

    def loss(ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        ids, labels = checked_rows(student, ids, labels, mask)
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        soft = sparse_cross_entropy(logits, targets_of(ids).to(ids.device))
        return recipe.soft * mean_over(soft, counted(labels)) + recipe.hard * hard_loss(logits, labels)

    return loss
