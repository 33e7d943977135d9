"""A model's linear layers, GPT-2's `Conv1D` included, with weights as (out_features, in_features)."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def linear_layers(model: nn.Module, *, with_head: bool = False) -> Iterator[tuple[str, Linear]]:
    """Yields (name, layer) of the body's linear layers in the model's order; the head (logits) only when asked for.

    Embeddings are none of them, so tied weights are met once, through the head.
    """
    head = output_head(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and (with_head or module is not head):
            yield name, module


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, None where the model has none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def weight_of(layer: Linear) -> Float[Tensor, "out_features in_features"]:
    """A view of the layer's weight, one row an output: `Conv1D` stores the transpose."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def set_weight_(layer: Linear, weight: Float[Tensor, "out_features in_features"]) -> None:
    """Overwrites the layer's weight in place, in the layer's own dtype.

    Raises:
        ValueError: when the shape differs.
    """
    if weight.shape != weight_of(layer).shape:
        raise ValueError(f"the weight must keep its shape {tuple(weight_of(layer).shape)}; got {tuple(weight.shape)}")
    layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name` (dots and all)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
