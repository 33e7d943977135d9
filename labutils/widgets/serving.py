"""A slider over the steps of an engine's memory. Works with ipywidgets 7.7 and 8."""

import io
from collections.abc import Sequence

import ipywidgets as widgets
from matplotlib.figure import Figure

from labutils.plots.serving import draw_blocks


def blocks_widget(frames: Sequence[Sequence[str]]) -> widgets.VBox:
    """Returns a slider and the block map after one step; `print_blocks` is the plain alternative."""
    step = widgets.IntSlider(value=0, min=0, max=len(frames) - 1, description="step")
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def redraw(_change=None) -> None:
        figure = Figure(figsize=(7, 2.2), layout="constrained")
        draw_blocks(figure.subplots(), frames[step.value])
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=90)
        picture.value = image.getvalue()

    step.observe(redraw, names="value")
    redraw()
    return widgets.VBox([step, picture])


def print_blocks(frames: Sequence[Sequence[str]], steps: Sequence[int]) -> None:
    """Prints a line for each of some steps: `.` free, `c` cached, a digit for the tables that hold a block.

    >>> print_blocks([["free", "owned", "shared 2", "cached"]], [0])
    step   0  .12c
    """
    for step in steps:
        signs = (state.removeprefix("shared ").replace("owned", "1") for state in frames[step])
        print(f"step {step:>3}  {''.join({'free': '.', 'cached': 'c'}.get(s, s) for s in signs)}")
