"""Where to cut: ranges narrower than min … max spend the codes where most numbers are.

Each function returns (low, high) in the shape of the scale, for `choose_qparams`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.quantization.affine import Scheme, choose_qparams, dequantize, grouped, observed_range, quantize

Range = tuple[Float[Tensor, "*parts"], Float[Tensor, "*parts"]]


def percentile_range(x: Float[Tensor, "..."], scheme: Scheme, *, percent: float) -> Range:
    """Low and high such that `percent` of each part's numbers are at most high, and as many at least low.

    Nearest rank: the k-th smallest of n numbers with k = ⌈n · percent / 100⌉, and the k-th largest.

    Raises:
        ValueError: when percent is not in (50, 100], and see `observed_range`.

    >>> percentile_range(torch.arange(10.0), Scheme(granularity="tensor"), percent=90)
    (tensor(1.), tensor(8.))
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percent must be above 50 and at most 100; got {percent}")
    shape = observed_range(x, scheme)[0].shape
    parts = x.float().reshape(math.prod(shape), -1)
    count = parts.shape[1]
    rank = math.ceil(count * percent / 100)
    low, high = (parts.kthvalue(k, dim=1).values.reshape(shape) for k in (count + 1 - rank, rank))
    return low, high


def mse_range(x: Float[Tensor, "..."], scheme: Scheme, *, smallest: float = 0.2, steps: int = 80) -> Range:
    """The share of min … max, the same above and below, with the smallest squared error in each part.

    A plain search over `steps` + 1 shares from 1 down to `smallest`; 1 is among them, so it is never worse than
    min–max. (In closed form for known distributions: Banner et al. 2018, arXiv:1810.05723.)

    Raises:
        ValueError: when smallest is not in (0, 1), and see `observed_range`.
    """
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must be a share between 0 and 1; got {smallest}")
    low, high = observed_range(x, scheme)
    best_share, best_error = torch.ones_like(low), torch.full_like(low, torch.inf)
    for share in torch.linspace(1, smallest, steps + 1).tolist():
        qparams = choose_qparams(x, scheme, low=low * share, high=high * share)
        squares = grouped((dequantize(quantize(x, qparams), qparams) - x.float()).square(), scheme.group_size)
        error = squares.sum() if low.ndim == 0 else squares.sum(dim=-1, keepdim=True)
        better = error < best_error
        best_share, best_error = torch.where(better, share, best_share), torch.where(better, error, best_error)
    return low * best_share, high * best_share
