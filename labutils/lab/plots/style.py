"""Colours and markers that need no colour vision (Okabe and Ito, and a shape per series), and labels at points."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
PLACES = sorted(  # where a label may stand beside its point, in points to the right and up, the nearest first
    (
        (side * dx, sign * dy)
        for dx in range(6, 90, 12)
        for dy in range(5, 135, 8)
        for side in (1, -1)
        for sign in (1, -1)
    ),
    key=lambda place: math.hypot(*place),
)
LEADER = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}


def series_style(index: int) -> dict[str, str]:
    """Returns a colour and a marker; with 7 colours and 10 shapes the first 70 series differ.

    >>> series_style(1)
    {'color': '#D55E00', 'marker': 's'}
    """
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def plain_log_scale(ax: Axes, which: str) -> None:
    """Makes the "x" or the "y" axis logarithmic, with ticks at 1, 2 and 5 and numbers instead of powers."""
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    ax.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def label_points(ax: Axes, labels: Sequence[tuple[str, float, float]]) -> None:
    """Writes (text, x, y) near each point, inside, where it covers no point and no other label: see `_free_place`.

    A label that is not next to its point, or whose point is not the only one near it, gets a line to it.
    """
    ax.get_figure().canvas.draw()
    placed = [(*label, *ax.transData.transform(label[1:])) for label in labels]
    points = [Bbox.from_bounds(px - 5, py - 5, 10, 10) for *_, px, py in placed]
    boxes: list[Bbox] = []
    lines: list[Path] = []
    for words, x, y, *point in sorted(placed, key=lambda label: label[3:]):
        text = ax.annotate(words, (x, y), (0, 0), textcoords="offset points", fontsize=8)
        size = text.get_window_extent().size
        (dx, dy), box, line = _free_place(ax, point, size, points, boxes, lines)
        boxes.append(box.padded(4, 1))
        lines.append(line)
        text.set(position=(dx, dy), ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top")
        crowded = sum(math.dist(point, (other.x0 + 5, other.y0 + 5)) < 16 for other in points) > 1
        if crowded or (dx, dy) not in PLACES[:4]:
            ax.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops=LEADER)


def _free_place(ax: Axes, point, size, points, boxes, lines) -> tuple[tuple[int, int], Bbox, Path]:
    """The nearest of `PLACES` where words of this size cover nothing, if possible without a line across words."""
    free = []
    for place in PLACES:
        corner = [at + ax.get_figure().dpi / 72 * offset for at, offset in zip(point, place, strict=True)]
        low = [at - extent * (offset < 0) for at, extent, offset in zip(corner, size, place, strict=True)]
        box, line = Bbox.from_bounds(*low, *size), Path([point, corner])
        inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
        covers = not inside or any(box.overlaps(other) for other in (*points, *boxes))
        crosses = covers or any(line.intersects_bbox(b) for b in boxes) or any(x.intersects_bbox(box) for x in lines)
        free.append((covers, crosses, place, box, line))
        if not covers and not crosses:
            break
    return min(free, key=lambda found: found[:2])[2:]  # the first, the nearest, of the best
