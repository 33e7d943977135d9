"""A slider over the cycles of a systolic array. Works with ipywidgets 7.7 and 8."""

import io

import ipywidgets as widgets
from matplotlib.figure import Figure

from labutils.fpga.simulate import March
from labutils.plots.fpga import draw_cycle, march_table


def march_widget(march: March) -> widgets.VBox:
    """Returns a slider and the picture of one cycle; `print_march` is the plain alternative."""
    cycle = widgets.IntSlider(value=0, min=0, max=len(march.weights) - 1, description="cycle")
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def redraw(_change=None) -> None:
        figure = Figure(figsize=(4, 4.2), layout="constrained")
        draw_cycle(figure.subplots(), march, cycle.value)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=90)
        picture.value = image.getvalue()

    cycle.observe(redraw, names="value")
    redraw()
    return widgets.VBox([cycle, picture])


def print_march(march: March, cycles: range | None = None) -> None:
    """The plain alternative: every cycle as text."""
    for cycle in range(len(march.weights)) if cycles is None else cycles:
        print(march_table(march, cycle))
