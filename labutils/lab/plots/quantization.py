"""What quantization does to a layer's weights, and what bits buy: error map, histogram, bits against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from labutils.lab.models.compare import DocumentBits, PairedQuality, paired_quality
from labutils.lab.plots.speed_quality import pareto_front
from labutils.lab.plots.style import PALETTE, label_points, series_style
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


def draw_clipping(axes: Axes, weight: Float[Tensor, "out n"], *, bits: int, share: float) -> None:
    """Draws a weight's density and the levels of one symmetric scale, cut at a share of max|w|, with their shares."""
    scheme, peak = Scheme(bits=bits, granularity="tensor"), weight.abs().max().item()
    back = fake_quantize(weight, scheme, low=-share * peak, high=share * peak)
    levels, counts = back.unique(return_counts=True)
    found = 100 * counts / weight.numel()
    width = share * peak / (2 ** (bits - 1) - 1)
    edges = torch.linspace(-peak, peak, 121)
    heights = 100 * torch.histogram(weight.flatten(), edges).hist / weight.numel() * width / (edges[1] - edges[0])
    axes.stairs(heights.numpy(), edges.numpy(), color="0.6", label="the weights")
    axes.vlines(levels, 0, found, color=PALETTE[1], linewidth=3)
    axes.plot(levels, found, color=PALETTE[1], marker="o", linestyle="none", label="their levels")
    axes.set(xlabel="weight", ylabel="share of the weights (%)", xlim=(-1.05 * peak, 1.05 * peak), ylim=(0, None))
    axes.set_title(f"{bits} bits, cut at {share:.0%} of max |w|: {sqnr_db(weight, back):.1f} dB")
    axes.legend(fontsize="small")


def draw_tokens(axes: Axes, texts: Mapping[str, Sequence[tuple[str, bool]]], *, lines: int, width: int = 76) -> None:
    """Write texts below one another, each under its name: `lines` lines of `width` characters for each.

    A text is a list of tokens; those marked True are red and bold.
    """
    inches = axes.get_figure().get_size_inches()[0]
    style = {"family": "monospace", "fontsize": 72 * inches / (0.65 * width)}  # a character: 0.6 em
    for index, (name, tokens) in enumerate(texts.items()):
        row, column = index * lines + 2, 0
        axes.text(0, row - 1, name, color="0.4", **style)
        for text, is_marked in tokens:
            look = {"color": "#CC0000", "weight": "bold"} if is_marked else {}
            for place, part in enumerate(text.split("\n")):
                if place or column + len(part) > width:
                    row, column = row + 1, 0
                axes.text(column, row, part, **look, **style)
                column += len(part)
    axes.set(xlim=(0, width), ylim=(lines * len(texts), 0))
    axes.set_axis_off()


@dataclass(frozen=True)
class BitsPoint:
    """A way to store weights, its true bits per weight, and the model's quality with it, in sum and by document."""

    name: str
    bits_per_weight: float
    quality: PairedQuality
    document_bits: DocumentBits


def bits_front(points: Sequence[BitsPoint]) -> list[BitsPoint]:
    """The points that no other one beats in both bits and mean quality, fewest bits first: the line that is drawn."""
    found = pareto_front([(-p.bits_per_weight, -p.quality.bits_per_byte) for p in points])
    return [points[i] for i in found]


def bits_beaten_by(point: BitsPoint, points: Sequence[BitsPoint]) -> list[BitsPoint]:
    """The points of no more bits that are surely better: the interval of the paired difference excludes zero."""
    rivals = [p for p in points if p.bits_per_weight <= point.bits_per_weight]
    return [p for p in rivals if paired_quality(p.document_bits, point.document_bits).interval[1] < 0]


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
    ax.plot([p.bits_per_weight for p in front], [p.quality.difference for p in front], "--", color="0.6", zorder=1)
    for index, point in enumerate(sorted(points, key=lambda p: p.bits_per_weight)):
        y, (low, high) = point.quality.difference, point.quality.interval
        style = {"capsize": 3, "linestyle": "none", "markersize": 8, **series_style(index)}
        ax.errorbar(point.bits_per_weight, y, yerr=[[y - low], [high - y]], **style)
    ax.axhline(0, color="0.8", zorder=0)
    ax.set_yscale("symlog", linthresh=1e-3)
    lows, highs = zip(*(p.quality.interval for p in points), strict=True)
    ax.set_ylim(1.5 * min(0, *lows) - 5e-4, 1.6 * max(5e-4, *highs))
    ax.set_xlabel("bits per weight, scales and zero points included")
    ax.margins(x=0.12)
    ax.set_ylabel("bits per byte above float32 (lower is better)")
    ax.set_title(bits_finding(points), wrap=True)
    ax.grid(alpha=0.25)
    label_points(ax, [(p.name, p.bits_per_weight, p.quality.difference) for p in points])
    return ax.get_figure()


def bits_quality_table(points: Sequence[BitsPoint]) -> str:
    """The same as text; `*` marks what no way of as few bits surely beats."""
    rows = [f"{'':2}{'bits/weight':>11} {'bits/byte':>10} {'loss':>8} {'95% interval':>20}  way"]
    for p in sorted(points, key=lambda p: p.bits_per_weight):
        low, high = p.quality.interval
        numbers = f"{p.bits_per_weight:11.3f} {p.quality.bits_per_byte:10.4f} {p.quality.difference:+8.4f}"
        rows.append(
            f"{'' if bits_beaten_by(p, points) else '*':2}{numbers} {f'[{low:+.4f}, {high:+.4f}]':>20}  {p.name}"
        )
    return "\n".join(rows)
