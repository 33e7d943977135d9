"""The one plot of the course: speed against quality, with intervals, devices and the Pareto front.

A point is off the front only if another is *surely* faster and *surely* better: both differences exclude zero. What an
interval cannot tell apart is a tie, and the table says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labutils.lab.plots.style import label_points, plain_log_scale, series_style
from labutils.measurement.ledger import Record, check_drawable
from labutils.measurement.timing import bootstrap_interval, difference_is_sure


@dataclass(frozen=True)
class Quality:
    """Which quality is drawn: `bits_per_byte` (lower is better), or a task's score (higher is better)."""

    field: str = "bits_per_byte"
    task: str | None = None

    @property
    def lower_is_better(self) -> bool:
        """Bits per byte count surprise; scores count successes."""
        return self.field == "bits_per_byte"

    @property
    def label(self) -> str:
        """The axis label, with unit and direction."""
        return (
            "quality: bits per byte (lower is better, axis inverted)"
            if self.lower_is_better
            else f"quality: {self.task} score (higher is better)"
        )

    def of(self, record: Record) -> float | None:
        """Returns the record's value on this axis, None if it has none."""
        return record.bits_per_byte if self.lower_is_better else record.task_score if record.task == self.task else None

    def goodness(self, record: Record) -> float:
        """Returns the record's value with the sign that makes more of it better."""
        return -self.of(record) if self.lower_is_better else self.of(record)


BITS_PER_BYTE = Quality()


def task_quality(task: str) -> Quality:
    """Returns the axis of a task's score."""
    return Quality("task_score", task)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other point beats, fastest first.

    A point is (speed, goodness), more of both is better. Another point beats it if it is at least as good in
    both and better in one; of equal points, the first stays.

    >>> pareto_front([(1.0, 3.0), (2.0, 2.0), (1.5, 1.0), (3.0, 0.0)])
    [3, 1, 0]
    """
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def drawable_records(records: Sequence[Record], quality: Quality = BITS_PER_BYTE) -> list[Record]:
    """Returns the records that this plot can show.

    Raises:
        ValueError: If a record lacks raw samples or any quality, or if none has this quality.
    """
    for record in records:
        check_drawable(record)
    chosen = [r for r in records if quality.of(r) is not None]
    if not chosen:
        wanted = quality.task or quality.field
        raise ValueError(f"the plot needs at least one record with {wanted}; got {len(records)} records without")
    return chosen


def finding(records: Sequence[Record], quality: Quality = BITS_PER_BYTE) -> str:
    """Returns the sentence that the plot shows: its title. What the intervals cannot tell apart, it calls so."""
    front = [records[i] for i in front_of(records, quality)]
    fastest, best = front[0], front[-1]
    if fastest is best:
        rivals = [r.technique for r in records if r is not best and not difference_is_sure(r.samples, best.samples)]
        near = f", in speed not told apart from {' and '.join(rivals)}" if rivals else ""
        return f"{best.technique} is fastest, and none is better ({_rounded(best.tokens_per_s)} tokens/s{near})"
    ratio = fastest.tokens_per_s / best.tokens_per_s
    where = "" if fastest.device == best.device else f" ({fastest.device} against {best.device})"
    unit = "bits per byte" if quality.lower_is_better else "score"
    cost = f"costs {abs(quality.of(fastest) - quality.of(best)):.2g} {unit}"
    if not quality_is_sure(fastest, best, quality):
        cost = "differs in quality by no more than chance"
    if difference_is_sure(fastest.samples, best.samples):
        return f"{fastest.technique} is {_rounded(ratio, 2)}x as fast as {best.technique}{where} and {cost}"
    return f"{fastest.technique} and {best.technique}{where} are not told apart in speed; the former {cost}"


def _rounded(value: float, digits: int = 3) -> str:
    """A number with so many digits, and never as a power of ten."""
    return f"{value:,.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def front_of(records: Sequence[Record], quality: Quality = BITS_PER_BYTE) -> list[int]:
    """Returns the indices of the Pareto-optimal records by medians, fastest first: the line that is drawn."""
    return pareto_front([(r.tokens_per_s, quality.goodness(r)) for r in records])


def beaten_by(record: Record, records: Sequence[Record], quality: Quality = BITS_PER_BYTE) -> list[Record]:
    """Returns the records that are surely faster than this one and surely better."""
    return [
        r
        for r in records
        if r.tokens_per_s > record.tokens_per_s
        and quality.goodness(r) > quality.goodness(record)
        and difference_is_sure(r.samples, record.samples)
        and quality_is_sure(r, record, quality)
    ]


def quality_is_sure(first: Record, second: Record, quality: Quality = BITS_PER_BYTE) -> bool:
    """Whether two qualities differ by more than chance: the paired bootstrap over documents excludes zero.

    Records without the bits of each document, or of other documents, cannot be paired: any difference counts then.
    """
    pairs = list(zip(first.document_bits, second.document_bits, strict=False))
    sizes = [[size for _, size in r.document_bits] for r in (first, second)]
    if not quality.lower_is_better or sizes[0] != sizes[1] or len(pairs) < 5:
        return quality.of(first) != quality.of(second)

    def difference(sample) -> float:
        return sum(a - b for (a, _), (b, _) in sample)

    low, high = bootstrap_interval(pairs, statistic=difference)
    return low > 0 or high < 0


def draw_speed_quality(
    records: Sequence[Record], *, quality: Quality = BITS_PER_BYTE, ax: Axes | None = None
) -> Figure:
    """Draws records as points with 95% intervals, one colour and shape per technique, and the Pareto front.

    Names stand at the points where model and device are the same for all, and in a legend otherwise.

    Args:
        records: From the ledger; each needs raw samples and a quality.
        quality: The y axis; bits per byte, or `task_quality(name)`.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: See `drawable_records`.
    """
    records = drawable_records(records, quality)
    ax = ax or Figure(figsize=(8.5, 6.0), layout="constrained").subplots()
    shared = {_setting(r) for r in records}
    name = legend_label if len(shared) > 1 else lambda r: r.technique
    labels = list(dict.fromkeys(map(name, records)))
    front = front_of(records, quality)
    line = zip(*((records[i].tokens_per_s, quality.of(records[i])) for i in front), strict=True)
    ax.plot(*line, "--", color="0.6", zorder=1, label="Pareto front of the medians")
    for index, label in enumerate(labels):
        _draw_series(ax, [r for r in records if name(r) == label], quality, label, series_style(index))
    where = "" if len(shared) > 1 else f"; {shared.pop()}"
    ax.set_xlabel(f"speed: tokens/s (median, 95% bootstrap interval){where}")
    ax.set_ylabel(quality.label)
    ax.set_title(finding(records, quality), wrap=True)
    ax.margins(0.12, 0.15)
    middle, height = sum(ax.get_ylim()) / 2, ax.get_ylim()[1] - ax.get_ylim()[0]
    if height < 1e-3:  # rounding, which an axis of its size would show as a difference
        ax.set_ylim(middle - 5e-3, middle + 5e-3)
    speeds = [r.tokens_per_s for r in records]
    if max(speeds) > 10 * min(speeds):
        plain_log_scale(ax, "x")
    if quality.lower_is_better:
        ax.invert_yaxis()
    ax.grid(alpha=0.25)
    if where:
        label_points(ax, [(r.technique, r.tokens_per_s, quality.of(r)) for r in records])
    else:
        ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return ax.get_figure()


def _place(record: Record) -> tuple[str, str]:
    """Where a record was measured, and its batch where that is above 1."""
    device = record.host.get("gpu") if record.device.startswith("cuda") else None
    where = device or f"{record.device}, {record.threads} thread{'s' if record.threads > 1 else ''}"
    return where, f", batch {record.batch}" if record.batch > 1 else ""


def _setting(record: Record) -> str:
    return f"{record.model} ({''.join(_place(record))})"


def legend_label(record: Record) -> str:
    """Returns technique, model, device and format, as the legend shows them."""
    where, batch = _place(record)
    return f"{record.technique}: {record.model} ({where}, {record.dtype}{batch})"


def speed_quality_table(records: Sequence[Record], *, quality: Quality = BITS_PER_BYTE) -> str:
    """Returns the plot as text, sorted by speed: `*` marks what nothing surely beats in both.

    The last column says of such a record off the median's front on which axis it is not told apart from it.
    """
    records = drawable_records(records, quality)
    front = front_of(records, quality)
    on_line = {id(records[i]) for i in front}
    rows = [f"{'':2}{'tokens/s':>9} {'95% interval':>17} {quality.task or 'bits/byte':>10}  technique"]
    for r in sorted(records, key=lambda r: -r.tokens_per_s):
        low, high = r.interval_tokens_per_s
        mark = "" if beaten_by(r, records, quality) else "*"
        tie = _tie(r, [records[i] for i in front], quality) if mark and id(r) not in on_line else ""
        speed = f"{mark:2}{r.tokens_per_s:9.1f} {f'[{low:.1f}, {high:.1f}]':>17}"
        rows.append(f"{speed} {quality.of(r):10.4f}  {legend_label(r)}{tie}")
    return "\n".join(rows)


def _tie(record: Record, front: Sequence[Record], quality: Quality) -> str:
    """How a record that nothing surely beats in both stands to those of the front that have better medians."""
    faster = [r for r in front if r.tokens_per_s >= record.tokens_per_s]
    ahead = [r for r in faster if quality.goodness(r) >= quality.goodness(record)]
    slower = any(difference_is_sure(r.samples, record.samples) for r in ahead)
    worse = any(quality_is_sure(r, record, quality) for r in ahead)
    if slower and worse:
        return "; slower than one of the front, worse than another"
    tied = "slower, in quality" if slower else "worse, in speed" if worse else ""
    return f"; {tied} not told apart" if tied else "; not told apart from the front"


def _draw_series(ax: Axes, records: Sequence[Record], quality: Quality, label: str, style: dict[str, str]) -> None:
    speeds, qualities = [r.tokens_per_s for r in records], [quality.of(r) for r in records]
    errors = [[abs(r.interval_tokens_per_s[end] - r.tokens_per_s) for r in records] for end in (0, 1)]
    ax.errorbar(speeds, qualities, xerr=errors, fmt="none", ecolor=style["color"], capsize=4, zorder=2)
    ax.scatter(speeds, qualities, s=80, label=label, edgecolor="white", linewidth=0.8, zorder=3, **style)
