"""Which part bears how much: sensitivity measured one layer at a time, then a budget of weights or of heads."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from labutils.lab.layers.linears import linear_layers, set_weight_, weight_of

Damage = dict[str, list[float]]


def sensitivity(
    model: nn.Module,
    prune: Callable[[str, float], object],
    measure: Callable[[], float],
    *,
    levels: Sequence[float],
) -> Damage:
    """What the measure says when one layer alone is pruned to each level, by layer; the model is left as it was.

    Args:
        model: its linear layers are taken in turn.
        prune: prune(name, sparsity) returns the layer's pruned weight.
        measure: quality of the model as it stands (lower is better).
        levels: sparsities, rising.
    """
    damage: Damage = {}
    for name, layer in linear_layers(model):
        whole = weight_of(layer).clone()
        damage[name] = []
        for level in levels:
            set_weight_(layer, prune(name, level))
            damage[name].append(measure())
            set_weight_(layer, whole)
    return damage


def solve_budget(
    damage: Damage, sizes: dict[str, int], *, levels: Sequence[float], sparsity: float
) -> dict[str, float]:
    """A level for each layer so that at least `sparsity` of all weights go and the summed damage is small.

    Greedy: again and again the step to a higher level that costs least damage per weight. Optimal up to the last step
    where every layer's damage curve bends upwards; damages are taken to add up, which is an approximation.

    Raises:
        ValueError: when even the highest levels do not reach the sparsity.

    >>> solve_budget({"a": [0, 1], "b": [0, 9]}, {"a": 5, "b": 5}, levels=[0.0, 0.8], sparsity=0.4)
    {'a': 0.8, 'b': 0.0}
    """
    total = sum(sizes.values())
    if max(levels) < sparsity - 1e-9:
        raise ValueError(f"sparsity must not exceed the highest level {max(levels)}; got {sparsity}")
    chosen = dict.fromkeys(damage, 0)

    def removed() -> float:
        return sum(levels[level] * sizes[name] for name, level in chosen.items()) / total

    while removed() < sparsity - 1e-9:
        steps = {
            (name, higher): (damage[name][higher] - damage[name][level])
            / ((levels[higher] - levels[level]) * sizes[name])
            for name, level in chosen.items()
            for higher in range(level + 1, len(levels))
        }
        name, higher = min(steps, key=lambda step: (float(f"{steps[step]:.6g}"), step[1]))  # on a tie the smaller step
        chosen[name] = higher
    return {name: levels[level] for name, level in chosen.items()}


def head_budget(damage: Float[Tensor, "layers heads"], kv_heads: int, remove: int) -> Bool[Tensor, "layers kv_heads"]:
    """Which head groups stay: `remove` of the cheapest in the whole model go, and each layer keeps its dearest one.

    A group is a key-value head with the neighbouring query heads that share it (GQA); their damages are added up.

    Raises:
        ValueError: when more should go than leaves a group in each layer.

    >>> head_budget(torch.tensor([[9.0, 1.0, 2.0, 2.0], [3.0, 4.0, 1.0, 0.0]]), 2, remove=2)
    tensor([[ True, False],
            [ True, False]])
    """
    most = len(damage) * (kv_heads - 1)
    if not 0 <= remove <= most:
        raise ValueError(f"{len(damage)} layers of {kv_heads} groups can lose 0 to {most}; got remove={remove}")
    cost = damage.unflatten(1, (kv_heads, -1)).sum(dim=-1)
    cost[torch.arange(len(cost)), cost.argmax(dim=1)] = torch.inf
    kept = torch.ones(cost.numel(), dtype=torch.bool)
    kept[cost.flatten().argsort()[:remove]] = False
    return kept.view_as(cost)
