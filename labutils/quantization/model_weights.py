"""A rounding method over a whole model, and the bytes that the model then takes."""

import math
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from labutils.layers.linears import linear_layers, set_weight_, weight_of
from labutils.quantization.affine import Scheme
from labutils.quantization.packing import bits_per_weight

Weight = Float[Tensor, "out n"]


def change_weights_(model: nn.Module, change: Callable[[str, Weight], Weight], *, with_head: bool = False) -> nn.Module:
    """Replaces the weight of each linear layer by `change(name, weight)`, in place, and returns the model.

    Round to nearest (RTN), the method that every other one has to beat, is
    `change_weights_(model, lambda name, weight: fake_quantize(weight, scheme))`. The model computes in floats as
    before: this measures what a method costs in quality, and says nothing about speed.

    Args:
        model: any Hugging Face model.
        change: gets (out_features, in_features), whatever the layer stores.
        with_head: also the layer that makes logits; where it is tied to the embedding, both change.
    """
    for name, layer in linear_layers(model, with_head=with_head):
        set_weight_(layer, change(name, weight_of(layer).clone()))
    return model


def model_bytes(model: nn.Module, schemes: Mapping[str, Scheme], *, float_bytes: int = 2) -> float:
    """Bytes of a model whose layers are stored in `schemes`, by name; every other parameter takes `float_bytes`.

    Tied parameters count once.

    Raises:
        ValueError: when a name is no linear layer of the model.
    """
    layers = dict(linear_layers(model, with_head=True))
    unknown = schemes.keys() - layers.keys()
    if unknown:
        raise ValueError(f"schemes must name linear layers of the model; got {sorted(unknown)[0]!r}")
    shapes = {name: tuple(weight_of(layers[name]).shape) for name in schemes}
    bits = sum(bits_per_weight(shapes[name], scheme) * math.prod(shapes[name]) for name, scheme in schemes.items())
    inside = {id(layers[name].weight) for name in schemes}
    return bits / 8 + float_bytes * sum(p.numel() for p in model.parameters() if id(p) not in inside)
