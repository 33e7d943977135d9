"""Colours and markers that do not rely on colour vision: Okabe and Ito's palette, and a shape per series."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


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
