"""Figures of distillation: what a teacher thinks, modes, gradients over temperature, and students with intervals."""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from labutils.lab.models.students import mean_interval
from labutils.lab.plots.style import PALETTE, label_points, series_style


def draw_opinion(ax: Axes, names: Sequence[str], probs: Sequence[float], *, right: str, title: str) -> None:
    """The likeliest next tokens as bars; the text's own token is hatched."""
    places = range(len(names))
    bars = ax.barh(places, probs, color=[PALETTE[1] if name == right else PALETTE[0] for name in names])
    for bar, name in zip(bars, names, strict=True):
        bar.set_hatch("//" if name == right else "")
    ax.set_yticks(places, names, family="monospace", fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="probability", xlim=(0, 1))
    ax.set_title(title, fontsize="medium")


def draw_gradients(ax: Axes, norms: Mapping[str, Mapping[float, float]]) -> None:
    """Gradient norm over temperature, both logarithmic; one line for each loss."""
    for index, (name, line) in enumerate(norms.items()):
        ax.plot(list(line), list(line.values()), label=name, **series_style(index))
    ax.set(xlabel="temperature T", ylabel="gradient norm", xscale="log", yscale="log")
    ticks = sorted(next(iter(norms.values())))
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small")


def draw_modes(ax: Axes, teacher: Float[Tensor, " n"], students: Mapping[str, Float[Tensor, " n"]]) -> None:
    """A teacher with two modes (filled), and the one-mode students that each divergence chose."""
    ax.fill_between(range(len(teacher)), teacher.tolist(), color="0.8", label="teacher")
    for index, (name, probs) in enumerate(students.items()):
        ax.plot(probs.tolist(), label=name, markevery=3, **series_style(index))
    ax.set(xlabel="token", ylabel="probability")
    ax.legend(fontsize="small")


def draw_training(
    ax: Axes, curves: Mapping[str, Sequence[Sequence[float]]], *, steps: Sequence[int], ylabel: str
) -> None:
    """Mean over seeds with Student's 95% interval of it as a band, for each loss."""
    for index, (name, runs) in enumerate(curves.items()):
        if len(runs) < 2:
            continue
        style = series_style(index)
        middle, intervals = zip(*(mean_interval(values) for values in zip(*runs, strict=True)), strict=True)
        ax.plot(steps, middle, label=f"{name}, mean of {len(runs)}", **style)
        ax.fill_between(steps, *zip(*intervals, strict=True), color=style["color"], alpha=0.2)
    ax.set(xlabel="step", ylabel=ylabel)
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small")


def draw_effects(ax: Axes, effects: Sequence) -> None:
    """KD minus CE in bits per byte with its 95% interval, a row for each size; left of zero the teacher helps.

    The title counts only sizes whose whole interval lies below zero.
    """
    for index, effect in enumerate(effects):
        low, high = effect.interval
        bars = [[effect.difference - low], [high - effect.difference]]
        ax.errorbar([effect.difference], [index], xerr=bars, capsize=4, ls="none", **series_style(index))
    ax.axvline(0, color="0.4", linestyle="--")
    ax.set_yticks(range(len(effects)), [f"{e.size} ({e.seeds} seeds)" for e in effects])
    ax.set_ylim(-0.6, len(effects) - 0.4)
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("KD minus CE, bits per byte (left: better)")
    shown = sum(e.is_shown for e in effects)
    ax.set_title(f"KD beats CE at {shown} of {len(effects)} sizes")


def draw_classifiers(ax: Axes, points: Mapping[str, Sequence[tuple[float, float, int]]], *, items: int) -> None:
    """Accuracy over time per query (seconds, accuracy, parameters), one series a kind, with one standard error.

    Beside each point stands how many parameters it has.
    """
    labels: list[tuple[str, float, float]] = []
    for index, (name, series) in enumerate(points.items()):
        times = [1000 * seconds for seconds, _, _ in series]
        shares = [share for _, share, _ in series]
        errors = [math.sqrt(share * (1 - share) / items) for share in shares]
        ax.errorbar(times, shares, yerr=errors, label=name, capsize=3, ls="none", **series_style(index))
        words = [f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k" for *_, count in series]
        labels += zip(words, times, shares, strict=True)
    ax.set(xlabel="time of one query (ms, logarithmic)", ylabel="intents right (share)", xscale="log")
    ax.grid(alpha=0.25)
    ax.margins(x=0.1)
    ax.legend(fontsize="small")
    label_points(ax, labels)
