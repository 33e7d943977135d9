"""The bytes that a model takes in given schemes."""

import math
from collections.abc import Mapping

from torch import nn

from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.quantization.affine import Scheme
from labutils.quantization.packing import bits_per_weight


def model_bytes(
    model: nn.Module, schemes: Mapping[str, Scheme], *, float_bytes: int = 2, zero_bits: int | None = None
) -> float:
    """Bytes of a model whose layers are stored in `schemes`, by name; every other parameter takes `float_bytes`.

    Tied parameters count once; `zero_bits` is what a zero point takes (`bits_per_weight`).

    Raises:
        ValueError: when a name is no linear layer of the model.
    """
    layers = dict(linear_layers(model, with_head=True))
    unknown = schemes.keys() - layers.keys()
    if unknown:
        raise ValueError(f"schemes must name linear layers of the model; got {sorted(unknown)[0]!r}")
    shapes = {name: tuple(weight_of(layers[name]).shape) for name in schemes}
    bits = sum(
        bits_per_weight(shapes[name], scheme, zero_bits=zero_bits) * math.prod(shapes[name])
        for name, scheme in schemes.items()
    )
    inside = {id(layers[name].weight) for name in schemes}
    return bits / 8 + float_bytes * sum(p.numel() for p in model.parameters() if id(p) not in inside)
