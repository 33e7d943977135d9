"""Every technique on one plot, with axes to choose: families by colour and marker, labels at the points, a front.

A point *leads* if no other is surely better on one axis without being surely worse on the other. It is *beaten* if
another is surely better on both axes, and *tied* otherwise: surely worse than another on one axis, and on the other not
told apart from it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from labutils.applications.scores import paired_difference
from labutils.lab.plots.speed_quality import quality_is_sure
from labutils.lab.plots.style import label_points, plain_log_scale, series_style
from labutils.measurement.ledger import Record, check_drawable
from labutils.measurement.timing import bootstrap_interval, difference_is_sure

OTHER = "other chapters"


@dataclass(frozen=True)
class Axis:
    """One quantity of a record.

    Attributes:
        label: With its unit.
        lower_is_better: Such an axis is drawn inverted, so that better is always right or up.
        samples: The repeats behind the value; one number where it is counted, none where it was not measured.
        sure: Whether two records differ by more than chance.
        statistic: From the samples to the value.
        log: Whether the axis is logarithmic.
    """

    label: str
    lower_is_better: bool
    samples: Callable[[Record], Sequence[float]]
    sure: Callable[[Record, Record], bool]
    statistic: Callable[[Sequence[float]], float] = statistics.median
    log: bool = False

    def value(self, record: Record) -> float | None:
        """The record's place on this axis; None where it was not measured."""
        samples = self.samples(record)
        return self.statistic(samples) if samples else None

    def interval(self, record: Record) -> tuple[float, float]:
        """95% bootstrap interval; a counted number is its own."""
        samples = self.samples(record)
        return bootstrap_interval(samples, statistic=self.statistic) if len(samples) >= 5 else (self.value(record),) * 2

    def better(self, first: Record, second: Record) -> bool:
        """Whether `first` is surely better here."""
        gap = self.value(first) - self.value(second)
        return (gap < 0 if self.lower_is_better else gap > 0) and self.sure(first, second)


def _scores_differ(first: Record, second: Record) -> bool:
    if len(first.task_scores) != len(second.task_scores) or len(first.task_scores) < 5:
        return first.task_score != second.task_score
    gap = paired_difference(first.task_scores, second.task_scores)
    return gap.low > 0 or gap.high < 0


def _by(name: str) -> Callable[[Record], Sequence[float]]:
    def samples(record: Record) -> Sequence[float]:
        value = getattr(record, name)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    return samples


def _sampled_differ(name: str) -> Callable[[Record, Record], bool]:
    return lambda first, second: difference_is_sure(getattr(first, name), getattr(second, name))


AXES = {
    "speed": Axis("tokens/s of one stream", False, _by("samples"), _sampled_differ("samples"), log=True),
    "memory": Axis(
        "weights in memory (MB)",
        True,
        lambda r: () if r.bytes_resident is None else (r.bytes_resident / 1e6,),
        lambda first, second: first.bytes_resident != second.bytes_resident,
        log=True,
    ),
    "energy": Axis("J a token, idle off", True, _by("joules_per_token"), _sampled_differ("joules_per_token"), log=True),
    "bits per byte": Axis("bits per byte of held-out text", True, _by("bits_per_byte"), quality_is_sure),
    "task score": Axis(
        "right answers (share)",
        False,
        lambda r: r.task_scores or _by("task_score")(r),
        _scores_differ,
        statistics.fmean,
    ),
    "test-time compute": Axis(
        "minutes for 1,000 answers",
        True,
        lambda r: tuple(1000 / 60 * seconds for seconds in r.answer_s),
        _sampled_differ("answer_s"),
        log=True,
    ),
}


def placed(records: Sequence[Record], *axes: Axis) -> list[Record]:
    """The records that have a value on every axis.

    Raises:
        ValueError: If one may not be drawn at all (see `Record.missing`), or none has both.
    """
    for record in records:
        check_drawable(record)
    found = [record for record in records if all(axis.value(record) is not None for axis in axes)]
    if not found:
        wanted = " and ".join(axis.label for axis in axes)
        raise ValueError(f"the plot needs a record with {wanted}; got {len(records)} without: not measured")
    return found


def standing(record: Record, records: Sequence[Record], x: Axis, y: Axis) -> str:
    """Whether a record "leads", is "tied" or "beaten"."""
    rivals = [other for other in records if other is not record]
    ahead = [(x.better(other, record), y.better(other, record)) for other in rivals]
    if (True, True) in ahead:
        return "beaten"
    passed = (
        not x.better(record, other) and not y.better(record, other)
        for other, theirs in zip(rivals, ahead, strict=True)
        if any(theirs)
    )
    return "tied" if any(passed) else "leads"


def draw_techniques(
    records: Sequence[Record], *, x: str = "speed", y: str = "task score", ax: Axes | None = None
) -> Figure:
    """Draws the records that have both values: filled if they lead, pale if they are tied, hollow if beaten.

    Raises:
        KeyError: For an axis that is not in `AXES`.
        ValueError: See `placed`.
    """
    across, up = AXES[x], AXES[y]
    records = placed(records, across, up)
    ax = ax or Figure(figsize=(9.5, 5.6), layout="constrained").subplots()
    stands = {id(record): standing(record, records, across, up) for record in records}
    families = list(dict.fromkeys(record.family or OTHER for record in records))
    for index, family in enumerate(families):
        _draw_family(ax, [r for r in records if (r.family or OTHER) == family], stands, across, up, family, index)
    found = Counter(stands.values())
    ax.set_title(
        f"{found['leads']} lead (filled), {found['tied']} are tied on one axis and behind on the other (pale), "
        f"{found['beaten']} are beaten on both (hollow)",
        fontsize=10,
    )
    for axis, which, side in ((across, "x", "to the right"), (up, "y", "upwards")):
        ax.set(**{f"{which}label": f"{axis.label}; better is {side}"})
        if axis.log:
            plain_log_scale(ax, which)
        if axis.lower_is_better:
            getattr(ax, f"invert_{which}axis")()
    ax.margins(0.15, 0.3)
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small", loc="best")
    label_points(ax, [(r.technique, across.value(r), up.value(r)) for r in records])
    return ax.get_figure()


def _draw_family(ax, members, stands: dict[int, str], x: Axis, y: Axis, family: str, index: int) -> None:
    style = series_style(index)
    for number, record in enumerate(members):
        where = x.value(record), y.value(record)
        spans = [
            [[abs(v - low)], [abs(high - v)]]
            for v, (low, high) in zip(where, (x.interval(record), y.interval(record)), strict=True)
        ]
        ax.errorbar(
            *where, xerr=spans[0], yerr=spans[1], fmt="none", ecolor=style["color"], alpha=0.4, capsize=2, zorder=2
        )
        face = {"leads": style["color"], "tied": (*to_rgb(style["color"]), 0.3), "beaten": "white"}[stands[id(record)]]
        ax.scatter(
            *where,
            s=60,
            marker=style["marker"],
            facecolor=face,
            edgecolor=style["color"],
            zorder=3,
            label=family if number == 0 else None,
        )


def techniques_table(records: Sequence[Record], *, x: str = "speed", y: str = "task score") -> str:
    """The plot as text, best on `x` first, with the standing of each."""
    across, up = AXES[x], AXES[y]
    records = placed(records, across, up)
    sign = 1 if across.lower_is_better else -1
    rows = [f"{'':7}{across.label}  |  {up.label}"]
    for record in sorted(records, key=lambda r: sign * across.value(r)):
        stands = standing(record, records, across, up)
        cells = (
            f"{axis.value(record):9.4g} {f'[{low:.3g}, {high:.3g}]':<20}"
            for axis in (across, up)
            for low, high in [axis.interval(record)]
        )
        rows.append(f"{stands:<7}{''.join(cells)} {record.technique} ({record.family or OTHER})")
    return "\n".join(rows)
