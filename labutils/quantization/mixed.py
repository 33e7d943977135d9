"""Mixed precision: more bits for the layers that need them, under one budget for all."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from labutils.lab.layers.linears import linear_layers, set_weight_, weight_of
from labutils.quantization.affine import Scheme, fake_quantize


@torch.no_grad()
def layer_sensitivity(
    model: nn.Module, schemes: Sequence[Scheme], loss: Callable[[nn.Module], float]
) -> dict[str, list[float]]:
    """By how much `loss(model)` rises when one layer alone is rounded: for each layer, a number for each scheme.

    That the losses of several rounded layers add up is an assumption; measure the chosen mixture as a whole.
    """
    before, found = loss(model), {}
    for name, layer in list(linear_layers(model)):
        weight = weight_of(layer).clone()
        found[name] = []
        for scheme in schemes:
            set_weight_(layer, fake_quantize(weight, scheme))
            found[name].append(loss(model) - before)
        set_weight_(layer, weight)
    return found


def choose_under_budget(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """For each layer the index of an option, so that the sum of costs is least among all that fit the budget.

    A knapsack with one option from each layer, solved exactly: of two partial choices, one that is neither smaller
    nor cheaper is dropped.

    Raises:
        ValueError: when even the smallest options do not fit, or the two do not name the same layers and options.

    >>> choose_under_budget({"a": [9.0, 1.0], "b": [2.0, 1.0]}, {"a": [1, 2], "b": [1, 2]}, budget=3)
    {'a': 1, 'b': 0}
    """
    if {name: len(options) for name, options in costs.items()} != {name: len(row) for name, row in sizes.items()}:
        raise ValueError("costs and sizes must name the same layers, with as many options")
    partial: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for name in costs:
        longer = [
            (size + sizes[name][i], cost + costs[name][i], (*chosen, i))
            for size, cost, chosen in partial
            for i in range(len(costs[name]))
            if size + sizes[name][i] <= budget
        ]
        partial, least = [], float("inf")
        for size, cost, chosen in sorted(longer):
            if cost < least:
                partial.append((size, cost, chosen))
                least = cost
    if not partial:
        smallest = sum(min(row) for row in sizes.values())
        raise ValueError(f"the budget must hold at least the smallest options, {smallest}; got {budget}")
    return dict(zip(costs, partial[-1][2], strict=True))
