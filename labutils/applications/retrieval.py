"""Finding texts: hashed vectors, exact search, and an index that looks at a few cells only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

Vectors = Float[Tensor, "texts width"]


def document_weights(rows: Sequence[Sequence[int]]) -> dict[int, float]:
    """Ln(N / documents that hold it) of each n-gram: what occurs everywhere says nothing (Spärck Jones 1972).

    >>> document_weights([[1, 2], [1]])
    {1: 0.0, 2: 0.6931471824645996}
    """
    counts = Counter(gram for row in rows for gram in set(row))
    values = torch.log(len(rows) / torch.tensor(list(counts.values()), dtype=torch.float32))
    return dict(zip(counts, values.tolist(), strict=True))


def hashed_vectors(rows: Sequence[Sequence[int]], weights: dict[int, float], *, width: int, seed: int = 0) -> Vectors:
    """Unit vectors of texts: each n-gram adds its weight to `width` places with random signs (Achlioptas 2003).

    Inner products of the long vectors of weights survive in short ones, up to noise of about 1/√width.

    Args:
        rows: N-gram numbers of each text.
        weights: Of each n-gram; an unknown one adds nothing.
        width: Length of the vectors.
        seed: Of the signs.
    """
    size = max(weights, default=0) + 1
    signs = torch.randint(2, (size, width), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
    known = [[gram for gram in row if gram in weights] for row in rows]
    sums = [(signs[row] * torch.tensor([weights[g] for g in row])[:, None]).sum(dim=0) for row in known]
    return normalize(torch.stack(sums), dim=1)


def exact_search(vectors: Vectors, query: Float[Tensor, " width"], count: int) -> list[int]:
    """The `count` texts with the highest inner product, best first; every vector is read.

    >>> exact_search(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([0.0, 1.0]), 2)
    [1, 2]
    """
    return (vectors @ query).topk(min(count, len(vectors))).indices.tolist()


class CellIndex:
    """An inverted file (IVF): vectors sorted into cells, of which a search reads the most promising ones only.

    The cells are those of k-means on the unit sphere (Sivic and Zisserman 2003; Jégou et al. 2011 for the name).

    Args:
        vectors: Of unit length.
        cells: About √texts is usual.
        steps: Of k-means.
        seed: Of its beginning.

    Attributes:
        centres: A unit vector for each cell.
        starts: Where each cell begins among the sorted vectors; the last is where they end.

    Raises:
        ValueError: If there are more cells than vectors, or none.
    """

    def __init__(self, vectors: Vectors, *, cells: int, steps: int = 8, seed: int = 0) -> None:
        if not 1 <= cells <= len(vectors):
            raise ValueError(f"cells must number 1 to texts={len(vectors)}; got {cells}")
        first = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:cells]
        self.centres = vectors[first].clone()
        for _ in range(steps):
            cell = (vectors @ self.centres.T).argmax(dim=1)
            sums = torch.zeros_like(self.centres).index_add_(0, cell, vectors)
            lives = sums.norm(dim=1) > 0  # an empty cell keeps its centre
            self.centres[lives] = normalize(sums[lives], dim=1)
        cell = (vectors @ self.centres.T).argmax(dim=1)
        self.order: Int[Tensor, " texts"] = cell.argsort(stable=True)
        self.sorted = vectors[self.order].contiguous()
        self.starts = [0, *cell.bincount(minlength=cells).cumsum(0).tolist()]

    def search(self, query: Float[Tensor, " width"], count: int, *, cells: int) -> list[int]:
        """The best `count` texts of the `cells` cells whose centres are nearest.

        Raises:
            ValueError: If no cell is to be read.
        """
        if cells < 1:
            raise ValueError(f"a search must read at least 1 cell; got {cells}")
        near = (self.centres @ query).topk(min(cells, len(self.centres))).indices.tolist()
        slices = [slice(self.starts[c], self.starts[c + 1]) for c in near]
        products = torch.cat([self.sorted[s] @ query for s in slices])
        texts = torch.cat([self.order[s] for s in slices])
        return texts[products.topk(min(count, len(products))).indices].tolist()


def recall(found: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> float:
    """The mean share of each query's true neighbours that were found.

    >>> recall([[1, 2], [3, 4]], [[1, 9], [4, 3]])
    0.75

    Raises:
        ValueError: If the queries differ in number, or one has no true neighbour.
    """
    if len(found) != len(true) or not true or not all(true):
        raise ValueError(f"recall needs true neighbours for each query; got {len(found)} and {len(true)} queries")
    return sum(len(set(f) & set(t)) / len(set(t)) for f, t in zip(found, true, strict=True)) / len(true)
