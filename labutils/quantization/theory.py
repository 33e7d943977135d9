"""How much noise rounding makes: predicted from the step alone, and measured."""

import math

from jaxtyping import Float
from torch import Tensor

from labutils.quantization.affine import QParams


def sqnr_db(x: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """Signal-to-quantization-noise ratio in decibels: 10 log10(Σ x² / Σ (x − x̂)²); infinite without noise.

    >>> import torch
    >>> sqnr_db(torch.tensor([10.0, 10.0]), torch.tensor([9.0, 11.0]))
    20.0
    """
    signal, noise = (t.double().square().sum().item() for t in (x, approximation.double() - x.double()))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def predicted_sqnr_db(x: Float[Tensor, "*shape"], qparams: QParams) -> float:
    """SQNR if every error is uniform within ± half a step: noise S²/12.

    Bennett 1948; one bit more halves S and adds 20 log10 2 = 6.02 dB. It takes no clipping into account, nor that few
    codes, or many equal numbers, leave errors that are not uniform.

    >>> import torch
    >>> round(predicted_sqnr_db(torch.tensor([1.0]), QParams(torch.tensor(0.1), torch.tensor(0), -7, 7)), 2)
    30.79
    """
    signal = x.double().square().mean().item()
    noise = qparams.scale.double().square().mean().item() / 12
    return 10 * math.log10(signal / noise) if signal else -math.inf


def gaussian_sqnr_db(bits: int, clip: float) -> float:
    """SQNR of normal numbers (σ = 1) with 2^bits steps in −clip … clip: uniform noise inside, cut tails outside.

        noise = Δ²/12 · (1 − 2Q(c)) + 2 [(1 + c²) Q(c) − c φ(c)],   Δ = 2c / 2^bits

    with φ the normal density and Q its upper tail: the second term is ∫ (x − c)² φ(x) over both tails.
    Banner et al. 2018 (arXiv:1810.05723) weigh the same two terms.

    >>> round(gaussian_sqnr_db(8, 4.0), 1), round(gaussian_sqnr_db(8, 2.0), 1)  # 2 cuts too much
    (40.6, 19.4)
    """
    tail = math.erfc(clip / math.sqrt(2)) / 2
    density = math.exp(-clip * clip / 2) / math.sqrt(2 * math.pi)
    inside = (2 * clip / 2**bits) ** 2 / 12 * (1 - 2 * tail)
    return -10 * math.log10(inside + 2 * ((1 + clip * clip) * tail - clip * density))


def gaussian_bound_db(bits: float, variances: Float[Tensor, " parts"]) -> float:
    """The best SQNR that a code of `bits` a number can reach on normal numbers with these variances, equally many each.

        R(D) = mean of max(½ log2(σ²/θ), 0),   D = mean of min(θ, σ²)

    (Cover and Thomas, Elements of Information Theory, theorem 10.3.3: θ is a water level.) For one variance that is
    20 log10 2 = 6.02 dB a bit. A uniform scalar quantizer stays 1.53 dB below it even with an ideal entropy code.

    >>> import torch
    >>> round(gaussian_bound_db(2, torch.ones(3)), 2), round(gaussian_bound_db(2, torch.tensor([1.0, 4.0])), 2)
    (12.04, 13.01)
    """
    variances = variances.double()
    low, high = 0.0, variances.max().item()
    for _ in range(60):  # bisection: the rate falls as the water rises
        level = (low + high) / 2
        rate = (variances / level).clamp(min=1).log2().mean().item() / 2
        low, high = (level, high) if rate > bits else (low, level)
    return 10 * math.log10(variances.mean().item() / variances.clamp(max=level).mean().item())
