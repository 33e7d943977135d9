"""A slider over the cycles of a systolic array. Works with ipywidgets 7.7 and 8."""

import ipywidgets as widgets

from labutils.fpga.simulate import March
from labutils.lab.language import marked
from labutils.lab.plots.fpga import draw_cycle, march_table
from labutils.lab.widgets.slider import picture_slider


def march_widget(march: March) -> widgets.VBox:
    """Returns a slider and the picture of one cycle; `print_march` is the plain alternative."""
    count = len(march.weights)
    return picture_slider(marked("cycle"), count, lambda ax, cycle: draw_cycle(ax, march, cycle), figsize=(4, 4.2))


def print_march(march: March, cycles: range | None = None) -> None:
    """The plain alternative: every cycle as text."""
    for cycle in range(len(march.weights)) if cycles is None else cycles:
        print(march_table(march, cycle))
