"""Small floats, taken apart into sign, exponent and mantissa bits; MXFP4 and NVFP4, whose blocks share scales."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from labutils.quantization.affine import Scheme, grouped, observed_range


@dataclass(frozen=True)
class FloatFormat:
    """Sign bit, exponent bits E, mantissa bits M; at most 8 bits.

        value = (−1)^s · 2^(e − bias) · (1 + m / 2^M)     for e > 0
        value = (−1)^s · 2^(1 − bias) · (m / 2^M)         for e = 0 (subnormal)

    Attributes:
        exponent_bits: E.
        mantissa_bits: M.
        bias: what is subtracted from the exponent field.
        specials: which codes are no numbers: "ieee": the highest exponent field holds infinity and NaN; "nan": only
            all ones is NaN; "none": every code is a number.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Literal["ieee", "nan", "none"]

    @property
    def largest_code(self) -> int:
        """The code of the largest number."""
        unusable = {"ieee": 2**self.mantissa_bits, "nan": 1, "none": 0}[self.specials]
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - unusable

    @property
    def largest(self) -> float:
        """The largest number."""
        return decode(torch.tensor([self.largest_code], dtype=torch.uint8), self).item()


E4M3 = FloatFormat(4, 3, 7, "nan")  # Micikevicius et al. 2022 (arXiv:2209.05433), table 1: up to 448
E5M2 = FloatFormat(5, 2, 15, "ieee")  # the same: up to 57344
E2M1 = FloatFormat(2, 1, 1, "none")  # OCP Microscaling Formats 1.0: 0, 0.5, 1, 1.5, 2, 3, 4, 6


def decode(codes: UInt8[Tensor, "*shape"], form: FloatFormat) -> Float[Tensor, "*shape"]:
    """Numbers of codes.

    >>> decode(torch.tensor([0b0_0111_000, 0b1_0000_001], dtype=torch.uint8), E4M3).tolist()
    [1.0, -0.001953125]
    """
    bits, mantissa_bits = codes.int(), form.mantissa_bits
    magnitude = bits & (2 ** (form.exponent_bits + mantissa_bits) - 1)
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & (2**mantissa_bits - 1)
    whole = mantissa + torch.where(exponent > 0, 2**mantissa_bits, 0)  # the hidden 1
    value = torch.ldexp(whole.float(), exponent.clamp(min=1) - form.bias - mantissa_bits)
    if form.specials != "none":
        value[magnitude > form.largest_code] = torch.nan
    if form.specials == "ieee":
        value[magnitude == form.largest_code + 1] = torch.inf
    return torch.where(bits > magnitude, -value, value)


def encode(x: Float[Tensor, "*shape"], form: FloatFormat, *, saturate: bool = True) -> UInt8[Tensor, "*shape"]:
    """Codes of the nearest numbers, ties to the even code.

    Args:
        x: numbers.
        form: the format.
        saturate: whether what is too large becomes the largest number; otherwise infinity where there is one, or NaN,
            and infinity and NaN are taken.

    Raises:
        ValueError: for infinity or NaN that would become an ordinary number: in a format without NaN, and when
            `saturate`.

    >>> encode(torch.tensor([0.3, -7.0]), E2M1).tolist()  # 0.5 and −6
    [1, 15]
    """
    x = x.float()
    if (saturate or form.specials == "none") and not x.isfinite().all():
        raise ValueError("x must be finite for a cast that saturates; got inf or nan")
    smallest = 1 - form.bias  # exponent of the smallest normal number, and of all subnormal ones
    exponent = (torch.frexp(x.nan_to_num()).exponent - 1).clamp(min=smallest)
    exponent = torch.where(x == 0, smallest, exponent)
    steps = torch.round(torch.ldexp(x.abs(), form.mantissa_bits - exponent))
    # Codes of growing numbers grow by 1: so many steps above the start of the binade, or carried into the next.
    code = steps.nan_to_num(posinf=0) + (exponent - smallest) * 2**form.mantissa_bits
    too_large = form.largest_code + (0 if saturate or form.specials == "none" else 1)
    code = torch.where(x.isinf(), too_large, code.clamp(max=too_large))
    code = torch.where(x.isnan(), 2 ** (form.exponent_bits + form.mantissa_bits) - 1, code).int()
    return (code | x.signbit().int() << (form.exponent_bits + form.mantissa_bits)).to(torch.uint8)


def fake_quantize_float(x: Float[Tensor, "*shape"], form: FloatFormat, scheme: Scheme) -> Float[Tensor, "*shape"]:
    """What a small float format leaves of x, scaled so that each part's max |x| becomes the format's largest number.

    Only granularity, group size and the scales' dtype of the scheme count.

    Raises:
        ValueError: see `observed_range`.
    """
    low, high = observed_range(x, scheme)
    largest = torch.maximum(-low, high)
    scale = (largest / form.largest).to(scheme.scale_dtype).float().clamp(min=torch.finfo(scheme.scale_dtype).tiny)
    codes = encode(grouped(x.float(), scheme.group_size) / scale, form)
    return (decode(codes, form) * scale).reshape(x.shape).to(x.dtype)


MX_BLOCK, E8M0_BIAS = 32, 127


def mxfp4_quantize(
    x: Float[Tensor, "*rows n"],
) -> tuple[UInt8[Tensor, "*rows n"], UInt8[Tensor, "*rows blocks"]]:
    """MXFP4: E2M1 codes, and for each 32 numbers one shared power of two as an E8M0 code (exponent + 127).

    The exponent is ⌊log2 max |x|⌋ − 2, for E2M1's largest number is 1.5 · 2²; a block of zeros gets exponent 0.
    OCP Microscaling Formats 1.0, section 6.3.

    Raises:
        ValueError: when 32 does not divide the rows, and for an empty tensor, infinity or NaN.

    >>> codes, exponents = mxfp4_quantize(torch.tensor([[12.0] + [1.0] * 31]))
    >>> codes[0, :2].tolist(), exponents.tolist()  # 6 · 2 and 0.5 · 2
    ([7, 1], [[128]])
    """
    low, high = observed_range(x, Scheme(granularity="group", group_size=MX_BLOCK))
    largest = torch.maximum(-low, high)
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1 - 2, 0).clamp(-E8M0_BIAS, E8M0_BIAS)
    codes = encode(torch.ldexp(grouped(x.float(), MX_BLOCK), -exponent), E2M1)
    return codes.reshape(x.shape), (exponent + E8M0_BIAS).squeeze(-1).to(torch.uint8)


def mxfp4_dequantize(
    codes: UInt8[Tensor, "*rows n"], exponents: UInt8[Tensor, "*rows blocks"]
) -> Float[Tensor, "*rows n"]:
    """Numbers of MXFP4 codes and shared exponents."""
    shared = exponents.int()[..., None] - E8M0_BIAS
    return torch.ldexp(grouped(decode(codes, E2M1), MX_BLOCK), shared).reshape(codes.shape)


NV_BLOCK = 16


def nvfp4_quantize(
    x: Float[Tensor, "*rows n"],
) -> tuple[UInt8[Tensor, "*rows n"], UInt8[Tensor, "*rows blocks"], float]:
    """NVFP4: E2M1 codes, an E4M3 scale for each 16 numbers, and one float32 for the whole tensor.

        tensor_scale = max|x| / (6 · 448),   scale_b = E4M3(max|x_b| / (6 · tensor_scale))
        q = E2M1(x / (scale_b · tensor_scale))

    6 and 448 are the largest numbers of E2M1 and E4M3. NVIDIA's Transformer Engine and Blackwell's tensor cores.

    Raises:
        ValueError: when 16 does not divide the rows, and for an empty tensor, infinity or NaN.

    >>> codes, scales, tensor_scale = nvfp4_quantize(torch.tensor([[12.0, 1.0] + [0.0] * 14]))
    >>> codes[0, :2].tolist(), decode(scales, E4M3).tolist(), round(12 / tensor_scale)
    ([7, 1], [[448.0]], 2688)
    """
    low, high = observed_range(x, Scheme(granularity="group", group_size=NV_BLOCK))
    largest = torch.maximum(-low, high)
    tensor_scale = max(largest.max().item() / (E2M1.largest * E4M3.largest), torch.finfo(torch.float32).tiny)
    scales = encode(largest / (E2M1.largest * tensor_scale), E4M3)
    steps = decode(scales, E4M3) * tensor_scale
    ratio = grouped(x.float(), NV_BLOCK) / torch.where(steps > 0, steps, 1.0)
    codes = encode(torch.where(steps > 0, ratio, 0.0), E2M1)
    return codes.reshape(x.shape), scales.squeeze(-1), tensor_scale


def nvfp4_dequantize(
    codes: UInt8[Tensor, "*rows n"], scales: UInt8[Tensor, "*rows blocks"], tensor_scale: float
) -> Float[Tensor, "*rows n"]:
    """Numbers of NVFP4 codes, block scales and the tensor's scale."""
    steps = decode(scales, E4M3)[..., None] * tensor_scale
    return (grouped(decode(codes, E2M1), NV_BLOCK) * steps).reshape(codes.shape)
