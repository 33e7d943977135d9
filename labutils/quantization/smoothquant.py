"""SmoothQuant: move the outliers of the activations into the weights, half of the way.

Xiao et al. 2022 (arXiv:2211.10438), equation 4. Nothing is rounded here; `integer_linear` does that afterwards.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from labutils.lab.layers.calibration import InputStatistics
from labutils.lab.layers.linears import weight_of
from labutils.quantization.folding import folds, rescaled, scale_inputs_


def smoothing_scale(
    input_absmax: Float[Tensor, " n"], weight_absmax: Float[Tensor, " n"], alpha: float = 0.5
) -> Float[Tensor, " n"]:
    """The scale s = max|X_j|^α / max|W_j|^(1−α): at α = 0.5 both become sqrt(max|X_j| · max|W_j|).

    >>> smoothing_scale(torch.tensor([64.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor([8., 1.])
    """
    return (input_absmax.clamp(min=1e-5).pow(alpha) / weight_absmax.clamp(min=1e-5).pow(1 - alpha)).clamp(min=1e-5)


@torch.no_grad()
def smooth_(
    model: nn.Module, statistics: Mapping[str, InputStatistics], *, alpha: float = 0.5, after_norms_only: bool = True
) -> dict[str, InputStatistics]:
    """Folds a smoothing scale before each group of layers; the model computes what it computed.

    Args:
        model: of an architecture that `folds` knows.
        statistics: of calibration inputs.
        alpha: how much of the difficulty moves into the weights.
        after_norms_only: as the paper does; otherwise also between linear layers.

    Returns:
        The statistics of the smoothed inputs.
    """
    smoothed = dict(statistics)
    for fold in list(folds(model, after_norms_only=after_norms_only)):
        weight_absmax = torch.stack([weight_of(layer).abs().amax(dim=0) for layer in fold.readers.values()]).amax(dim=0)
        scale = smoothing_scale(statistics[next(iter(fold.readers))].absmax, weight_absmax, alpha)
        scale_inputs_(fold, scale)
        _, of_readers = fold.spread(scale)
        smoothed |= {name: rescaled(statistics[name], 1 / of_readers) for name in fold.readers}
    return smoothed
