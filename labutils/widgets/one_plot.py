"""Every technique on one plot, with both axes to choose. Works with ipywidgets 7.7 and 8."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import ipywidgets as widgets

from labutils.measurement.ledger import Record
from labutils.plots.one_plot import AXES, draw_techniques, techniques_table


def techniques_widget(records: Sequence[Record], *, x: str = "speed", y: str = "task score") -> widgets.VBox:
    """Returns the plot with a choice of axes; `draw_techniques` and `techniques_table` are the plain alternative.

    An axis that was measured for no record is a sentence instead of a picture.
    """
    across = widgets.Dropdown(options=list(AXES), value=x, description="right")
    up = widgets.Dropdown(options=list(AXES), value=y, description="up")
    picture, table = widgets.Image(format="png", layout=widgets.Layout(max_width="100%")), widgets.HTML()

    def redraw(_change=None) -> None:
        image, text = io.BytesIO(), ""
        try:
            draw_techniques(records, x=across.value, y=up.value).savefig(image, format="png", dpi=100)
            text = techniques_table(records, x=across.value, y=up.value)
        except ValueError as error:
            text = str(error)
        picture.value, table.value = image.getvalue(), f"<pre>{html.escape(text)}</pre>"

    for control in (across, up):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([across, up]), picture, table])
