"""Figures of chapter 09: policies against the ideal, who worked when, seconds over links."""

import textwrap
from collections.abc import Mapping, Sequence

from labutils.lab.plots.style import PALETTE, plain_log_scale, series_style

HATCHES = ("", "//", "..", "xx", "\\\\")


def draw_policies(axes, seconds: Mapping[str, float], ideal_s: float) -> None:
    """Draws a bar per policy and the time that no schedule can beat."""
    bars = axes.bar(list(seconds), list(seconds.values()), color=PALETTE[: len(seconds)])
    for bar, hatch in zip(bars, HATCHES, strict=False):
        bar.set_hatch(hatch)
    axes.bar_label(bars, [f"{s / ideal_s:.2f} x" for s in seconds.values()])
    axes.axhline(ideal_s, color="black", linestyle="--", label=f"ideal, {ideal_s:.2f} s")
    axes.set(xlabel="policy", ylabel="time for all requests (s), work simulated")
    axes.margins(y=0.12)
    axes.legend()


def draw_pipeline(axes, times_by_rank: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Draws when each stage worked on which micro-batch; what is white is the bubble."""
    origin = min(begin for times in times_by_rank for begin, _ in times)
    for rank, times in enumerate(times_by_rank):
        for number, (begin, end) in enumerate(times):
            colour = PALETTE[number % (len(PALETTE) - 1)]
            axes.barh(rank, end - begin, left=begin - origin, color=colour, edgecolor="black")
            label = axes.text((begin + end) / 2 - origin, rank, str(number), ha="center", va="center")
            label.set_bbox({"boxstyle": "circle", "facecolor": "white", "edgecolor": "none", "pad": 0.2})
    axes.set(xlabel="time (s)", ylabel="stage", yticks=range(len(times_by_rank)))
    axes.invert_yaxis()


def draw_links(axes, milliseconds: Mapping[str, Mapping[str, float]]) -> None:
    """Draws milliseconds a token over links, a kind of point for each way of splitting; no lines between categories."""
    for index, (way, by_link) in enumerate(milliseconds.items()):
        names = [textwrap.fill(name, 14) for name in by_link]
        axes.plot(names, list(by_link.values()), label=way, **series_style(index) | {"linestyle": "none"})
    axes.set(xlabel="link (all simulated except the first)", ylabel="time per token (ms)")
    axes.margins(x=0.1)
    plain_log_scale(axes, "y")
    axes.grid(alpha=0.25)
    axes.legend()
