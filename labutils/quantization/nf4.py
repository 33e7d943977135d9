"""NF4: sixteen levels where a normal distribution has its numbers, and scales that are quantized themselves."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from labutils.quantization.affine import Scheme, fake_quantize, grouped, observed_range

NF4_BLOCK, SCALE_BLOCK = 64, 256


def nf4_levels() -> Float[Tensor, "16"]:
    """The 16 levels: quantiles of the normal distribution, made to hold −1, 0 and 1.

    Eight at or above 0 and eight at or below it (0 is shared): evenly spaced probabilities between ½ and
    1 − (1/32 + 1/30)/2, their quantiles divided by the largest. Dettmers et al. 2023 (arXiv:2305.14314): equation 4
    has the idea, appendix E the numbers, which this rule reproduces.

    >>> [round(level, 3) for level in nf4_levels().tolist()[5:10]]
    [-0.185, -0.091, 0.0, 0.08, 0.161]
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (torch.linspace(0.5, outermost, n, dtype=torch.float64) for n in (9, 8))
    quantiles = torch.cat([-torch.special.ndtri(below[1:]).flip(0), torch.special.ndtri(above)])
    return (quantiles / quantiles[-1]).float()


def nf4_quantize(
    x: Float[Tensor, "*rows n"], *, block: int = NF4_BLOCK
) -> tuple[UInt8[Tensor, "*rows n"], Float[Tensor, "*rows blocks"]]:
    """Number of the nearest level (0 to 15), and max |x| of each block.

    Raises:
        ValueError: when the block does not divide the rows, and for an empty tensor, infinity or NaN.

    >>> codes, absmax = nf4_quantize(torch.tensor([[2.0, 0.0, -2.0, 0.1]]), block=4)
    >>> codes.tolist(), absmax.tolist()
    ([[15, 7, 0, 8]], [[2.0]])
    """
    low, high = observed_range(x, Scheme(granularity="group", group_size=block))
    absmax = torch.maximum(-low, high)
    levels = nf4_levels().to(x.device)
    ratio = grouped(x.float(), block) / torch.where(absmax > 0, absmax, 1.0)
    codes = torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)
    return codes.reshape(x.shape).to(torch.uint8), absmax.squeeze(-1)


def nf4_dequantize(codes: UInt8[Tensor, "*rows n"], absmax: Float[Tensor, "*rows blocks"]) -> Float[Tensor, "*rows n"]:
    """Numbers of the levels, times each block's max |x|."""
    levels = nf4_levels().to(codes.device)[codes.int()]
    return (levels.unflatten(-1, (absmax.shape[-1], -1)) * absmax[..., None]).reshape(codes.shape)


def double_quantize(absmax: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Scales after a round trip through 8 bits each: minus their mean, in runs of 256 that share a float32.

    Dettmers et al. 2023, section 3, with int8 where the paper has 8-bit floats.
    """
    mean = absmax.mean()
    flat = (absmax - mean).flatten()
    runs = torch.nn.functional.pad(flat, (0, -len(flat) % SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK))
    return (fake_quantize(runs, Scheme()).flatten()[: len(flat)].reshape(absmax.shape) + mean).clamp(min=0)


def nf4_bits_per_weight(*, block: int = NF4_BLOCK, double: bool = True) -> float:
    """4 bits and a block's share of its scale: 32 bits, or with double quantization 8 and 1/256 of 32.

    >>> nf4_bits_per_weight(double=False), round(nf4_bits_per_weight(), 3)
    (4.5, 4.127)
    """
    return 4 + (8 + 32 / SCALE_BLOCK if double else 32) / block
