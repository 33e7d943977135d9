"""The roofline drawn from a measurement, with labelled kernels on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labutils.lab.plots.style import series_style
from labutils.measurement.roofline import Roofline, describe_share


@dataclass(frozen=True)
class RooflinePoint:
    """One measured kernel: FLOP done and bytes moved in `seconds`."""

    label: str
    flop: float
    moved_bytes: float
    seconds: float

    def __post_init__(self) -> None:
        if min(self.flop, self.moved_bytes, self.seconds) <= 0:
            raise ValueError(
                f"FLOP, bytes and seconds must be positive; got {self.flop}, {self.moved_bytes}, {self.seconds}"
            )

    @property
    def intensity_flop_per_byte(self) -> float:
        """FLOP per byte moved."""
        return self.flop / self.moved_bytes

    @property
    def flops_per_s(self) -> float:
        """Achieved FLOP/s."""
        return self.flop / self.seconds

    def share(self, roof: Roofline) -> str:
        """Returns the share of what the roof allows at this intensity, or "probe error"."""
        return describe_share(self.flops_per_s, roof.attainable_flops_per_s(self.intensity_flop_per_byte))


def draw_roofline(roof: Roofline, points: Sequence[RooflinePoint] = (), *, ax: Axes | None = None) -> Figure:
    """Draws both roofs over arithmetic intensity and each point with its share of the roof above it."""
    ax = ax or Figure(figsize=(8, 5), layout="constrained").subplots()
    ridge = roof.ridge_flop_per_byte
    intensities = [p.intensity_flop_per_byte for p in points]
    low, high = min([*intensities, ridge]) / 4, max([*intensities, ridge]) * 4
    line = np.geomspace(low, high, 200)
    ax.loglog(
        line, [roof.attainable_flops_per_s(i) / 1e9 for i in line], color="black", linewidth=2, label="measured roof"
    )
    ax.axvline(ridge, color="0.7", linestyle=":", zorder=0)
    ax.annotate(
        f"{roof.bandwidth_bytes_per_s / 1e9:.1f} GB/s",
        _on_slope(roof, low),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
    )
    ax.annotate(
        f"{roof.flops_per_s / 1e9:.0f} GFLOP/s",
        (high, roof.flops_per_s / 1e9),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
    )
    for index, point in enumerate(points):
        label = f"{point.label}: {point.share(roof)} of the roof"
        ax.scatter(
            point.intensity_flop_per_byte, point.flops_per_s / 1e9, s=80, zorder=3, label=label, **series_style(index)
        )
    ax.set_ylim(top=2.5 * max([roof.flops_per_s, *(p.flops_per_s for p in points)]) / 1e9)  # room for the roof's label
    ax.set_xlabel("arithmetic intensity (FLOP per byte)")
    ax.set_ylabel("GFLOP/s")
    ax.set_title(roofline_finding(roof, points), wrap=True)
    ax.grid(alpha=0.25, which="both")
    ax.legend(loc="lower right", fontsize="small")
    return ax.get_figure()


def roofline_finding(roof: Roofline, points: Sequence[RooflinePoint]) -> str:
    """Returns the title: what limits the points, by `limit_of`."""
    where = f"{roof.device}, {roof.dtype}, {roof.threads} thread{'s' if roof.threads > 1 else ''}"
    if not points:
        return f"Below {roof.ridge_flop_per_byte:.1f} FLOP per byte this machine waits for memory ({where})"
    limited: dict[str, list[str]] = {}
    for point in points:
        limited.setdefault(limit_of(roof, point), []).append(point.label)
    return "; ".join(f"{limit} limits {' and '.join(labels)}" for limit, labels in limited.items()) + f" ({where})"


def limit_of(roof: Roofline, point: RooflinePoint) -> str:
    """What limits a kernel: "memory" or "arithmetic" where it reaches half of that roof, else "overhead".

    Intensity alone says which roof a kernel could reach, not whether it does.
    """
    if 2 * point.flops_per_s < roof.attainable_flops_per_s(point.intensity_flop_per_byte):
        return "overhead"
    return "memory" if point.intensity_flop_per_byte < roof.ridge_flop_per_byte else "arithmetic"


def _on_slope(roof: Roofline, low: float) -> tuple[float, float]:
    middle = (low * roof.ridge_flop_per_byte) ** 0.5
    return middle, roof.attainable_flops_per_s(middle) / 1e9
