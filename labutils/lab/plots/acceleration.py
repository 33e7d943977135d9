"""Pictures of chapter 06: a profile as lanes of time, the memory that programs touch, and the ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labutils.acceleration.interpreter import Access
from labutils.acceleration.timeline import Event, Timeline
from labutils.lab.plots.style import PALETTE, series_style
from labutils.measurement.timing import Timing, paired_ratio


def draw_timeline(
    timeline: Timeline, *, name: str, window_s: tuple[float, float] | None = None, ax: Axes | None = None
) -> Figure:
    """Draws launches, kernels and copies as bars over time; what is white, waits.

    Args:
        timeline: of one profile.
        name: of what ran, for the title.
        window_s: which part of the time to show; all of it unless given.
        ax: where to draw.
    """
    ax = ax or Figure(figsize=(10, 2.4), layout="constrained").subplots()
    lanes = {"launches": timeline.launches, "copies": timeline.copies, "kernels": timeline.kernels}
    lanes = {lane: events for lane, events in lanes.items() if events}
    first = min(e.start_s for events in lanes.values() for e in events)
    low, high = window_s or (first, first + timeline.seconds)
    for row, events in enumerate(lanes.values()):
        bars = [(e.start_s * 1e3, e.seconds * 1e3) for e in events if e.end_s >= low and e.start_s <= high]
        ax.broken_barh(bars, (row - 0.35, 0.7), color=PALETTE[row], edgecolor="white", linewidth=0.4)
        ax.text(1.005, row, f"{len(bars)}", transform=ax.get_yaxis_transform(), va="center")
    ax.set(xlim=(low * 1e3, high * 1e3), ylim=(-0.6, len(lanes) - 0.4), xlabel="time (ms)")
    ax.set_yticks(range(len(lanes)), list(lanes))
    ax.set_title(f"{name}: {timeline.gap_share:.0%} of the time nothing runs ({timeline.device})")
    return ax.get_figure()


def draw_accesses(
    accesses: Sequence[Access], tensors: Mapping[str, tuple[int, int, int]], *, title: str, axes: Sequence[Axes]
) -> None:
    """Draws, for each tensor, which program touches which element, in order of the instructions.

    Args:
        accesses: what `interpret` returned.
        tensors: name to (address, number of elements, bytes of an element).
        title: the finding.
        axes: one for each tensor.
    """
    programs = sorted({a.program for a in accesses})
    for ax, (name, (address, count, size)) in zip(axes, tensors.items(), strict=True):
        for program in programs:
            points = [
                ((byte - address) // size, order)
                for order, access in enumerate(accesses)
                if access.program == program
                for byte in access.addresses
                if address <= byte < address + count * size
            ]
            if points:
                x, y = zip(*points, strict=True)
                ax.scatter(x, y, s=14, label=f"program {program}", **series_style(program))
        ax.set(xlabel=f"element of {name}", xlim=(-1, count))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("instruction (in order)")
    axes[0].figure.suptitle(title)
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_ladder(
    timings: Mapping[str, Timing], skipped: Mapping[str, str], *, base: str, ax: Axes, where: str = "here"
) -> None:
    """Draws each rung's speed against the base's, with its interval; skipped rungs stand in grey.

    The title names the fastest of those whose interval lies above 1.
    """
    names = [*timings, *skipped]
    ratios = {n: paired_ratio(timings[base].samples_s, t.samples_s) for n, t in timings.items()}
    for row, name in enumerate(names):
        if name in ratios:
            r = ratios[name]
            ax.errorbar(
                r.value, row, xerr=[[max(r.value - r.low, 0)], [max(r.high - r.value, 0)]], capsize=3, **series_style(0)
            )
        else:
            ax.text(1.02, row, "left out here", color="0.45", va="center", fontsize="small")
    sure = {n: r for n, r in ratios.items() if r.low > 1}
    best = max(sure, key=lambda n: sure[n].value, default=None)
    ax.axvline(1.0, color="0.6", linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlabel=f"speed against {base} (times)")
    fastest = f"Fastest {where} with its interval above 1: {best}, {sure[best]}" if sure else ""
    ax.set_title(fastest or f"No interval {where} lies above {base}")
    ax.grid(alpha=0.25, axis="x")


def draw_gpu(ax: Axes) -> None:
    """A drawing of a GPU: memory, L2, and some multiprocessors with their warps, registers and units."""

    def box(x: float, y: float, width: float, height: float, words: str, color: str, size: int = 9) -> None:
        ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black", linewidth=0.8))
        ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=size)

    box(0, 0, 40, 1.2, "device memory (HBM or GDDR): weights, cache; terabytes a second at best", "0.85")
    box(0, 1.7, 40, 1, "L2 cache, shared by all multiprocessors: megabytes", "0.92")
    for sm in range(4):
        left = 10.2 * sm
        box(left, 3.2, 9.4, 5.6, "", "white")
        ax.text(left + 4.7, 8.4, f"multiprocessor (SM) {sm}", ha="center", va="center", fontsize=9, weight="bold")
        for row, words in enumerate(("shared memory and L1", "ordinary units, tensor cores", "registers")):
            box(left + 0.3, 3.4 + 1.1 * row, 8.8, 0.95, words, ("#cfe3f3", "#f6d9c4", "#cdeadd")[row], 8)
        for warp in range(6):
            box(left + 0.3 + 1.48 * warp, 6.8, 1.36, 1.1, f"warp\n{warp}", "0.95", 7)
    ax.set(
        xlim=(-0.5, 40.7),
        ylim=(-0.3, 9.1),
        title="A program runs on one SM; its warps take turns while others wait for memory",
    )
    ax.axis("off")


def as_timeline(events: Sequence[tuple[str, float, float]]) -> Timeline:
    """A timeline from (stream, start, seconds) of a simulated GPU; its streams are `kernels` and `copies`."""
    found = {"kernels": [], "copies": []}
    for stream, start, seconds in events:
        found[stream].append(Event(stream, start, seconds))
    return Timeline("simulated", tuple(found["kernels"]), tuple(found["copies"]), ())
