"""What quantization does to a layer's weights, and what bits buy: error map, histogram, bits against quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from labutils.models.compare import PairedQuality
from labutils.plots.speed_quality import pareto_front
from labutils.plots.style import PALETTE, series_style
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.clipping import mse_range, percentile_range
from labutils.quantization.packing import bits_per_weight
from labutils.quantization.theory import sqnr_db

GRANULARITIES = {
    "tensor": {"granularity": "tensor"},
    "channel": {"granularity": "channel"},
    "group of 64": {"granularity": "group", "group_size": 64},
    "group of 32": {"granularity": "group", "group_size": 32},
}
CLIPPINGS = {
    "min-max": lambda weight, scheme: (None, None),
    "99th percentile": lambda weight, scheme: percentile_range(weight, scheme, percent=99),
    "least error": mse_range,
}


@dataclass(frozen=True)
class QuantizedLayer:
    """A weight, what a choice leaves of it, and what that costs."""

    weight: Float[Tensor, "out_features in_features"]
    back: Float[Tensor, "out_features in_features"]
    sqnr_db: float
    bits_per_weight: float
    choice: str

    def __str__(self) -> str:
        return f"{self.choice}: SQNR {self.sqnr_db:.1f} dB at {self.bits_per_weight:.3f} bits per weight"


def quantized_layer(
    weight: Float[Tensor, "out_features in_features"],
    *,
    bits: int = 4,
    granularity: str = "group of 64",
    clipping: str = "min-max",
) -> QuantizedLayer:
    """A weight quantized symmetrically, with float16 scales: the widget as a plain function.

    Args:
        weight: a layer's weight.
        bits: 2 to 8.
        granularity: one of `GRANULARITIES`.
        clipping: one of `CLIPPINGS`.

    Raises:
        ValueError: for an unknown choice.
    """
    for value, known in ((granularity, GRANULARITIES), (clipping, CLIPPINGS)):
        if value not in known:
            raise ValueError(f"a choice must be one of {', '.join(known)}; got {value!r}")
    scheme = Scheme(bits=bits, scale_dtype=torch.float16, **GRANULARITIES[granularity])
    low, high = CLIPPINGS[clipping](weight, scheme)
    back = fake_quantize(weight, scheme, low=low, high=high)
    return QuantizedLayer(
        weight=weight,
        back=back,
        sqnr_db=sqnr_db(weight, back),
        bits_per_weight=bits_per_weight(tuple(weight.shape), scheme),
        choice=f"int{bits} by {granularity}, {clipping}",
    )


def draw_quantized_layer(layer: QuantizedLayer, *, figure: Figure | None = None) -> Figure:
    """Draws where the weights were and are (left), and how far each one moved (right)."""
    figure = figure or Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    limit = layer.weight.abs().max().item()
    for index, (values, label) in enumerate(((layer.weight, "before"), (layer.back, "after"))):
        style = {"color": PALETTE[index], "linestyle": "-" if index else "--"}
        left.hist(values.flatten().numpy(), bins=201, range=(-limit, limit), histtype="step", label=label, **style)
    left.set(yscale="log", xlabel="weight", ylabel="how many (log scale)", title="Values before and after")
    left.legend()
    image = right.imshow((layer.back - layer.weight).abs().numpy(), cmap="cividis", interpolation="nearest")
    figure.colorbar(image, ax=right, label="|error| (in units of the weight)")
    right.set(xlabel="input feature", ylabel="output feature", title="How far each weight moved")
    figure.suptitle(str(layer))
    return figure


@dataclass(frozen=True)
class BitsPoint:
    """A way to store weights, its true bits per weight, and the model's quality with it."""

    name: str
    bits_per_weight: float
    quality: PairedQuality


def bits_front(points: Sequence[BitsPoint]) -> list[BitsPoint]:
    """The points that no other one beats in both bits and quality, fewest bits first."""
    found = pareto_front([(-p.bits_per_weight, -p.quality.bits_per_byte) for p in points])
    return [points[i] for i in found]


def bits_finding(points: Sequence[BitsPoint], *, cost: float = 0.02) -> str:
    """The title: the cheapest way whose interval stays under a cost in bits per byte."""
    good = [p for p in points if p.quality.interval[1] < cost]
    if not good:
        return f"None of {len(points)} ways costs less than {cost} bits per byte for sure"
    best = min(good, key=lambda p: p.bits_per_weight)
    return f"{best.name} ({best.bits_per_weight:.2f} bits) is the smallest that costs less than {cost} bits per byte"


def draw_bits_quality(points: Sequence[BitsPoint], *, ax: Axes | None = None) -> Figure:
    """Draws true bits per weight against the loss in bits per byte with its paired 95% interval, and the front."""
    ax = ax or Figure(figsize=(9, 5.5), layout="constrained").subplots()
    front = bits_front(points)
    ax.plot(
        [p.bits_per_weight for p in front],
        [p.quality.difference for p in front],
        "--",
        color="0.6",
        zorder=1,
        label="Pareto front",
    )
    for index, point in enumerate(sorted(points, key=lambda p: p.bits_per_weight)):
        y, (low, high) = point.quality.difference, point.quality.interval
        style = {"label": point.name, "capsize": 3, "linestyle": "none", "markersize": 8, **series_style(index)}
        ax.errorbar(point.bits_per_weight, y, yerr=[[y - low], [high - y]], **style)
    ax.axhline(0, color="0.8", zorder=0)
    ax.set_yscale("symlog", linthresh=1e-3)
    lows, highs = zip(*(p.quality.interval for p in points), strict=True)
    ax.set_ylim(1.5 * min(0, *lows) - 5e-4, 1.6 * max(5e-4, *highs))
    ax.set_xlabel("bits per weight, scales and zero points included")
    ax.set_ylabel("bits per byte above float32 (lower is better)")
    ax.set_title(bits_finding(points), wrap=True)
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax.get_figure()


def bits_quality_table(points: Sequence[BitsPoint]) -> str:
    """The same as text; `*` marks the front."""
    front = {p.name for p in bits_front(points)}
    rows = [f"{'':2}{'bits/weight':>11} {'bits/byte':>10} {'loss':>8} {'95% interval':>20}  way"]
    for p in sorted(points, key=lambda p: p.bits_per_weight):
        low, high = p.quality.interval
        numbers = f"{p.bits_per_weight:11.3f} {p.quality.bits_per_byte:10.4f} {p.quality.difference:+8.4f}"
        rows.append(f"{'*' if p.name in front else '':2}{numbers} {f'[{low:+.4f}, {high:+.4f}]':>20}  {p.name}")
    return "\n".join(rows)
