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


def packed_products() -> tuple["Module", list["Signal"]]:
    """Two int4 products x · w0 and x · w1 from one multiplier, x · (w0 + 2^8 w1), and its ports x, w0, w1, y0, y1.

    The lower byte is the first product; the upper is one too small where that is negative.
    """
    from amaranth.hdl import Module, Signal, signed

    m = Module()
    x, w0, w1 = (Signal(signed(4), name=name) for name in ("x", "w0", "w1"))
    y0, y1 = (Signal(signed(8), name=name) for name in ("y0", "y1"))
    factor, product = Signal(signed(13)), Signal(signed(17))
    m.d.comb += [factor.eq(w0 + (w1 << 8)), product.eq(x * factor)]
    m.d.comb += [y0.eq(product[:8]), y1.eq(product[8:] + product[7])]
    return m, [x, w0, w1, y0, y1]


def product_tables(weight: int) -> list[int]:
    """The tables of bits 0 to 7 of x · weight, for 4-bit codes x: LUT4s that are a multiplier by a fixed weight.

    >>> [hex(table) for table in product_tables(1)[:2]]  # bits 0 and 1 of x itself
    ['0xaaaa', '0xcccc']
    """
    codes = [place - 16 * (place >= 8) for place in range(16)]
    return [sum((x * weight >> bit & 1) << place for place, x in enumerate(codes)) for bit in range(8)]


def constant_products(weights: Sequence[int]) -> tuple["Module", list["Signal"]]:
    """Products by fixed weights, each of a 4-bit input of its own, and the ports and so on."""
    from amaranth.hdl import Module, Signal, signed

    m, ports = Module(), []
    for i, weight in enumerate(weights):
        x, y = Signal(signed(4), name=f"x{i}"), Signal(signed(8), name=f"y{i}")
        m.d.comb += y.eq(x * weight)
        ports += [x, y]
    return m, ports


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
