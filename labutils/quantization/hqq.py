"""HQQ: no calibration text at all; the zero points are solved so that the weight's own error is sparse.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The norm |·|^p with p < 1 counts
the many small errors and forgives the few outliers.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from labutils.quantization.affine import QParams, Scheme, choose_qparams, grouped


def shrink(x: Float[Tensor, "*shape"], *, p: float, beta: float) -> Float[Tensor, "*shape"]:
    """The generalized soft threshold: sign(x) · max(|x| − |x|^(p−1) / β, 0).

    >>> shrink(torch.tensor([0.01, 4.0]), p=0.5, beta=1.0)
    tensor([0.0000, 3.5000])
    """
    return x.sign() * torch.relu(x.abs() - x.abs().clamp(min=1e-8).pow(p - 1) / beta)


@torch.no_grad()
def hqq(
    weight: Float[Tensor, "out n"],
    scheme: Scheme,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> tuple[Int8[Tensor, "out n"], QParams]:
    """Codes, and scales with zero points z (real numbers here) that minimise |W − S·(Q − z)|^p.

        Q = clamp(round(W / S + z)),   E = shrink(W − S·(Q − z)),   z = mean(Q − (W − E) / S),   β ← κ β

    `dequantize` turns the two into the rounded weight.

    Raises:
        ValueError: for a symmetric scheme, which has no zero point to solve for.
    """
    if scheme.symmetric:
        raise ValueError("HQQ solves for the zero point: the scheme must not be symmetric")
    qparams = choose_qparams(weight, scheme)
    whole, scale, zero = grouped(weight.float(), scheme.group_size), qparams.scale, qparams.zero_point.float()
    best, least = None, torch.inf
    for _ in range(iterations):
        codes = torch.round(whole / scale + zero).clamp(scheme.qmin, scheme.qmax)
        rounded = scale * (codes - zero)
        error = (whole - rounded).abs().pow(p).mean().item()
        if error >= least:
            break
        best, least = (codes.reshape(weight.shape).to(torch.int8), replace(qparams, zero_point=zero)), error
        zero = (codes - (whole - shrink(whole - rounded, p=p, beta=beta)) / scale).mean(dim=-1, keepdim=True)
        beta *= kappa
    return best
