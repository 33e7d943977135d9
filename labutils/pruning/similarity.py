"""Redundancy by similarity: the article's pruning rule as printed, and the rule that it reaches for.

Everything here starts from a Gram matrix G = A Aᵀ of the rows a_i that are compared: weight rows, or what neurons
answered to calibration text (`InputStatistics.gram` of the layer that reads them).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def projection(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """p_ij = a_i·a_j / a_i·a_i: the multiple of row i that comes closest to row j; 0 where row i is zero.

    The article calls it a pruning probability. It is the projection coefficient: it can pass 1, be negative, and is not
    symmetric.

    >>> projection(torch.tensor([[0.09, 0.15], [0.15, 0.25]]))
    tensor([[1.0000, 1.6667],
            [0.6000, 1.0000]])
    """
    power = gram.diagonal()[:, None]
    return torch.where(power > 0, gram / power, 0.0)


def article_prunes(weight: Float[Tensor, "n k"], *, threshold: float, row: int = 0) -> list[int]:
    """The rows j that the article's rule would prune, seen from one row: those with p_ij < threshold.

    >>> article_prunes(torch.tensor([[0.3], [0.5], [0.2]]), threshold=0.5)
    []
    """
    return torch.nonzero(projection(weight @ weight.T)[row] < threshold).flatten().tolist()


def explained(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """cos²(a_i, a_j): which share of row j's power row i explains by itself, between 0 and 1.

    ‖a_j − p_ij a_i‖² = (1 − cos²) ‖a_j‖². A zero row is explained by every other.

    >>> explained(torch.tensor([[4.0, -2.0], [-2.0, 4.0]]))
    tensor([[1.0000, 0.2500],
            [0.2500, 1.0000]])
    """
    power = gram.diagonal()
    whole = power[:, None] * power[None, :]
    return torch.where(whole > 0, gram.square() / whole, (power == 0).float().expand_as(gram))


def redundant_rows(gram: Float[Tensor, "n n"], *, threshold: float) -> dict[int, int]:
    """Rows that a kept row explains to at least `threshold`, each with the kept row that explains it best.

    Strongest rows are kept first; every other one is kept too unless a kept one explains it. Srinivas and Babu 2015
    (arXiv:1507.06149) remove similar neurons in this spirit, from weights alone.

    Raises:
        ValueError: when the threshold is not in (0, 1].

    >>> redundant_rows(torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]), threshold=0.99)
    {1: 0}
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1]; got {threshold}")
    shares = explained(gram)
    kept: list[int] = []
    merged: dict[int, int] = {}
    for row in gram.diagonal().argsort(descending=True, stable=True).tolist():
        best = shares[kept, row].argmax().item() if kept else None
        if best is not None and shares[kept[best], row] >= threshold - 1e-6:
            merged[row] = kept[best]
        else:
            kept.append(row)
    return dict(sorted(merged.items()))


def merge_columns(
    reader: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], merged: dict[int, int]
) -> Float[Tensor, "out n"]:
    """The next layer's weight once the kept neurons speak for the removed ones: column i += p_ij · column j; j is zero.

    >>> gram = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    >>> merge_columns(torch.tensor([[1.0, 10.0]]), gram, {1: 0})
    tensor([[6., 0.]])
    """
    coefficients, result = projection(gram), reader.clone()
    for removed, keeper in merged.items():
        result[:, keeper] += coefficients[keeper, removed] * reader[:, removed]
        result[:, removed] = 0
    return result


def reconstruct(
    weight: Float[Tensor, "out n"], gram: Float[Tensor, "n n"], kept: Int[Tensor, " k"], *, damping: float = 1e-4
) -> Float[Tensor, "out k"]:
    """The kept columns, changed so that ‖W A − Ŵ A_kept‖ is least: all kept inputs together stand in for the removed.

    Ŵ = W G[:, kept] (G[kept, kept] + λI)⁻¹, least squares, with λ = damping · mean diagonal: the OBS update
    (Hassibi and Stork 1993) for columns that go in every row at once.

    >>> gram = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    >>> reconstruct(torch.tensor([[1.0, 10.0]]), gram, torch.tensor([0]), damping=0.0)
    tensor([[6.]])
    """
    among = gram[kept][:, kept].double()
    ridge = damping * among.diagonal().mean().clamp_min(1e-12) * torch.eye(len(kept), dtype=torch.float64)
    target = weight.double() @ gram[:, kept].double() + weight[:, kept].double() @ ridge
    return torch.linalg.solve(among + ridge, target, left=False).to(weight.dtype)
