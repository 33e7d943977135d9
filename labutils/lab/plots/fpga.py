"""Figures of the FPGA chapter: data marching through the array, area by bits, the floorplan, the board's roofline."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from labutils.fpga.floorplan import tiles
from labutils.fpga.hardware import ArraySpec
from labutils.fpga.simulate import March, with_loading
from labutils.fpga.synthesis import CHIP, Placement
from labutils.lab.plots.pruning import plain_log_axis
from labutils.lab.plots.style import PALETTE, series_style

SHELL, IDLE = "0.75", "0.93"
COLUMNS, ROWS = 73, 50  # places of the ECP5-25k


def draw_cycle(ax: Axes, march: March, cycle: int) -> None:
    """Every element in one cycle: its weight w, the row of x at its left, the sum Σ below. One colour, one row of x."""
    n = march.weights.shape[1]
    for k in range(n):
        for j in range(n):
            row = march.row_at(cycle, k, j)
            color = IDLE if row is None else PALETTE[row % len(PALETTE)]
            ax.add_patch(Rectangle((j, k), 0.94, 0.94, facecolor=color, alpha=1 if row is None else 0.45))
            w, x, total = (int(part[cycle, k, j]) for part in (march.weights, march.inputs, march.sums))
            feed = "-" if row is None else f"x{row} = {x}"
            ax.text(j + 0.47, k + 0.47, f"w = {w}\n{feed}\nΣ = {total}", ha="center", va="center", fontsize=8)
    phase = "weights move down" if cycle < n else f"{march.busy(cycle)} of {n * n} multiply"
    ax.set(xlim=(0, n), ylim=(n, 0), xticks=(), yticks=(), aspect="equal")
    ax.set_title(f"cycle {cycle}: {phase}", fontsize=10)
    ax.set(xlabel="sums move down", ylabel="inputs move right")


def march_table(march: March, cycle: int) -> str:
    """One cycle as text: weight, input (and which row of x it is of), sum of every element."""
    n = march.weights.shape[1]
    lines = [f"cycle {cycle}: {march.busy(cycle)} of {n * n} multiply"]
    for k in range(n):
        cells = []
        for j in range(n):
            row = march.row_at(cycle, k, j)
            x = "-" if row is None else f"{march.inputs[cycle, k, j]} (x{row})"
            cells.append(f"w {march.weights[cycle, k, j]:>3}  x {x:<9} Σ {march.sums[cycle, k, j]:>5}")
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def draw_area(ax: Axes, areas: Mapping[str, tuple[float, float]]) -> None:
    """LUTs for one product, by precision: the multiplier's share and the adder's."""
    names = list(areas)
    multipliers, adders = np.array([areas[name] for name in names]).T
    ax.bar(names, multipliers, color=PALETTE[0], label="multiplier")
    ax.bar(names, adders, bottom=multipliers, color=PALETTE[1], hatch="//", edgecolor="white", label="adder")
    totals = multipliers + adders
    for i, total in enumerate(totals):
        ax.text(i, total, f"{total:.0f}", ha="center", va="bottom")
    ax.set(
        ylabel="LUTs per product", title=f"{names[0]} takes {totals[0] / totals[-1]:.0f} times the area of {names[-1]}"
    )
    ax.tick_params(axis="x", rotation=20)
    ax.grid(alpha=0.25, axis="y")
    ax.legend()


def draw_floorplan(chip: Axes, zoom: Axes, placement: Placement, spec: ArraySpec) -> None:
    """The routed design on the whole chip, and enlarged: a colour and "k,j" for each element, grey for the shell."""
    places = tiles(placement)
    for ax in (chip, zoom):
        for tile in places:
            k, j = tile.owner or (0, 0)
            color = SHELL if tile.owner is None else PALETTE[(k * spec.n + j) % 6]
            edge = "black" if tile.has_dsp else "white"
            square = {"facecolor": color, "edgecolor": edge, "linewidth": 0.6, "alpha": 0.8}
            ax.add_patch(Rectangle((tile.column - 0.5, tile.row - 0.5), 1, 1, **square))
        ax.set(xlabel="column of the chip", ylabel="row of the chip", aspect="equal")
    mine = [tile for tile in places if tile.owner is not None]
    for owner in sorted({tile.owner for tile in mine}):
        spots = np.array([(tile.column, tile.row) for tile in mine if tile.owner == owner])
        middle = spots[np.abs(spots - np.median(spots, axis=0)).sum(axis=1).argmin()]  # a place of its own
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        zoom.text(*middle, f"{owner[0]},{owner[1]}", ha="center", va="center", fontsize=7, bbox=white)
    columns, rows = [tile.column for tile in mine], [tile.row for tile in mine]
    zoom.set(xlim=(min(columns) - 1, max(columns) + 1), ylim=(max(rows) + 1, min(rows) - 1))
    chip.set(xlim=(-1, COLUMNS), ylim=(ROWS + 1, -1))
    chip.set_title(f"{placement.used['TRELLIS_COMB'] / CHIP['luts']:.1%} of the chip's tables, test shell included")
    zoom.set_title(f"{spec}: {placement.fmax_mhz:.0f} MHz")


def draw_board(
    ax: Axes, arrays: Mapping[str, tuple[ArraySpec, float, float]], bandwidth_gb_per_s: float
) -> dict[str, str]:
    """Roofline of a board by its datasheet: products a second over weights reused, and what each array waits for.

    Args:
        ax: where to draw.
        arrays: for each array its spec, its bound in GMAC/s and the bytes of one weight.
        bandwidth_gb_per_s: of the board's memory, at best.

    Returns:
        "memory" or "itself" for each array where every weight is used once: decoding, one sequence.
    """
    rows = np.array([1, 2, 4, 8, 16, 32, 64])
    waits = {}
    for index, (name, (spec, bound, weight_bytes)) in enumerate(arrays.items()):
        fed = bandwidth_gb_per_s / weight_bytes * rows
        reached = np.array([with_loading(spec, bound, count) for count in rows])
        style = series_style(index)
        ax.plot(rows, reached, label=name, **style)
        ax.plot(rows, fed, color=style["color"], linestyle=":", label="its weights from memory")
        waits[name] = "memory" if fed[0] < reached[0] else "itself"
    ax.set_xscale("log", base=2)
    plain_log_axis(ax, (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500))
    ax.set_xticks(rows, [str(r) for r in rows])
    ax.set(xlabel="rows of x for each weight read (1: decoding one sequence)", ylabel="GMAC/s at most")
    slow = [name for name, what in waits.items() if what == "itself"]
    ax.set_title(f"Decoding one sequence, {len(slow)} of {len(waits)} arrays wait for themselves, not for the memory")
    ax.grid(alpha=0.25, which="both")
    ax.legend(fontsize="small")
    return waits
