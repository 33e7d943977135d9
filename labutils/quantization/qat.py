"""Quantization-aware training: the forward pass sees the rounded weight, the gradient passes the rounding by.

The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): ∂round(w)/∂w := 1.
"""

from collections.abc import Iterable

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labutils.lab.layers.linears import linear_layers
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import teacher_loss, text_loss
from labutils.quantization.affine import Scheme, fake_quantize


def straight_through(weight: Float[Tensor, "*shape"], scheme: Scheme) -> Float[Tensor, "*shape"]:
    """Rounded in the forward pass; the gradient is that of the identity."""
    return weight + (fake_quantize(weight.detach(), scheme) - weight.detach())


class _Rounded(nn.Module):
    """A weight seen through its rounding; `Conv1D` stores the transpose."""

    def __init__(self, scheme: Scheme, *, is_transposed: bool) -> None:
        super().__init__()
        self.scheme, self.is_transposed = scheme, is_transposed

    def forward(self, weight: Tensor) -> Tensor:
        if self.is_transposed:
            return straight_through(weight.T, self.scheme).T
        return straight_through(weight, self.scheme)


def train_quantized_(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "b positions"]],
    scheme: Scheme,
    *,
    learning_rate: float = 2e-4,
    teacher: nn.Module | None = None,
) -> list[float]:
    """Trains a causal LM whose linear layers are rounded in every forward pass, and leaves the rounded weights in it.

    Args:
        model: trained in place, all parameters (AdamW, one step a batch).
        batches: token ids of training text without padding.
        scheme: for every layer but the head.
        learning_rate: constant.
        teacher: with it the loss is KL(teacher ‖ model): quantization-aware distillation.

    Returns:
        The loss of every step, in nats per token.
    """
    layers = [layer for _, layer in linear_layers(model)]
    for layer in layers:
        rounded = _Rounded(scheme, is_transposed=not isinstance(layer, nn.Linear))
        parametrize.register_parametrization(layer, "weight", rounded)
    rows = list(batches)
    loss_of = text_loss(model) if teacher is None else teacher_loss(model, teacher)
    plan = FitPlan(steps=len(rows), lr=learning_rate)
    try:
        return fit_(model, lambda step: [(rows[step], rows[step])], loss_of, plan)
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
