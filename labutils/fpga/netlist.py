"""A netlist evaluated in numpy: every four-input table of the chip is a word of sixteen bits."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from labutils.fpga.synthesis import Area, synthesize, to_rtlil

if TYPE_CHECKING:
    from amaranth.hdl import Module, Signal

CONSTANTS = {"0": False, "1": True, "x": False, "z": False}


def multiplier(bits: int) -> tuple["Module", list["Signal"]]:
    """A bare signed b×b multiplier, x · w = y, and its ports."""
    from amaranth.hdl import Module, Signal, signed

    m = Module()
    x, w = (Signal(signed(bits), name=name) for name in "xw")
    y = Signal(signed(2 * bits), name="y")
    m.d.comb += y.eq(x * w)
    return m, [x, w, y]


def multiplier_netlist(bits: int, *, booth: bool = True) -> tuple[Area, dict[str, Any]]:
    """Synthesises a multiplier into nothing but four-input tables: no carry chains, no wide multiplexers."""
    return synthesize(to_rtlil(*multiplier(bits)), booth=booth, carry=False)


def lut4(table: int, inputs: Sequence[Bool[np.ndarray, " cases"]]) -> Bool[np.ndarray, " cases"]:
    """Bit a + 2b + 4c + 8d of a sixteen-bit table, for many cases at once.

    >>> a, b = np.array([False, True, False, True]), np.array([False, False, True, True])
    >>> lut4(0x8888, [a, b, a, a]).tolist()  # 1000 for each value of c and d: AND
    [False, False, False, True]
    """
    place = sum(bit.astype(np.int64) << i for i, bit in enumerate(inputs))
    return (table >> place & 1).astype(bool)


def evaluate(netlist: Mapping[str, Any], inputs: Mapping[str, Int[np.ndarray, " cases"]], output: str) -> np.ndarray:
    """The unsigned word at an output for every case, from Yosys' JSON.

    Raises:
        ValueError: for a cell that is no LUT4, and for tables that wait for one another.
    """
    module = netlist["modules"]["top"]
    wires: dict[int | str, np.ndarray | bool] = dict(CONSTANTS)
    for name, words in inputs.items():
        for i, wire in enumerate(module["ports"][name]["bits"]):
            wires[wire] = (words >> i & 1).astype(bool)
    waiting = [cell for cell in module["cells"].values() if cell["type"] != "$scopeinfo"]
    if kinds := sorted({cell["type"] for cell in waiting} - {"LUT4"}):
        raise ValueError(f"a netlist to be evaluated must hold LUT4 only; got {', '.join(kinds)}")
    cases = len(next(iter(inputs.values())))
    while waiting:
        ready = [cell for cell in waiting if all(cell["connections"][pin][0] in wires for pin in "ABCD")]
        if not ready:
            raise ValueError(f"tables must form no loop; {len(waiting)} wait for one another")
        for cell in ready:
            bits = [np.broadcast_to(wires[cell["connections"][pin][0]], cases) for pin in "ABCD"]
            wires[cell["connections"]["Z"][0]] = lut4(int(cell["parameters"]["INIT"], 2), bits)
        waiting = [cell for cell in waiting if cell["connections"]["Z"][0] not in wires]
    out = [np.broadcast_to(wires[wire], cases) for wire in module["ports"][output]["bits"]]
    return sum(bit.astype(np.int64) << i for i, bit in enumerate(out))


def all_products(bits: int, *, booth: bool = True) -> tuple[Area, np.ndarray, np.ndarray]:
    """Evaluates a multiplier's netlist for all 4^b pairs; returns area, what the tables say, what x · w is."""
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    x, w = (grid.flatten() for grid in np.meshgrid(codes, codes))
    area, netlist = multiplier_netlist(bits, booth=booth)
    mask = 2**bits - 1
    word = evaluate(netlist, {"x": x & mask, "w": w & mask}, "y")
    half = 2 ** (2 * bits - 1)
    return area, (word ^ half) - half, x * w
