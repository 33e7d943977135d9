"""A model's linear layers, GPT-2's `Conv1D` included, with weights as (out_features, in_features).

Whoever compresses a model asks here for what there is to compress, and is refused where matrices stand elsewhere, such
as the experts that `transformers` 5 keeps in one 3-D parameter: a share of the part that was found would look like a
share of the whole.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D
Weight = Float[Tensor, "out_features in_features"]
# Modules whose matrices are known and meant to be left alone, or are yielded below.
KNOWN = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Parameters of two axes that are added or looked up, never multiplied: biases of experts, position tables (ViT, Swin),
# a state's decay (Mamba).
TABLES = ("bias", "bias_table", "embedding", "embeddings", "A_log")


def linear_layers(model: nn.Module, *, with_head: bool = False) -> Iterator[tuple[str, Linear]]:
    """Yields (name, layer) of the body's linear layers in the model's order; the head (logits) only when asked for.

    Embeddings are none of them, so tied weights are met once, through the head.

    Raises:
        ValueError: naming a matrix that stands in no linear layer (`matrices_outside_layers`). Nothing is yielded then.
    """
    outside = matrices_outside_layers(model)
    if outside:
        others = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        raise ValueError(f"every weight matrix must be in a linear layer; got {outside[0]}{others}")
    head = output_head(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and (with_head or module is not head):
            yield name, module


def matrices_outside_layers(model: nn.Module) -> list[str]:
    """Names and shapes of matrices in modules that are no linear layer, embedding or convolution, largest first.

    A matrix has two axes longer than 1 and is none of `TABLES`. The thin matrices that the course puts around a linear
    layer (LoRA) do not count: they change a weight that is met by itself.

    >>> class Experts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up = nn.Parameter(torch.zeros(4, 6, 2))
    >>> matrices_outside_layers(nn.Sequential(nn.Linear(2, 2), Experts()))
    ['1.up (4, 6, 2)']
    """
    found = [
        (parameter.numel(), f"{name}.{key} {tuple(parameter.shape)}".removeprefix("."))
        for name, module in model.named_modules()
        if not isinstance(module, KNOWN) and not _is_around_linear(module)
        for key, parameter in module.named_parameters(recurse=False)
        if sum(size > 1 for size in parameter.shape) > 1 and not key.endswith(TABLES)
    ]
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


def is_ours(module: nn.Module) -> bool:
    """Whether the course wrote this kind of module."""
    return type(module).__module__.startswith("labutils.")


def _holds_codes(module: nn.Module) -> bool:
    return is_ours(module) and hasattr(module, "dequantize")


def _is_around_linear(module: nn.Module) -> bool:
    return is_ours(module) and any(isinstance(child, (nn.Linear, Conv1D)) for child in module.children())


def compressed_weights(model: nn.Module) -> Iterator[Weight]:
    """Yields the weights that the body's packed, integer and sparse layers stand for, each dequantized."""
    head = output_head(model)
    in_head = set(head.modules()) if head is not None else set()
    for module in model.modules():
        if _holds_codes(module) and module not in in_head:
            yield module.dequantize()


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, None where the model has none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def untie_head_(model: nn.Module) -> None:
    """Gives the head a copy of the weight that it shares with the embedding; an untied model stays as it is.

    Raises:
        ValueError: when the model has no head.
    """
    head = output_head(model)
    if head is None:
        raise ValueError(f"a head can be untied only where there is one; got {type(model).__name__}")
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False


def weight_of(layer: Linear) -> Weight:
    """A view of the layer's weight, one row an output: `Conv1D` stores the transpose."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def set_weight_(layer: Linear, weight: Weight) -> None:
    """Overwrites the layer's weight in place, in the layer's own dtype.

    Raises:
        ValueError: when the shape differs.
    """
    if weight.shape != weight_of(layer).shape:
        raise ValueError(f"the weight must keep its shape {tuple(weight_of(layer).shape)}; got {tuple(weight.shape)}")
    layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)


def change_weights_(model: nn.Module, change: Callable[[str, Weight], Weight], *, with_head: bool = False) -> nn.Module:
    """Replaces the weight of each linear layer by `change(name, weight)`, in place, and returns the model.

    Rounding to nearest is `change_weights_(model, lambda name, weight: fake_quantize(weight, scheme))`, SparseGPT and
    low rank go the same way. The model computes in floats as before: this measures what a method costs in quality, and
    says nothing about speed.

    Args:
        model: any Hugging Face model.
        change: gets (out_features, in_features), whatever the layer stores.
        with_head: also the layer that makes logits; where it is tied to the embedding, both change.

    Raises:
        ValueError: naming a layer that holds codes, not floats: what changed would be a part. Nothing is changed then.
    """
    if packed := next((name for name, module in model.named_modules() if _holds_codes(module)), None):
        raise ValueError(f"weights to be changed must be floats; got codes in {packed}")
    for name, layer in linear_layers(model, with_head=with_head):
        set_weight_(layer, change(name, weight_of(layer).clone()))
    return model


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name` (dots and all)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
