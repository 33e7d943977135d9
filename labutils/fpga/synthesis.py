"""From HDL to area and speed: Yosys makes a netlist of the chip's cells, nextpnr places and routes, ecppack packs.

Nothing runs on a board. Areas count the cells of the netlist; Fmax is nextpnr's timing estimate for one seed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labutils.fpga.simulate import Array
from labutils.fpga.tools import ToolError, run_tool, version
from labutils.lab.paths import tool_cache_dir, written_whole

if TYPE_CHECKING:
    from amaranth.hdl import Module, Signal

CHIP = {"name": "ECP5-25k (LFE5U-25F)", "luts": 24_288, "dsps": 28}  # as nextpnr counts them
ROUTING = "--25k --package CABGA381 --router router1 --freq 400 --timing-allow-fail --lpf-allow-unconstrained"
ROUTE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Area:
    """What a design needs.

    Attributes:
        lut4: tables of four inputs.
        carry: CCU2C cells, two bits of an adder each; one occupies two tables.
        flip_flops: registers of one bit.
        dsps: 18×18-bit multipliers.
        seconds: that Yosys took, when it ran.
    """

    lut4: int
    carry: int
    flip_flops: int
    dsps: int
    seconds: float

    @property
    def luts(self) -> int:
        """Tables occupied: four-input ones, and two for each carry cell."""
        return self.lut4 + 2 * self.carry


@dataclass(frozen=True)
class Placement:
    """A routed design.

    Attributes:
        fmax_mhz: the highest clock that nextpnr's timing model allows.
        used: cells of each kind on the chip, the test shell included.
        cells: name, kind, column and row of every placed cell.
        bitstream_bytes: of the file that would be loaded into the chip.
        seed: of the placer.
        seconds: for synthesis, placing, routing and packing, when they ran.
    """

    fmax_mhz: float
    used: dict[str, int]
    cells: list[tuple[str, str, int, int]]
    bitstream_bytes: int
    seed: int
    seconds: float


def to_rtlil(module: "Module", ports: Sequence["Signal"]) -> str:
    """A module as text for Yosys, without the places of its lines in Python."""
    from amaranth.back import rtlil

    return rtlil.convert(module, ports=list(ports), emit_src=False)


def yosys_script(*, dsp: bool = False, booth: bool = True, wide: bool = False, carry: bool = True) -> str:
    """The commands for Yosys; each choice changes the area, so they belong to every number.

    Args:
        dsp: put products into the chip's multipliers.
        booth: build other products by Booth's recoding.
        wide: let multiplexers join tables to wider ones.
        carry: use the chip's carry chains for additions.

    >>> yosys_script(dsp=True)
    'read_rtlil design.il; proc; synth_ecp5 -top top -noflatten -nowidelut'
    """
    steps = ["read_rtlil design.il", "proc"] + ["booth"] * (booth and not dsp)
    flags = ["" if dsp else " -nodsp", "" if wide else " -nowidelut", "" if carry else " -noccu2"]
    return "; ".join([*steps, "synth_ecp5 -top top -noflatten" + "".join(flags)])


def synthesize(rtlil: str, **choices: bool) -> tuple[Area, dict[str, Any]]:
    """Runs Yosys; returns the area and the netlist, as read from its JSON. Results are kept by what made them.

    Raises:
        ToolError: when Yosys is missing or refuses the design.
    """
    script = yosys_script(**choices)

    def run(folder: Path) -> dict[str, Any]:
        (folder / "design.il").write_text(rtlil, encoding="utf-8")
        start = time.perf_counter()
        run_tool("yosys", ["-q", "-p", f"{script}; tee -q -o stat.json stat -json; write_json netlist.json"], folder)
        seconds = time.perf_counter() - start
        counts = _read(folder / "stat.json")["design"]["num_cells_by_type"]
        return {"counts": counts, "netlist": _read(folder / "netlist.json"), "seconds": seconds}

    found = kept(f"{script}\n{version('yosys')}\n{rtlil}", run)
    numbers = [found["counts"].get(kind, 0) for kind in ("LUT4", "CCU2C", "TRELLIS_FF", "MULT18X18D")]
    return Area(*numbers, seconds=found["seconds"]), found["netlist"]


def array_area(array: Array, **choices: bool) -> Area:
    """The area of an array alone."""
    return synthesize(to_rtlil(array.module, [*array.inputs, *array.ports.sum_out]), **choices)[0]


def scan_shell(array: Array) -> tuple["Module", list["Signal"]]:
    """The array with two pins: a shift register feeds its inputs, another folds its sums into one bit a cycle.

    A chip has too few pins for all of them; and so every path of the array runs from register to register.
    """
    from amaranth.hdl import Cat, Module, Signal

    top, scan_in, scan_out = Module(), Signal(name="scan_in"), Signal(name="scan_out")
    top.submodules.array = array.module
    inputs, sums = Cat(*array.inputs), Cat(*array.ports.sum_out)
    fed = Signal(len(inputs), name="fed", reset_less=True)
    folded = Signal(len(sums), name="folded", reset_less=True)
    top.d.sync += [fed.eq(Cat(scan_in, fed)), folded.eq(Cat(folded[-1], folded[:-1]) ^ sums)]
    top.d.comb += [inputs.eq(fed), scan_out.eq(folded[-1])]
    return top, [scan_in, scan_out]


def place_and_route(array: Array, *, seed: int = 1, **choices: bool) -> Placement:
    """The whole way to a bitstream for an ECP5-25k.

    Raises:
        ToolError: when a tool is missing or fails, and when the design does not fit.
    """
    rtlil, script = to_rtlil(*scan_shell(array)), yosys_script(**choices)
    arguments = f"{ROUTING} --seed {seed} --json netlist.json --write routed.json --report report.json"

    def run(folder: Path) -> dict[str, Any]:
        (folder / "design.il").write_text(rtlil, encoding="utf-8")
        start = time.perf_counter()
        run_tool("yosys", ["-q", "-p", f"{script}; write_json netlist.json"], folder)
        route = [*arguments.split(), "--textcfg", "routed.config"]
        run_tool("nextpnr-ecp5", route, folder, timeout_s=ROUTE_TIMEOUT_S)
        run_tool("ecppack", ["routed.config", "design.bit"], folder)
        report = _read(folder / "report.json")
        return {
            "fmax_mhz": next(iter(report["fmax"].values()))["achieved"],
            "used": {kind: row["used"] for kind, row in report["utilization"].items() if row["used"]},
            "cells": placed_cells(_read(folder / "routed.json")),
            "bitstream_bytes": (folder / "design.bit").stat().st_size,
            "seed": seed,
            "seconds": time.perf_counter() - start,
        }

    try:
        versions = f"{version('yosys')} {version('nextpnr-ecp5')}"
        found = kept(f"{script}\n{arguments}\n{versions}\n{rtlil}", run)
    except ToolError as error:
        if "no BELs remaining" in str(error):
            kind = str(error).rpartition("type ")[2]
            raise ToolError(f"the design must fit the {CHIP['name']}; it has no {kind} left for {array.spec}") from None
        raise
    return Placement(**{**found, "cells": [tuple(cell) for cell in found["cells"]]})


def placed_cells(routed: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """Name, kind, column and row of every cell in nextpnr's JSON: "X57/Y5/SLICEA.FF1" is column 57, row 5."""
    found = []
    for name, cell in routed["modules"]["top"]["cells"].items():
        column, row = cell["attributes"]["NEXTPNR_BEL"].split("/")[:2]
        found.append((name, cell["type"], int(column[1:]), int(row[1:])))
    return found


def kept(key: str, run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The result of run(folder), from the cache where the same key has one."""
    path = tool_cache_dir() / "runs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.is_file():
        return _read(path)
    with written_whole(path) as new:
        new.write_text(json.dumps(run(new.parent)), encoding="utf-8")
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
