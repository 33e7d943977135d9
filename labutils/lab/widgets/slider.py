"""A slider over a row of pictures. Works with ipywidgets 7.7 and 8."""

from collections.abc import Callable

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labutils.lab.language import translated
from labutils.lab.plots.words import png


def picture_slider(
    name: str, count: int, draw: Callable[[Axes, int], object], *, figsize: tuple[float, float]
) -> widgets.VBox:
    """Returns a slider from 0 to `count` - 1 and below it what `draw` makes of its value, in inches of `figsize`."""
    slider = widgets.IntSlider(value=0, min=0, max=count - 1, description=translated(name))
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def redraw(_change=None) -> None:
        figure = Figure(figsize=figsize, layout="constrained")
        draw(figure.subplots(), slider.value)
        picture.value = png(figure)

    slider.observe(redraw, names="value")
    redraw()
    return widgets.VBox([slider, picture])
