"""The speed-quality plot with choices: models, devices, quality. Works with ipywidgets 7.7 and 8."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets

from labutils.lab.language import language, marked, retold, translated
from labutils.lab.plots.speed_quality import (
    BITS_PER_BYTE,
    Quality,
    draw_speed_quality,
    speed_quality_table,
    task_quality,
)
from labutils.lab.plots.words import png
from labutils.measurement.ledger import Record, read

ALL = marked("all")


def speed_quality_widget(records: Sequence[Record] | None = None) -> widgets.VBox:
    """Returns the interactive plot of `records`, by default of the learner's whole ledger.

    The first picture shows everything, so a page that only stores outputs still has the figure. Without
    widgets, `draw_speed_quality(read())` draws the same and `speed_quality_table(read())` prints it.

    Raises:
        ValueError: If no record can be drawn.
    """
    records = list(read() if records is None else records)
    qualities = available_qualities(records)
    if not qualities:
        raise ValueError(f"the plot needs at least one record with a quality; got {len(records)} records")
    shown = [(retold(language(), name), name) for name in qualities]
    model = widgets.Dropdown(options=_choices(r.model for r in records), description=translated("model"))
    device = widgets.Dropdown(options=_choices(r.device for r in records), description=translated("device"))
    quality = widgets.Dropdown(options=shown, description=translated("quality"))
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
    table = widgets.HTML()

    def redraw(_change=None) -> None:
        chosen = select(records, model=model.value, device=device.value)
        picture.value, table.value = _render(chosen, qualities[quality.value])

    for control in (model, device, quality):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([model, device, quality]), picture, table])


def available_qualities(records: Sequence[Record]) -> dict[str, Quality]:
    """Returns the qualities that at least one record has, by the name to show."""
    found = {"bits per byte": BITS_PER_BYTE} if any(r.bits_per_byte is not None for r in records) else {}
    return found | {r.task: task_quality(r.task) for r in records if r.task and r.task_score is not None}


def select(records: Sequence[Record], *, model: str = ALL, device: str = ALL) -> list[Record]:
    """Returns the records of one model and one device; `all` keeps every one."""
    return [r for r in records if model in (ALL, r.model) and device in (ALL, r.device)]


def _render(records: Sequence[Record], quality: Quality) -> tuple[bytes, str]:
    try:
        image = png(draw_speed_quality(records, quality=quality), dpi=100)
    except ValueError as error:
        return b"", f"<p>{error}</p>"
    return image, f"<pre>{_escape(speed_quality_table(records, quality=quality))}</pre>"


def _choices(values) -> list[tuple[str, str]]:
    return [(translated(ALL), ALL), *((value, value) for value in dict.fromkeys(values))]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
