"""Trellis coding: each number's bits shift into a state, and the state names its value; the best path is found at once.

QTIP (Tseng et al. 2024, arXiv:2406.11235). A code of 2 bits a number has 4 values in a scalar quantizer. Here a number
may have one of 2^state_bits values, of which 4 can follow the state before; the decoder needs the bits and a table.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def trellis_round(
    x: Float[Tensor, "rows n"], *, bits: int = 2, state_bits: int = 10, generator: torch.Generator
) -> Float[Tensor, "rows n"]:
    """Each row as the nearest path (Viterbi 1967) through a trellis whose states have random normal values.

    state' = (state · 2^bits + code) mod 2^state_bits. Rows are encoded on their own, from any state: `bits` a number
    and state_bits − bits once a row. Made for normal numbers of variance 1.

    Raises:
        ValueError: when the state holds fewer bits than a code.

    >>> x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    >>> back = trellis_round(x, generator=torch.Generator().manual_seed(0))
    >>> bool((x - back).square().mean() < 0.1175)  # what 2 bits of the best scalar quantizer (Lloyd-Max) leave
    True
    """
    if not 1 <= bits <= state_bits:
        raise ValueError(f"a state must hold at least one code; got state_bits={state_bits} for bits={bits}")
    values = torch.randn(2**state_bits, generator=generator)
    states = torch.arange(2**state_bits)
    # All states that may come before a state: its high bits, behind any bits that were shifted out.
    before = (states >> bits)[:, None] + torch.arange(2**bits) * 2 ** (state_bits - bits)
    cost = (x[:, :1] - values).square()
    came_from = []
    for column in x.T[1:]:
        best = cost[:, before].min(dim=-1)
        came_from.append(before.gather(1, best.indices.T).T)
        cost = best.values + (column[:, None] - values).square()
    path = [cost.argmin(dim=1)]
    for previous in reversed(came_from):
        path.append(previous.gather(1, path[-1][:, None])[:, 0])
    return values[torch.stack(path[::-1], dim=1)]
