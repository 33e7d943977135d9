"""`bench fpga`: what each precision costs on the chip and how fast it could be clocked, over several seeds."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labutils.fpga.hardware import ArraySpec, accumulator_bits
from labutils.fpga.simulate import build_array
from labutils.fpga.synthesis import CHIP, ROUTING, Area, array_area, place_and_route, yosys_script
from labutils.fpga.tools import TOOLS, ToolError, version
from labutils.measurement.timing import quantile

TERMS = 768  # LabLM's longest sum: the accumulators hold it whatever the codes are
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Design:
    """An array, and whether its products go into the chip's multipliers."""

    spec: ArraySpec
    dsp: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.spec}, {'DSP' if self.dsp else 'LUT'}"


@dataclass(frozen=True)
class Result:
    """A row: the array's area alone, and nextpnr's clock for each seed; a note where there is none."""

    design: Design
    area: Area
    fmax_mhz: tuple[float, ...] = ()
    seconds: float = 0.0
    note: str = ""

    @property
    def gmac_per_s(self) -> float | None:
        """Products a second if the array were fed without a pause: the median clock times N² (and lanes)."""
        return quantile(self.fmax_mhz, 0.5) * self.design.spec.multiplications / 1e3 if self.fmax_mhz else None


def spec_for(n: int, x_bits: int, w_bits: int, *, lanes: int = 1, pipelined: bool = True) -> ArraySpec:
    """An array whose sums are as wide as LabLM's longest one needs."""
    return ArraySpec(n, x_bits, w_bits, accumulator_bits(x_bits, w_bits, TERMS), pipelined, lanes)


def designs(n: int) -> list[Design]:
    """The rows of the table."""
    rows = [Design(spec_for(n, 8, 8, pipelined=False), dsp=True), Design(spec_for(n, 8, 8), dsp=True)]
    rows += [Design(spec_for(n, bits, w)) for bits, w in ((8, 8), (8, 4), (4, 4), (3, 3), (1, 1))]
    return [*rows, Design(spec_for(n, 1, 1, lanes=8))]


def bench_fpga(
    n: int, *, seeds: Sequence[int] = SEEDS, say: Callable[[str], None] = print, of: Sequence[Design] | None = None
) -> list[Result]:
    """Synthesises every design and routes it once for each seed.

    Raises:
        ToolError: when the tools are missing or fail; a design that does not fit becomes a row with a note.
    """
    results = []
    for design in designs(n) if of is None else of:
        area, fmax, seconds = array_area(build_array(design.spec), dsp=design.dsp), [], 0.0
        try:
            for seed in seeds:
                placed = place_and_route(build_array(design.spec), dsp=design.dsp, seed=seed)
                fmax.append(placed.fmax_mhz)
                seconds += placed.seconds
            results.append(Result(design, area, tuple(fmax), seconds))
        except ToolError as error:
            if "must fit" not in str(error):
                raise
            results.append(Result(design, area, note=str(error)))
        say(line(results[-1]))
    return results


HEAD = f"{'design':<42}{'LUTs':>6}{'DSPs':>6}{'LUTs/product':>14}{'Fmax MHz':>20}{'GMAC/s bound':>14}{'s/seed':>8}"


def line(result: Result) -> str:
    """One row of the table as text."""
    area, spec = result.area, result.design.spec
    start = f"{result.design.name:<42}{area.luts:>6}{area.dsps:>6}{area.luts / spec.multiplications:>14.1f}"
    if not result.fmax_mhz:
        return f"{start}  {result.note}"
    low, high = min(result.fmax_mhz), max(result.fmax_mhz)
    speed = f"{quantile(result.fmax_mhz, 0.5):.0f} [{low:.0f}, {high:.0f}]"
    return f"{start}{speed:>20}{result.gmac_per_s:>14.1f}{result.seconds / len(result.fmax_mhz):>8.0f}"


def conditions(seeds: Sequence[int]) -> list[str]:
    """What the numbers depend on, one sentence each."""
    versions = ", ".join(f"{tool.package} {version(name)}" for name, tool in TOOLS.items() if name != "ecppack")
    return [
        f"chip: {CHIP['name']}, {CHIP['luts']} tables, {CHIP['dsps']} multipliers; no board: Fmax is nextpnr's model",
        f"sums hold {TERMS} terms; LUTs: four-input tables + 2 for each carry cell, the array alone",
        f"yosys: {yosys_script()} (DSP rows: {yosys_script(dsp=True)})",
        f"nextpnr: {ROUTING} --seed {', '.join(map(str, seeds))}; median and range of Fmax over the seeds",
        f"{versions}, Python {platform.python_version()}",
    ]


def write_results(results: Sequence[Result], n: int, seeds: Sequence[int], path: Path) -> None:
    """The table as JSON, with the command that makes it."""
    rows: list[dict[str, Any]] = []
    for r in results:
        speed = {"fmax_mhz": r.fmax_mhz, "gmac_per_s": r.gmac_per_s, "seconds": round(r.seconds, 1), "note": r.note}
        area = asdict(r.area) | {"luts": r.area.luts, "seconds": round(r.area.seconds, 1)}
        rows.append(
            {"design": r.design.name, "spec": asdict(r.design.spec), "dsp": r.design.dsp, "area": area, **speed}
        )
    command = f"python -m labutils bench fpga --array {n} --json {path.name}"
    whole = {"command": command, "conditions": conditions(seeds), "seeds": list(seeds), "rows": rows}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
