"""A layer in integers from end to end, as hardware without a floating-point unit computes it.

    q_y = Z_y + M · (q_b + Σ (q_x − Z_x) q_w),    M = s_x s_w / s_y,    q_b = round(b / (s_x s_w))

Jacob et al. 2017 (arXiv:1712.05877), section 2.2 to 2.4: int8 × int8 summed in int32, the bias in int32, and M as a
31-bit multiplier and a shift.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor

from labutils.quantization.affine import QParams, Scheme, choose_qparams, quantize

INT32_MAX = 2**31 - 1


def quantize_bias(
    bias: Float[Tensor, " out_features"], x_scale: float, weight_scale: Float[Tensor, " out_features"]
) -> Int32[Tensor, " out_features"]:
    """The bias in int32 at the scale of the sums it is added to, s_x · s_w.

    Raises:
        ValueError: when a code does not fit int32.

    >>> quantize_bias(torch.tensor([0.6]), 0.5, torch.tensor([0.1])).tolist()
    [12]
    """
    codes = torch.round(bias.double() / (x_scale * weight_scale.double()))
    if not (codes.abs() <= INT32_MAX).all():
        raise ValueError(f"a bias over s_x s_w must fit int32; got up to {codes.abs().max().item():.3g}")
    return codes.to(torch.int32)


def fixed_point(multiplier: float) -> tuple[int, int]:
    """An integer m and a shift n with multiplier ≈ m / 2^n: m has 31 bits, so the relative error is under 2⁻³⁰.

    Jacob et al. 2017, equation 6 (their M0 = m / 2³¹).

    Raises:
        ValueError: for what is no positive number, or outside 2⁻³¹ … 2²⁹.

    >>> fixed_point(0.75), fixed_point(0.001)
    ((1610612736, 31), (1099511628, 40))
    """
    if not 2.0**-31 <= multiplier < 2.0**29:
        raise ValueError(f"a multiplier must lie in 2**-31 to 2**29; got {multiplier}")
    fraction, exponent = math.frexp(multiplier)  # fraction in [0.5, 1)
    whole = round(fraction * 2**31)
    return (whole // 2, 30 - exponent) if whole == 2**31 else (whole, 31 - exponent)


def requantize(
    sums: Int32[Tensor, "*shape"],
    multiplier: Int[Tensor, "*#shape"],
    shift: Int[Tensor, "*#shape"],
    *,
    zero_point: int,
    qmin: int = -128,
    qmax: int = 127,
) -> Int8[Tensor, "*shape"]:
    """Int32 sums to int8 codes: clamp(Z + ⌊(sums · multiplier + 2^(shift − 1)) / 2^shift⌋), in integers only.

    One rounding, ties upwards. (gemmlowp rounds twice, after the multiplication and after the shift, and may differ
    by one.)

    >>> requantize(torch.tensor([10, -10], dtype=torch.int32), *map(torch.tensor, fixed_point(0.25)), zero_point=1)
    tensor([ 4, -1], dtype=torch.int8)
    """
    product = sums.long() * multiplier.long() + (1 << (shift.long() - 1))
    return ((product >> shift.long()) + zero_point).clamp(qmin, qmax).to(torch.int8)


@dataclass(frozen=True)
class IntegerLinear:
    """y = x Wᵀ + b on codes: weights symmetric for each output, activations with one scale and zero point.

    Attributes:
        weight: codes.
        bias: codes at s_x · s_w, with −Z_x Σ q_w already in it.
        multiplier: of each output, 31 bits.
        shift: of each output.
        y: scale, zero point and range of the output.
    """

    weight: Int8[Tensor, "out_features in_features"]
    bias: Int32[Tensor, " out_features"]
    multiplier: Int[Tensor, " out_features"]
    shift: Int[Tensor, " out_features"]
    y: QParams

    @classmethod
    def prepare(
        cls,
        weight: Float[Tensor, "out_features in_features"],
        bias: Float[Tensor, " out_features"],
        *,
        x: QParams,
        y: QParams,
    ) -> "IntegerLinear":
        """Everything that is a float is used up here; `x` and `y` come from watching the layer at work.

        Raises:
            ValueError: when sums could leave int32, and see `quantize_bias` and `fixed_point`.
        """
        w = choose_qparams(weight, Scheme())
        codes, scale = quantize(weight, w), w.scale.flatten()
        folded = quantize_bias(bias, x.scale.item(), scale).long() - x.zero_point.item() * codes.sum(dim=1)
        largest_sum = folded.abs() + 128 * codes.long().abs().sum(dim=1)
        if (largest_sum > INT32_MAX).any():
            raise ValueError(f"every sum must fit int32; the inputs could give {largest_sum.max().item()}")
        pairs = [fixed_point(m) for m in (x.scale.item() * scale.double() / y.scale.item()).tolist()]
        multiplier, shift = (torch.tensor(column) for column in zip(*pairs, strict=True))
        return cls(codes, folded.int(), multiplier, shift, y)

    def __call__(self, x: Int8[Tensor, "rows in_features"]) -> Int8[Tensor, "rows out_features"]:
        """Codes in, codes out; no float in between."""
        sums = x.int() @ self.weight.int().T + self.bias
        y = self.y
        return requantize(sums, self.multiplier, self.shift, zero_point=y.zero_point.item(), qmin=y.qmin, qmax=y.qmax)
