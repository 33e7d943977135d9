"""How much a weight matters: one score for each weight, larger is kept longer. Shapes as the weight's (out, in)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.lab.layers.calibration import InputStatistics
from labutils.lab.layers.linears import Linear, linear_layers, weight_of

Scores = dict[str, Float[Tensor, "out n"]]


def magnitude(weight: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
    """|W|: what is small matters little (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


def wanda(weight: Float[Tensor, "out n"], norms: Float[Tensor, " n"]) -> Float[Tensor, "out n"]:
    """|W_ij| · ‖X_j‖₂, compared within each row (Sun et al. 2023, arXiv:2306.11695, equation 1).

    A small weight on a loud input matters more than a large one on a silent input.

    >>> wanda(torch.tensor([[1.0, -3.0]]), torch.tensor([6.0, 1.0]))
    tensor([[6., 3.]])
    """
    return weight.abs() * norms


@dataclass(frozen=True)
class GradientScores:
    """Scores that need the loss's gradients, by layer.

    Attributes:
        taylor: Σ over batches of |w · ∂L/∂w|: how much the loss moves when w becomes 0, to first order (Molchanov et
            al. 2017, arXiv:1611.06440, equation 2, here for single weights).
        movement: −Σ over steps of w · ∂L/∂w: positive where training pushes w away from 0 (Sanh et al. 2020,
            arXiv:2005.07683, equation 8 without its learning rate).
    """

    taylor: Scores
    movement: Scores


def weighted_gradient(layer: Linear) -> Float[Tensor, "out n"]:
    """W · ∂L/∂w after a backward pass."""
    product = (layer.weight * layer.weight.grad).detach()
    return product if isinstance(layer, nn.Linear) else product.T  # Conv1D stores the transpose


def gradient_scores(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "b positions"]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> GradientScores:
    """Sums both gradient scores over batches of token ids.

    Args:
        model: a Hugging Face causal LM.
        batches: each is one backward pass of the next-token loss.
        optimizer: steps after every batch, so that movement sees a training run and the model is changed; without it
            the model stays as it was.

    Raises:
        ValueError: when there is no batch.
    """
    layers = dict(linear_layers(model))
    taylor = {name: torch.zeros_like(weight_of(layer)) for name, layer in layers.items()}
    movement = {name: torch.zeros_like(weight_of(layer)) for name, layer in layers.items()}
    batches = list(batches)
    if not batches:
        raise ValueError("gradient scores need at least one batch; got none")
    for token_ids in batches:
        model.zero_grad(set_to_none=True)
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        for name, layer in layers.items():
            product = weighted_gradient(layer)
            taylor[name] += product.abs()
            movement[name] -= product
        if optimizer is not None:
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return GradientScores(taylor, movement)


def magnitude_scores(model: nn.Module) -> Scores:
    """`magnitude` of every linear layer of the body."""
    return {name: magnitude(weight_of(layer)) for name, layer in linear_layers(model)}


def wanda_scores(model: nn.Module, statistics: dict[str, InputStatistics]) -> Scores:
    """`wanda` of every linear layer of the body."""
    return {name: wanda(weight_of(layer), statistics[name].norms) for name, layer in linear_layers(model)}


def column_scores(weight: Float[Tensor, "out n"], norms: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """‖W_:j‖₂ · ‖X_j‖₂: how much an input as a whole says, for removing neurons, heads and channels.

    >>> column_scores(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([1.0, 10.0]))
    tensor([ 5., 10.])
    """
    return weight.norm(dim=0) * norms


def schedule(step: int, *, steps: int, final: float, initial: float = 0.0) -> float:
    """Sparsity at a step of a gradual run: s_f + (s_i − s_f)(1 − t/T)³ (Zhu and Gupta 2017, arXiv:1710.01878, eq. 1).

    Fast at first, when there is much to spare, slow at the end.

    Raises:
        ValueError: when the step lies outside 0 … steps.

    >>> [round(schedule(t, steps=2, final=0.8), 3) for t in (0, 1, 2)]
    [0.0, 0.7, 0.8]
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step must lie in 0 to steps={steps}; got {step}")
    return final + (initial - final) * (1 - step / steps) ** 3
