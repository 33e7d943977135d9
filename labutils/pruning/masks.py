"""From scores to masks (True: kept), exact to the weight: by layer, by row, over the whole model, n of every m."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from labutils.lab.layers.linears import Linear, compressed_weights, linear_layers, output_head, set_weight_, weight_of

Pattern = float | tuple[int, int]  # a sparsity in [0, 1], or (n, m): n weights kept of every m
Mask = Bool[Tensor, "out n"]
Masks = dict[str, Mask]


def zeros_for(sparsity: float, count: int) -> int:
    """How many of `count` weights go: round(sparsity · count).

    Raises:
        ValueError: when sparsity, the fraction of zeros, lies outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the fraction of zeros and must lie in [0, 1]; got {sparsity}")
    return round(sparsity * count)


def _keep_all_but(scores: Float[Tensor, "rows n"], zeros: int) -> Bool[Tensor, "rows n"]:
    """False at the `zeros` smallest of each row; of equals, the first go."""
    if scores.isnan().any():
        raise ValueError("scores must be numbers; got nan")
    smallest = scores.argsort(dim=1, stable=True)[:, :zeros]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, smallest, False)


def mask_layer(scores: Float[Tensor, "out n"], sparsity: float) -> Mask:
    """Keeps a layer's largest scores.

    >>> mask_layer(torch.tensor([[4.0, 1.0], [2.0, 3.0]]), 0.5)
    tensor([[ True, False],
            [False,  True]])
    """
    return _keep_all_but(scores.reshape(1, -1), zeros_for(sparsity, scores.numel())).view_as(scores)


def mask_rows(scores: Float[Tensor, "out n"], sparsity: float) -> Mask:
    """Keeps the largest scores of each row, so that no output loses more than another.

    >>> mask_rows(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), 0.5)
    tensor([[ True, False],
            [ True, False]])
    """
    return _keep_all_but(scores, zeros_for(sparsity, scores.shape[1]))


def mask_n_of_m(scores: Float[Tensor, "out n"], n: int, m: int) -> Mask:
    """Keeps n of every m neighbours in a row, as sparse tensor cores want (2:4; Mishra et al. 2021, arXiv:2104.08378).

    Raises:
        ValueError: when n lies outside 0 … m, or m does not divide the columns.

    >>> mask_n_of_m(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 2, 4)
    tensor([[False,  True, False,  True]])
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n:m keeps n of every m, with n in 0 to m; got {n}:{m}")
    if scores.shape[1] % m:
        raise ValueError(f"m must divide in_features={scores.shape[1]}; got {m}")
    return _keep_all_but(scores.reshape(-1, m), m - n).view_as(scores)


def mask_model(
    scores: dict[str, Float[Tensor, "out n"]], pattern: Pattern | dict[str, float], *, scope: str = "layer"
) -> Masks:
    """Masks for every layer.

    Args:
        scores: by layer.
        pattern: sparsity, (n, m), or a sparsity for each layer.
        scope: what competes: "row", "layer", or "global" (all layers' weights together). n:m ignores it.

    Raises:
        ValueError: for another scope, or a sparsity for each layer together with "global".
    """
    if isinstance(pattern, tuple):
        return {name: mask_n_of_m(each, *pattern) for name, each in scores.items()}
    if scope not in ("row", "layer", "global"):
        raise ValueError(f"scope must be row, layer or global; got {scope!r}")
    if scope != "global":
        mask = mask_rows if scope == "row" else mask_layer
        of = pattern if isinstance(pattern, dict) else dict.fromkeys(scores, pattern)
        return {name: mask(each, of[name]) for name, each in scores.items()}
    if isinstance(pattern, dict):
        raise ValueError("global pruning takes one sparsity, for the layers share it out; got one for each layer")
    flat = torch.cat([each.flatten() for each in scores.values()])
    parts = mask_layer(flat[None], pattern)[0].split([each.numel() for each in scores.values()])
    return {name: part.view_as(each) for part, (name, each) in zip(parts, scores.items(), strict=True)}


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Writes zeros where a mask is False.

    Raises:
        ValueError: see `masked_layers`; the model is then as it was.
    """
    for name, layer in masked_layers(model, masks).items():
        set_weight_(layer, weight_of(layer) * masks[name])


def masked_layers(model: nn.Module, masks: Masks) -> dict[str, Linear]:
    """The linear layer of each mask, by name.

    Raises:
        ValueError: for a layer that the model lacks, a head whose weight is the embedding table, or a mask of another
            shape than the weight's.
    """
    layers = dict(linear_layers(model, with_head=True))
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"a mask needs a linear layer of its name; the model has no {name!r}")
        if layers[name] is output_head(model) and layers[name].weight is model.get_input_embeddings().weight:
            raise ValueError(f"{name} shares its weight with the embedding table: pruning it would prune both")
        shape = tuple(weight_of(layers[name]).shape)
        if tuple(mask.shape) != shape:
            raise ValueError(f"the mask of {name} must have the weight's shape {shape}; got {tuple(mask.shape)}")
    return {name: layers[name] for name in masks}


def sparsity(model: nn.Module) -> float:
    """Fraction of zeros among the weights of the body's linear layers, packed ones included.

    Raises:
        ValueError: for matrices that stand in no linear layer (`linear_layers`), or where there is no layer at all.
    """
    weights = [*(weight_of(layer) for _, layer in linear_layers(model)), *compressed_weights(model)]
    if not weights:
        raise ValueError(f"sparsity is a share of linear layers' weights; {type(model).__name__} has none")
    return sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)
