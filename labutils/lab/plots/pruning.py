"""Figures of pruning: quality over sparsity with intervals, published numbers beside, masks, and the break-even."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from labutils.lab.models.compare import PairedQuality
from labutils.lab.plots.style import PALETTE, label_points, series_style

Curve = Sequence[tuple[float, PairedQuality]]
# WikiText-2 perplexity of Llama-2-7B (dense 5.12), read in Wanda's repository: 50%, 4:8, 2:4.
PUBLISHED = {"magnitude": (14.89, 16.48, 54.59), "Wanda": (6.42, 7.97, 11.02), "SparseGPT": (6.51, 8.12, 10.17)}
PUBLISHED_DENSE, PATTERNS = 5.12, ("50%", "4:8", "2:4")


def draw_curves(ax: Axes, curves: Mapping[str, Curve]) -> str:
    """Bits per byte lost over sparsity, with the paired 95% intervals; returns the best method at the last sparsity."""
    for index, (name, points) in enumerate(curves.items()):
        lost = [quality.difference for _, quality in points]
        bars = [
            [abs(quality.interval[side] - q) for (_, quality), q in zip(points, lost, strict=True)] for side in (0, 1)
        ]
        levels = [100 * level for level, _ in points]
        ax.errorbar(levels, lost, yerr=bars, label=name, capsize=3, **series_style(index))
    best = min(curves, key=lambda name: curves[name][-1][1].difference)
    ax.set(xlabel="zeros (% of the body's weights)", ylabel="bits per byte lost (lower is better)")
    plain_log_axis(ax, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5))
    ax.set_title(f"{best} loses least at {curves[best][-1][0]:.0%}")
    ax.grid(alpha=0.25, which="both")
    ax.legend(fontsize="small")
    return best


def plain_log_axis(ax: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic y axis with these numbers as people write them; those outside the data stay unseen."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator(list(ticks)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def draw_structure(ax: Axes, smaller: Mapping[str, tuple[int, PairedQuality]], *, dense: int) -> None:
    """Smaller models as points: millions of parameters stored, and bits per byte lost with the paired 95% interval."""
    for index, (count, quality) in enumerate(smaller.values()):
        bars = [[b[0]] for b in _bars([quality])]
        ax.errorbar([count / 1e6], [quality.difference], yerr=bars, capsize=3, ls="none", **series_style(index))
    cost = {name: q.difference / (dense - count) for name, (count, q) in smaller.items() if count < dense}
    ax.axvline(dense / 1e6, color="0.4", linestyle=":")
    ax.set(xlabel="parameters stored (millions; dotted: dense)", ylabel="bits per byte lost")
    ax.set_title(f"Least lost per parameter removed: {min(cost, key=cost.get)}")
    plain_log_axis(ax, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1))
    ax.margins(x=0.12)
    ax.grid(alpha=0.25)
    label_points(ax, [(name, count / 1e6, quality.difference) for name, (count, quality) in smaller.items()])


def draw_groups(ax: Axes, shares: Mapping[str, Sequence[float]], groups: Mapping[str, int]) -> None:
    """Share of right answers by group (how many items each) and model, with one standard error."""
    width = 0.8 / len(shares)
    for index, (name, heights) in enumerate(shares.items()):
        errors = [(h * (1 - h) / n) ** 0.5 for h, n in zip(heights, groups.values(), strict=True)]
        places = [g + (index - (len(shares) - 1) / 2) * width for g in range(len(groups))]
        hatch = ("", "//", "..", "xx", "--")[index % 5]
        ax.bar(places, heights, width, yerr=errors, label=name, color=PALETTE[index], hatch=hatch, edgecolor="white")
    ax.set_xticks(range(len(groups)), [f"{name}\n({n})" for name, n in groups.items()])
    ax.set(ylabel="right (share)", ylim=(0, 1.05))
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _bars(qualities: Sequence[PairedQuality]) -> list[list[float]]:
    return [[abs(q.interval[side] - q.difference) for q in qualities] for side in (0, 1)]


def draw_published(ours: Axes, theirs: Axes, measured: Mapping[str, Sequence[PairedQuality]]) -> None:
    """Three patterns at one sparsity: measured here, and as published for a model a thousand times as large."""
    width = 0.8 / len(measured)
    for index, (name, qualities) in enumerate(measured.items()):
        places = [p + (index - (len(measured) - 1) / 2) * width for p in range(len(PATTERNS))]
        lost = [q.difference for q in qualities]
        bars = _bars(qualities)
        look = {"color": PALETTE[index], "hatch": ("", "//", "..")[index % 3], "edgecolor": "white", "label": name}
        ours.bar(places, lost, width, yerr=bars, capsize=3, **look)
        published = [perplexity - PUBLISHED_DENSE for perplexity in PUBLISHED[name]]
        theirs.plot(places, published, label=name, **series_style(index) | {"linestyle": "none"})  # bars need a zero
    for ax in (ours, theirs):
        ax.set_xticks(range(len(PATTERNS)), PATTERNS)
        ax.set_xlabel("pattern, half of the weights zero")
        ax.grid(alpha=0.25, axis="y")
    ours.set(ylabel="bits per byte lost", title="Measured here")
    theirs.set(ylabel="perplexity lost", title="Published: Llama-2-7B, WikiText-2")
    plain_log_axis(theirs, (1, 2, 5, 10, 20, 50))
    theirs.set_ylim(bottom=1)
    for ax in (ours, theirs):
        ax.legend(fontsize="small")


def draw_masks(axes: Sequence[Axes], masks: Mapping[str, Bool[Tensor, "out n"]], *, corner: int = 32) -> None:
    """The upper left corner of each mask: dark is kept."""
    for ax, (name, mask) in zip(axes, masks.items(), strict=True):
        ax.imshow(mask[:corner, :corner].numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        rows = mask.float().mean(dim=1)
        ax.set_title(f"{name}\nrows keep {rows.min():.0%} to {rows.max():.0%}", fontsize="small")
        ax.set(xlabel="input", ylabel="output", xticks=(), yticks=())


def draw_break_even(ax: Axes, speedups: Mapping[str, Mapping[float, float]]) -> dict[str, float | None]:
    """Times as fast as dense over sparsity, on logarithmic axes, and where each format begins to pay.

    Args:
        ax: where to draw.
        speedups: for each format, sparsity to dense time over its time.

    Returns:
        The sparsity at which each curve crosses 1, interpolated; None where it does not.
    """
    crossings = {}
    for index, (name, curve) in enumerate(speedups.items()):
        levels = sorted(curve)
        ax.plot([100 * s for s in levels], [curve[s] for s in levels], label=name, **series_style(index))
        crossings[name] = crossing([(s, curve[s]) for s in levels])
    ax.axhline(1, color="0.4", linestyle="--")
    ax.set(xlabel="zeros (%)", ylabel="times as fast as dense")
    plain_log_axis(ax, (0.125, 0.25, 0.5, 1, 2, 4, 8, 16))
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small")
    return crossings


def crossing(points: Sequence[tuple[float, float]], level: float = 1.0) -> float | None:
    """Where a broken line first climbs to a level; None where it never does.

    >>> crossing([(0.0, 0.5), (0.5, 0.75), (1.0, 1.25)])
    0.75
    """
    if points and points[0][1] >= level:
        return points[0][0]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if low < level <= high:
            return left + (level - low) / (high - low) * (right - left)
    return None


def draw_sensitivity(ax: Axes, damage: Mapping[str, Sequence[float]], base: float, level: str) -> None:
    """What pruning one matrix alone costs, by layer and kind, darker is worse."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in damage))
    layers = sorted({int(name.split(".")[2]) for name in damage})
    table = torch.tensor(
        [
            [next(d[-1] for n, d in damage.items() if f".{i}." in n and n.endswith(k)) - base for k in kinds]
            for i in layers
        ]
    )
    image = ax.imshow(table, cmap="cividis_r")
    for row in range(len(layers)):
        for column in range(len(kinds)):
            dark = table[row, column] > (table.max() + table.min()) / 2
            words = f"{table[row, column]:.3f}"
            ax.text(column, row, words, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    ax.set_yticks(range(len(layers)), layers)
    worst = max(damage, key=lambda name: damage[name][-1])
    ax.set(ylabel="layer", title=f"Most sensitive at {level}: {worst.removeprefix('model.')}")
    ax.figure.colorbar(image, ax=ax, label="loss added (nats per token)")
