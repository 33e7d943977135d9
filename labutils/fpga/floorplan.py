"""Reading a routed design: which cells belong to which processing element, and where they lie."""

import re
from collections import Counter
from dataclasses import dataclass

from labutils.fpga.synthesis import Placement

ELEMENT = re.compile(r"pe_(\d+)_(\d+)\.")
KINDS = {"TRELLIS_COMB": "table", "TRELLIS_FF": "register", "MULT18X18D": "multiplier"}


@dataclass(frozen=True)
class Tile:
    """A place on the chip, and the part of the design that has most of its cells there.

    Attributes:
        column: counted from the left.
        row: counted from the top.
        owner: (k, j) of an element; None for the test shell and for what nextpnr added.
        cells: how many lie here.
        has_dsp: whether a multiplier is among them.
    """

    column: int
    row: int
    owner: tuple[int, int] | None
    cells: int
    has_dsp: bool


def owner_of(name: str) -> tuple[int, int] | None:
    """The element that a cell belongs to, by its name.

    >>> owner_of("array.pe_2_0.x_out_TRELLIS_FF_Q"), owner_of("fed_TRELLIS_FF_Q")
    ((2, 0), None)
    """
    found = ELEMENT.search(name)
    return (int(found[1]), int(found[2])) if found else None


def tiles(placement: Placement) -> list[Tile]:
    """Every occupied place of the chip, pins and clock buffers left out."""
    places: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for name, kind, column, row in placement.cells:
        if kind in KINDS:
            places.setdefault((column, row), []).append((name, kind))
    found = []
    for (column, row), here in sorted(places.items()):
        owner = Counter(owner_of(name) for name, _ in here).most_common(1)[0][0]
        found.append(Tile(column, row, owner, len(here), any(kind == "MULT18X18D" for _, kind in here)))
    return found
