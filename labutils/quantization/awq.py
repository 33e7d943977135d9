"""AWQ: before rounding, enlarge the columns that meet large inputs; then clip what few weights reach.

Lin et al. 2023 (arXiv:2306.00978). Both searches measure the layer's own output error on calibration inputs, so a
model keeps its function until it is rounded.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from labutils.layers.calibration import InputStatistics, layer_error
from labutils.layers.linears import weight_of
from labutils.quantization.affine import QParams, Scheme, choose_qparams, fake_quantize, grouped, observed_range
from labutils.quantization.folding import Fold, folds, rescaled, scale_inputs_

ALPHAS = tuple(i / 20 for i in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(10))  # how far a range may be clipped: down to 55% of it
UNCLIPPED = ("q_proj", "k_proj", "query", "key", "c_attn")  # their product goes through a softmax


def awq_scale(mean_abs: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """s = mean|x|^α, divided by sqrt(max s · min s) so that its extremes lie evenly around 1.

    >>> awq_scale(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    tensor([0.5000, 1.0000, 2.0000])
    """
    scale = mean_abs.clamp(min=1e-4).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    fold: Fold, statistics: Mapping[str, InputStatistics], scheme: Scheme
) -> tuple[Float[Tensor, " n"], dict[float, float]]:
    """The best scale for the readers of a fold, and for each α the loss Σ ||(W − Q(W·s)/s) X||² / ||W X||².

    α = 0 is plain rounding, so the best loss is never above RTN's on the calibration text.
    """
    first = statistics[next(iter(fold.readers))]
    losses, scales = {}, {}
    for alpha in ALPHAS:
        scales[alpha] = awq_scale(first.mean_abs, alpha)
        _, scale = fold.spread(scales[alpha])
        weights = [weight_of(layer) for layer in fold.readers.values()]
        losses[alpha] = sum(layer_error(w, fake_quantize(w * scale, scheme) / scale, first.gram) for w in weights)
    return scales[min(losses, key=losses.get)], losses


@torch.no_grad()
def awq_scale_(
    model: nn.Module, statistics: Mapping[str, InputStatistics], scheme: Scheme
) -> dict[str, InputStatistics]:
    """Searches and folds a scale before each group of layers; the model computes what it computed.

    Takes statistics with Gram matrices, and returns those of the scaled inputs.
    """
    scaled = dict(statistics)
    for fold in folds(model):
        scale, _ = search_scale(fold, statistics, scheme)
        scale_inputs_(fold, scale)
        _, of_readers = fold.spread(scale)
        scaled |= {name: rescaled(statistics[name], 1 / of_readers) for name in fold.readers}
    return scaled


@torch.no_grad()
def clipped_qparams(
    name: str, weight: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], scheme: Scheme
) -> QParams:
    """Scale and zero point after the clip search: for each row and group, the range with the least output error.

    The error of a group, dᵀ G d with d = w − ŵ and G its inputs' block of the Gram matrix, is taken by itself, without
    the other groups of its row. Queries and keys are left unclipped, as in the paper's program.
    """
    low, high = observed_range(weight, scheme)
    if name.rpartition(".")[2] in UNCLIPPED:
        return choose_qparams(weight, scheme)
    size = scheme.group_size or weight.shape[1]
    starts = range(0, weight.shape[1], size)
    blocks = torch.stack([gram[start : start + size, start : start + size] for start in starts])
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        difference = grouped(weight - fake_quantize(weight, scheme, low=low * shrink, high=high * shrink), size)
        error = torch.einsum("ogi,gij,ogj->og", difference, blocks, difference).view_as(low)
        best = torch.where(error < least, shrink, best)
        least = torch.minimum(error, least)
    return choose_qparams(weight, scheme, low=low * best, high=high * best)
