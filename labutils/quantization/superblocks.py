"""Scales of scales: 4-bit codes as in llama.cpp's Q4_K, whose scales and minima are 6-bit codes themselves.

A super-block holds 256 weights in 8 blocks of 32. Each block has a scale and a minimum of 6 bits; two float16 numbers
give those their steps: 4 + 8 · (6 + 6) / 256 + 2 · 16 / 256 = 4.5 bits a weight.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCKS, BLOCK, CODE_MAX, SCALE_MAX = 8, 32, 15, 63
BITS_PER_WEIGHT = 4 + BLOCKS * (6 + 6) / (BLOCKS * BLOCK) + 2 * 16 / (BLOCKS * BLOCK)


def q4_k_round(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """What Q4_K leaves of x: w ≈ d · scale_b · q − d_min · min_b, with q in 0 … 15 and scale_b, min_b in 0 … 63.

        scale_b = round((high_b − low_b) / 15 / d),   min_b = round(−low_b / d_min),   low_b = min(x_b, 0)

    d and d_min are the largest scale and minimum of the super-block over 63, in float16. llama.cpp searches for better
    scales, weighted by an importance matrix; this takes each block's own minimum and maximum.

    Raises:
        ValueError: when 256 does not divide the rows.

    >>> x = (torch.arange(256.0) % 16)[None]  # a step of 1 fits every block
    >>> bool((q4_k_round(x) - x).abs().max() < 0.01)
    True
    """
    if x.shape[-1] % (BLOCKS * BLOCK):
        raise ValueError(f"in_features must be a multiple of {BLOCKS * BLOCK}; got {x.shape[-1]}")
    blocks = x.float().unflatten(-1, (-1, BLOCKS, BLOCK))
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale, minimum = (_in_six_bits(part) for part in ((high - low) / CODE_MAX, -low))
    codes = torch.round((blocks + minimum) / torch.where(scale > 0, scale, 1.0)).clamp(0, CODE_MAX)
    return (scale * codes - minimum).reshape(x.shape).to(x.dtype)


def _in_six_bits(values: Float[Tensor, "*super blocks 1"]) -> Float[Tensor, "*super blocks 1"]:
    step = (values.amax(dim=-2, keepdim=True) / SCALE_MAX).half().float()
    return torch.round(values / torch.where(step > 0, step, 1.0)).clamp(max=SCALE_MAX) * step
