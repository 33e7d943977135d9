"""Colours and markers that need no colour vision (Okabe and Ito, and a shape per series), and labels at points."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
PLACES = tuple(  # where a label may stand beside its point: offsets and alignments, the nearest first
    (side * (6 + 2 * step), sign * (5 + 8 * step), "left" if side > 0 else "right", "bottom" if sign > 0 else "top")
    for step in range(16)
    for side in (1, -1)
    for sign in (1, -1)
)


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
    """Writes (text, x, y) near each point, at the first place inside where it covers no point and no other label."""
    ax.get_figure().canvas.draw()
    placed = [(text, x, y, *ax.transData.transform((x, y))) for text, x, y in labels]
    taken = [Bbox.from_bounds(px - 5, py - 5, 10, 10) for *_, px, py in placed]
    for words, x, y, *_ in sorted(placed, key=lambda label: label[3:]):
        for dx, dy, across, up in PLACES:
            far = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if abs(dy) > PLACES[0][1] else None
            near = {"textcoords": "offset points", "fontsize": 8, "ha": across, "va": up, "arrowprops": far}
            text = ax.annotate(words, (x, y), (dx, dy), **near)
            text.get_window_extent()  # puts it there
            box = Text.get_window_extent(text)  # the words alone, without the line to the point
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken) or (dx, dy, across, up) == PLACES[-1]:
                taken.append(box)
                break
            text.remove()
