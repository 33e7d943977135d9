"""Affine quantization: real numbers as integers with a scale and a zero point.

    q = clamp(round(x / S) + Z, qmin, qmax),    x̂ = S · (q − Z)

Jacob et al. 2017 (arXiv:1712.05877), equation 1. The scale S is a real number (the width of a step), the zero point Z
an integer: the code of 0, which is therefore always exact. A scheme's codes are signed and fit int8.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

GRANULARITIES = ("tensor", "channel", "group", "token")
Rounding = Literal["nearest-even", "stochastic"]


@dataclass(frozen=True)
class Scheme:
    """How a tensor becomes integers.

    Attributes:
        bits: 2 to 8.
        symmetric: Z = 0 and a range as wide below as above; otherwise Z is chosen so that min … max just fits.
        granularity: what shares a scale: the whole "tensor" (the article's "global"), a "channel" (a row of a weight:
            one output), a "group" of neighbours in a row, or a "token" (a row of activations; the same sums as
            "channel", chosen anew for every input).
        group_size: numbers in a group; it must divide the last axis.
        full_range: whether a symmetric scheme also uses the lowest code (−128 of int8), which has no opposite. The
            step is max |x| / qmax all the same, so min–max scaling never reaches that code; clipping may.
        scale_dtype: in what the scales are stored; float16 halves what they cost.

    >>> Scheme(bits=4).qmin, Scheme(bits=4).qmax, Scheme(bits=4, symmetric=False).qmin
    (-7, 7, -8)
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group", "token"] = "channel"
    group_size: int | None = None
    full_range: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits must be a whole number from 2 to 8; got {self.bits}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got {self.granularity!r}")
        by_group = self.granularity == "group"
        if by_group != (self.group_size is not None) or (by_group and self.group_size < 1):
            raise ValueError(f"granularity 'group', and it alone, takes a group_size from 1; got {self.group_size}")

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1)) + (self.symmetric and not self.full_range)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class QParams:
    """Scale and zero point for every part of a tensor, and the range of the codes.

    Attributes:
        scale: float32, rounded to `scale_dtype`; of shape () for the whole tensor, (…, 1) for rows, (…, groups, 1) for
            groups.
        zero_point: int32, of the same shape; real numbers where HQQ solved for them.
        qmin: the lowest code.
        qmax: the highest code.
        group_size: into groups of how many the last axis is cut; None for rows and whole tensors.
    """

    scale: Float[Tensor, "..."]
    zero_point: Int[Tensor, "..."] | Float[Tensor, "..."]
    qmin: int
    qmax: int
    group_size: int | None = None


def grouped(x: Shaped[Tensor, "..."], group_size: int | None) -> Shaped[Tensor, "..."]:
    """The last axis cut into (groups, group_size); the tensor itself where `group_size` is None.

    Raises:
        ValueError: when the size does not divide the axis.
    """
    if group_size is None:
        return x
    if x.ndim == 0 or x.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size} must divide the last axis; got shape {tuple(x.shape)}")
    return x.unflatten(-1, (-1, group_size))


def observed_range(x: Float[Tensor, "..."], scheme: Scheme) -> tuple[Float[Tensor, "*parts"], Float[Tensor, "*parts"]]:
    """Smallest and largest number of each part that shares a scale, in the shape of the scale.

    Raises:
        ValueError: for an empty tensor, and for infinity or NaN.

    >>> observed_range(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), Scheme())
    (tensor([[-2.],
            [ 3.]]), tensor([[1.],
            [4.]]))
    """
    if x.numel() == 0:
        raise ValueError(f"a tensor must hold at least one number to be quantized; got shape {tuple(x.shape)}")
    view = grouped(x.float(), scheme.group_size)
    low, high = view.aminmax() if scheme.granularity == "tensor" or x.ndim == 0 else view.aminmax(dim=-1, keepdim=True)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise ValueError("a tensor must be finite to be quantized; got inf or nan")
    return low, high


def choose_qparams(
    x: Float[Tensor, "..."],
    scheme: Scheme,
    *,
    low: float | Float[Tensor, "*#parts"] | None = None,
    high: float | Float[Tensor, "*#parts"] | None = None,
) -> QParams:
    """Scale and zero point that fit low … high onto the codes; 0 always lies within.

        symmetric:  S = max(|low|, |high|) / qmax,     Z = 0
        affine:     S = (high − low) / (qmax − qmin),  Z = qmin − round(low / S)

    A part of zeros only gets S = 1; no step is finer than the smallest normal number of the scale's dtype.

    Args:
        x: what is to be quantized.
        scheme: bits, symmetry and granularity.
        low: the smallest number that must fit, by default each part's minimum; a higher one clips.
        high: the largest, likewise.

    Raises:
        ValueError: for an empty tensor, for inf or NaN, and for a range that is no range.

    >>> q = choose_qparams(torch.tensor([-1.0, 0.0, 3.0]), Scheme(bits=2, symmetric=False, granularity="tensor"))
    >>> q.scale.item(), q.zero_point.item()  # codes −2 … 1
    (1.3333333730697632, -1)
    """
    smallest, largest = observed_range(x, scheme)
    low = torch.as_tensor(smallest if low is None else low, dtype=torch.float32).expand_as(smallest).clamp(max=0)
    high = torch.as_tensor(largest if high is None else high, dtype=torch.float32).expand_as(largest).clamp(min=0)
    qmin, qmax = scheme.qmin, scheme.qmax
    step = torch.maximum(-low, high) / qmax if scheme.symmetric else (high - low) / (qmax - qmin)
    step = step.to(scheme.scale_dtype).float()
    if not step.isfinite().all():
        raise ValueError(f"the range must give a step that is finite in {scheme.scale_dtype}; got inf or nan")
    scale = torch.where(high - low == 0, 1.0, step.clamp(min=torch.finfo(scheme.scale_dtype).tiny))
    zero_point = torch.zeros_like(scale) if scheme.symmetric else qmin - torch.round(low / scale)
    return QParams(scale, zero_point.clamp(qmin, qmax).int(), qmin, qmax, scheme.group_size)


def quantize(
    x: Float[Tensor, "*shape"],
    qparams: QParams,
    *,
    rounding: Rounding = "nearest-even",
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*shape"]:
    """Codes of x: clamp(round(x / S) + Z, qmin, qmax), as int8, or int32 where the range needs it.

    "nearest-even" rounds a tie to the even neighbour (IEEE 754's default). "stochastic" rounds up with a probability
    equal to the fraction, ⌊x/S + u⌋ with u uniform in [0, 1), so that the mean is right (Gupta et al. 2015,
    arXiv:1502.02551). What lies outside the range saturates.

    Raises:
        ValueError: for infinity or NaN, which would become ordinary numbers, and for an unknown rounding.

    >>> quantize(torch.tensor([0.5, 1.5, -9.0]), QParams(torch.tensor(1.0), torch.tensor(0), -7, 7))
    tensor([ 0,  2, -7], dtype=torch.int8)
    """
    infinite = x.isinf().any()
    ratio = grouped(x.to(torch.promote_types(x.dtype, torch.float32)), qparams.group_size) / qparams.scale
    if infinite or ratio.isnan().any():
        raise ValueError("only a finite number has a code; got inf or nan in x or in the scale")
    if rounding == "nearest-even":
        whole = ratio.round_()
    elif rounding == "stochastic":
        whole = ratio.add_(torch.rand(ratio.shape, generator=generator, device=ratio.device)).floor_()
    else:
        raise ValueError(f"rounding must be 'nearest-even' or 'stochastic'; got {rounding!r}")
    kind = torch.int8 if qparams.qmin >= -128 and qparams.qmax <= 127 else torch.int32
    # In place: a copy of a large model's head is large.
    return whole.add_(qparams.zero_point).clamp_(qparams.qmin, qparams.qmax).to(kind).reshape(x.shape)


def dequantize(codes: Int[Tensor, "*shape"], qparams: QParams) -> Float[Tensor, "*shape"]:
    """Numbers that the codes stand for: S · (q − Z), in float32.

    >>> dequantize(torch.tensor([-3, 5]), QParams(torch.tensor(0.5), torch.tensor(1), -8, 7))
    tensor([-2.,  2.])
    """
    steps = grouped(codes, qparams.group_size).to(torch.int32) - qparams.zero_point
    return (qparams.scale * steps).reshape(codes.shape)


def fake_quantize(
    x: Float[Tensor, "*shape"],
    scheme: Scheme,
    *,
    low: float | Float[Tensor, "*#parts"] | None = None,
    high: float | Float[Tensor, "*#parts"] | None = None,
    rounding: Rounding = "nearest-even",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """What quantization leaves of x: the round trip through its codes, in the dtype of x.

    Raises:
        ValueError: see `choose_qparams`.

    >>> fake_quantize(torch.tensor([[1.0, 0.4, -0.6]]), Scheme(bits=2))
    tensor([[ 1.,  0., -1.]])
    """
    qparams = choose_qparams(x, scheme, low=low, high=high)
    return dequantize(quantize(x, qparams, rounding=rounding, generator=generator), qparams).to(x.dtype)
