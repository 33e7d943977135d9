"""The arithmetic of a TPU's matrix unit: tiles, padding, and where a systolic array idles.

A weight-stationary array of size × size cells holds one tile of the weights. Rows of the input enter from the left,
each cell multiplies and adds, partial sums leave below (Kung 1982; Jouppi et al. 2017, arXiv:1704.04760, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from jaxtyping import Int

LANES, SUBLANE_BYTES = 128, 32  # a vector register holds 8 × 128 numbers of 4 bytes


def tile_of(element_bytes: int) -> tuple[int, int]:
    """Rows and columns of the smallest tile: 8 × 128 in float32, 16 × 128 in bfloat16, 32 × 128 in int8.

    >>> tile_of(4), tile_of(2), tile_of(1)
    ((8, 128), (16, 128), (32, 128))

    Raises:
        ValueError: If numbers of that size have no tile.
    """
    if element_bytes not in (1, 2, 4):
        raise ValueError(f"element_bytes must be 1, 2 or 4; got {element_bytes}")
    return SUBLANE_BYTES // element_bytes, LANES


def padded_shape(rows: int, columns: int, element_bytes: int) -> tuple[int, int]:
    """The shape that a matrix takes up in a TPU's memory: both axes rounded up to whole tiles.

    >>> padded_shape(1, 300, 4)
    (8, 384)
    """
    tile = tile_of(element_bytes)
    return ceil(rows / tile[0]) * tile[0], ceil(columns / tile[1]) * tile[1]


def array_cycles(rows: int, inner: int, columns: int, *, size: int = LANES) -> int:
    """Cycles for (rows × inner) · (inner × columns): each weight tile is loaded, then the rows stream through it.

    cycles = ⌈inner/size⌉ · ⌈columns/size⌉ · (size + rows + 2·size − 2): load, stream, and drain the last row. A real
    unit loads the next tile while it works on this one; then the load is hidden where rows ≥ size.

    >>> array_cycles(1, 2, 2, size=2)
    5
    """
    return ceil(inner / size) * ceil(columns / size) * (size + rows + 2 * size - 2)


def mxu_utilisation(rows: int, inner: int, columns: int, *, size: int = LANES) -> float:
    """Share of all cells and cycles that do a multiplication somebody asked for.

    utilisation = rows · inner · columns / (size² · cycles)

    >>> mxu_utilisation(1, 2, 2, size=2)
    0.2
    """
    return rows * inner * columns / (size**2 * array_cycles(rows, inner, columns, size=size))


@dataclass(frozen=True)
class ArrayRun:
    """A product computed by the simulated array, its cycles, and how many cells worked on asked-for numbers in all."""

    product: Int[np.ndarray, "rows columns"]
    cycles: int
    busy: int

    def utilisation(self, size: int) -> float:
        """Busy cells over all cells and cycles."""
        return self.busy / (size**2 * self.cycles)


def simulate_array(
    inputs: Int[np.ndarray, "rows inner"], weights: Int[np.ndarray, "inner columns"], *, size: int
) -> ArrayRun:
    """Multiplies integers on a simulated array, cycle by cycle, tile after tile."""
    (rows, inner), columns = inputs.shape, weights.shape[1]
    product, cycles, busy = np.zeros((rows, columns), np.int64), 0, 0
    for top in range(0, inner, size):
        for left in range(0, columns, size):
            part = weights[top : top + size, left : left + size]
            tile = np.zeros((size, size), np.int64)
            tile[: part.shape[0], : part.shape[1]] = part
            sums, tile_busy = _stream(inputs[:, top : top + size], tile, part.shape)
            product[:, left : left + part.shape[1]] += sums[:, : part.shape[1]]
            cycles, busy = cycles + size + rows + 2 * size - 2, busy + tile_busy
    return ArrayRun(product, cycles, busy)


def _stream(inputs: np.ndarray, tile: np.ndarray, used: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Streams rows through one tile: row r's number k enters the array's row k in cycle r + k."""
    size, rows = len(tile), len(inputs)
    moving, there = np.zeros((size, size), np.int64), np.zeros((size, size), bool)  # what each cell hands to the right
    falling, sums, busy = np.zeros((size, size), np.int64), np.zeros((rows, size), np.int64), 0
    for cycle in range(rows + 2 * size - 2):
        moving, there = np.roll(moving, 1, axis=1), np.roll(there, 1, axis=1)
        for k in range(size):
            row = cycle - k
            there[k, 0] = 0 <= row < rows
            moving[k, 0] = inputs[row, k] if there[k, 0] and k < used[0] else 0
        falling = np.vstack([np.zeros((1, size), np.int64), falling[:-1]]) + moving * tile
        busy += int(there[: used[0], : used[1]].sum())
        for column in range(size):
            row = cycle - (size - 1) - column
            if 0 <= row < rows:
                sums[row, column] = falling[-1, column]
    return sums, busy
