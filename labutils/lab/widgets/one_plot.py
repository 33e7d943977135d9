"""Every technique on one plot, with both axes to choose. Works with ipywidgets 7.7 and 8."""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets as widgets

from labutils.lab.language import language, retold, translated
from labutils.lab.plots.one_plot import AXES, draw_techniques, techniques_table
from labutils.lab.plots.words import png
from labutils.measurement.ledger import Record


def techniques_widget(records: Sequence[Record], *, x: str = "speed", y: str = "task score") -> widgets.VBox:
    """Returns the plot with a choice of axes; `draw_techniques` and `techniques_table` are the plain alternative.

    An axis that was measured for no record is a sentence instead of a picture.
    """
    choices = [(retold(language(), name), name) for name in AXES]
    across = widgets.Dropdown(options=choices, value=x, description=translated("to the right"))
    up = widgets.Dropdown(options=choices, value=y, description=translated("upwards"))
    picture, table = widgets.Image(format="png", layout=widgets.Layout(max_width="100%")), widgets.HTML()

    def redraw(_change=None) -> None:
        image = b""
        try:
            image = png(draw_techniques(records, x=across.value, y=up.value), dpi=100)
            text = techniques_table(records, x=across.value, y=up.value)
        except ValueError as error:
            text = str(error)
        picture.value, table.value = image, f"<pre>{html.escape(text)}</pre>"

    for control in (across, up):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([across, up]), picture, table])
