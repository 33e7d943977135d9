"""Quality against the share that was computed or read: bits per byte lost, with intervals."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from labutils.lab.models.compare import PairedQuality
from labutils.lab.plots.style import series_style


def draw_quality(
    ax: Axes, curves: Mapping[str, Sequence[tuple[float, PairedQuality]]], *, share_of: str, apart: float = 0.0
) -> None:
    """Bits per byte lost over a share in percent, one line a method, with the paired 95% intervals.

    Methods with equal shares can be drawn `apart`: each that many percent to the right of the one before.
    """
    for index, (name, points) in enumerate(curves.items()):
        lost = [quality.difference for _, quality in points]
        bars = [[abs(q.interval[side] - q.difference) for _, q in points] for side in (0, 1)]
        shares = [100 * share + apart * (index - (len(curves) - 1) / 2) for share, _ in points]
        ax.errorbar(shares, lost, yerr=bars, label=name, capsize=3, **series_style(index))
    ax.axhline(0, color="0.4", linestyle=":")
    ax.set(xlabel=f"{share_of} (%)", ylabel="bits per byte lost (lower is better)")
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small")
