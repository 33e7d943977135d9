"""SignRound: learn for each weight whether it is rounded up or down, by the sign of a gradient.

Cheng et al. 2023 (arXiv:2309.05516); AutoRound is the program. The rounding is round(w/S + V), |V| ≤ ½, and V follows
the straight-through gradient of the layer's output error.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.quantization.affine import Scheme, choose_qparams, dequantize, fake_quantize, grouped, quantize


def sign_round(
    weight: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], scheme: Scheme, *, steps: int = 100
) -> Float[Tensor, "out n"]:
    """The rounding with the least output error d G dᵀ among `steps` of signed gradient descent; the first is plain.

        V ← clamp(V − η · sign(∂ loss / ∂V), −½, ½),   η from 1/steps down to 0 in equal parts

    Each row keeps its own best V. The paper trains a whole block on its text and learns the range as well.

    >>> gram = torch.tensor([[1, 0.99, 0], [0.99, 1, 0], [0, 0, 1]])  # two inputs that are nearly equal
    >>> sign_round(torch.tensor([[0.4, 0.45, 7.0]]), gram, Scheme(bits=4))  # plain: 0, 0, 7
    tensor([[0., 1., 7.]])
    """
    qparams = choose_qparams(weight, scheme)
    step = torch.broadcast_to(qparams.scale, grouped(weight, scheme.group_size).shape).reshape(weight.shape)
    shift, best = torch.zeros_like(weight), fake_quantize(weight, scheme)
    least = torch.full((len(weight), 1), torch.inf)
    for index in range(steps):
        rounded = dequantize(quantize(weight + shift * step, qparams), qparams)
        difference = rounded - weight
        reach = difference @ gram.to(weight)
        loss = (reach * difference).sum(dim=1, keepdim=True)
        best, least = torch.where(loss < least, rounded, best), torch.minimum(loss, least)
        # ∂ (d G dᵀ) / ∂V = 2 S · d G, the rounding passed by
        shift = (shift - (1 - index / steps) / steps * torch.sign(reach)).clamp(-0.5, 0.5)
    return best
