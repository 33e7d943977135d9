"""Recovery: a short fine-tuning that keeps every zero, alone or with the dense model as teacher, in full or as LoRA."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from labutils.lab.layers.linears import Linear, linear_layers, replace_module_, set_weight_, weight_of
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import teacher_loss, text_loss
from labutils.pruning.masks import Masks, apply_masks_, mask_model, masked_layers
from labutils.pruning.scores import magnitude_scores, schedule, weighted_gradient


def fine_tune_(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "b positions"]],
    *,
    lr: float,
    masks: Masks | None = None,
    teacher: nn.Module | None = None,
) -> list[float]:
    """Trains with AdamW, puts the zeros back after every step, and returns the loss of every step (nats per token).

    Args:
        model: pruned; only parameters with `requires_grad` move.
        batches: token ids, one step each.
        lr: constant learning rate.
        masks: which weights stay (True); None for a model without zeros.
        teacher: with it the loss is KL(teacher ‖ model) over the next token instead of the text's own token.

    Raises:
        ValueError: when there is no batch.
    """
    rows = list(batches)
    if not rows:
        raise ValueError("fine-tuning needs at least one batch; got none")
    return fit_(
        model,
        lambda step: [(rows[step], rows[step])],
        text_loss(model) if teacher is None else teacher_loss(model, teacher),
        FitPlan(steps=len(rows), lr=lr),
        after_step=None if masks is None else lambda: apply_masks_(model, masks),
    )


def gradual_(
    model: nn.Module,
    batches: Sequence[Int[Tensor, "b positions"]],
    *,
    final: float,
    lr: float,
    by_movement: bool = False,
) -> Masks:
    """Prunes while it trains: masks are drawn anew at every step, for a sparsity that rises by `schedule`.

    The loss is the masked model's, but its gradients move the whole weights behind the masks, so a weight may come back
    (straight-through, as in Sanh et al. 2020).

    Args:
        model: is fine-tuned with AdamW and ends at the final sparsity, the same in every layer.
        batches: token ids, one step each; the last third trains at the final sparsity.
        final: sparsity at the end.
        lr: constant learning rate.
        by_movement: keep the weights that training pushes away from zero (movement); otherwise the largest (magnitude).

    Returns:
        The last masks.

    Raises:
        ValueError: for fewer than 2 batches.
    """
    if len(batches) < 2:
        raise ValueError(f"a gradual run needs at least 2 batches; got {len(batches)}")
    layers = dict(linear_layers(model))
    moved = {name: torch.zeros_like(weight_of(layer)) for name, layer in layers.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rising = len(batches) * 2 // 3
    for step, token_ids in enumerate(batches):
        scores = moved if by_movement else magnitude_scores(model)
        masks = mask_model(scores, schedule(min(step, rising), steps=rising, final=final))
        whole = {name: weight_of(layer).clone() for name, layer in layers.items()}
        apply_masks_(model, masks)
        optimizer.zero_grad(set_to_none=True)
        text_loss(model)(token_ids, token_ids).backward()
        for name, layer in layers.items():
            set_weight_(layer, whole[name])
            moved[name] -= weighted_gradient(layer)
        optimizer.step()
    apply_masks_(model, masks)
    return masks


class LoraLinear(nn.Module):
    """A frozen linear layer plus a learnt change of low rank: y = (W + M ∘ B A) x (Hu et al. 2021, arXiv:2106.09685).

    Plain LoRA adds B A, which fills the zeros as soon as it is merged; under the mask M the zeros stay.
    """

    def __init__(self, base: Linear, mask: Tensor, *, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        out_features, in_features = weight_of(base).shape
        self.register_buffer("mask", mask.to(base.weight.dtype))
        start = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        self.a = nn.Parameter(start.to(base.weight))
        self.b = nn.Parameter(base.weight.new_zeros(out_features, rank))

    @property
    def weight(self) -> Float[Tensor, "out n"]:
        """The weight with the change in it."""
        return weight_of(self.base) + self.mask * (self.b @ self.a)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... out"]:
        """As a linear layer."""
        return linear(x, self.weight, self.base.bias)


def add_lora_(model: nn.Module, masks: Masks, *, rank: int, generator: torch.Generator) -> None:
    """Freezes the model and gives every masked linear layer a learnt change of that rank, at first zero.

    Raises:
        ValueError: see `masked_layers`; the model is then as it was.
    """
    layers = masked_layers(model, masks)
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module_(model, name, LoraLinear(layer, masks[name], rank=rank, generator=generator))


@torch.no_grad()
def merge_lora_(model: nn.Module) -> None:
    """Writes the changes into the weights and takes the extra layers out: an ordinary model, as sparse as before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            set_weight_(module.base, module.weight)
            replace_module_(model, name, module.base)
    model.requires_grad_(True)


def rewound_(model: nn.Module, start: dict[str, Tensor], masks: Masks) -> None:
    """The lottery ticket: survivors back to where training began (Frankle and Carbin 2019, arXiv:1803.03635)."""
    model.load_state_dict(start)
    apply_masks_(model, masks)
