"""AWQ: before rounding, enlarge the columns that meet large inputs; then clip what few weights reach.

Lin et al. 2023 (arXiv:2306.00978). Both searches measure the layer's own output error on calibration inputs, so a
model keeps its function until it is rounded.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from labutils.lab.layers.calibration import InputStatistics, layer_error
from labutils.lab.layers.linears import weight_of
from labutils.quantization.affine import QParams, Scheme, choose_qparams, fake_quantize, grouped, observed_range
from labutils.quantization.folding import folds, rescaled, scale_inputs_

ALPHAS = tuple(i / 20 for i in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(10))  # how far a range may be clipped: down to 55% of it
UNCLIPPED = ("q_proj", "k_proj", "query", "key", "c_attn")  # their product goes through a softmax


def awq_scale(mean_abs: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """AWQ's scale, s = mean|x|^α, divided by sqrt(max s · min s) so that its extremes lie evenly around 1.

    >>> awq_scale(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    tensor([0.5000, 1.0000, 2.0000])
    """
    scale = mean_abs.clamp(min=1e-4).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def scale_losses(
    weights: Sequence[Float[Tensor, "out n"]], mean_abs: Float[Tensor, " n"], gram: Float[Tensor, "n n"], scheme: Scheme
) -> dict[float, float]:
    """For each α the loss Σ ||X (W − Q(W·s)/s)ᵀ||² / ||X Wᵀ||² over the layers that read X.

    α = 0 is plain rounding, so the least loss is never above RTN's on the calibration text.
    """
    losses = {}
    for alpha in ALPHAS:
        scale = awq_scale(mean_abs, alpha)
        losses[alpha] = sum(layer_error(w, fake_quantize(w * scale, scheme) / scale, gram) for w in weights)
    return losses


@torch.no_grad()
def awq_scale_(
    model: nn.Module, statistics: Mapping[str, InputStatistics], scheme: Scheme
) -> dict[str, InputStatistics]:
    """Searches and folds a scale before each group of layers; the model computes what it computed.

    Takes statistics with Gram matrices, and returns those of the scaled inputs.
    """
    scaled = dict(statistics)
    for fold in folds(model):
        first = statistics[next(iter(fold.readers))]
        _, mean_abs = fold.spread(first.mean_abs.clamp(min=1e-4))
        losses = scale_losses([weight_of(layer) for layer in fold.readers.values()], mean_abs, first.gram, scheme)
        scale = awq_scale(mean_abs, min(losses, key=losses.get))
        scale_inputs_(fold, scale)
        scaled |= {name: rescaled(statistics[name], 1 / scale) for name in fold.readers}
    return scaled


@torch.no_grad()
def clipped_qparams(name: str, weight: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], scheme: Scheme) -> QParams:
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
