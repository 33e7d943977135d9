"""A slider over the steps of an engine's memory. Works with ipywidgets 7.7 and 8."""

from collections.abc import Sequence

import ipywidgets as widgets

from labutils.lab.language import marked
from labutils.lab.plots.serving import draw_blocks
from labutils.lab.widgets.slider import picture_slider


def blocks_widget(frames: Sequence[Sequence[str]]) -> widgets.VBox:
    """Returns a slider and the block map after one step; `print_blocks` is the plain alternative."""
    name, count = marked("step"), len(frames)
    return picture_slider(name, count, lambda axes, step: draw_blocks(axes, frames[step]), figsize=(7, 2.2))


def print_blocks(frames: Sequence[Sequence[str]], steps: Sequence[int]) -> None:
    """Prints a line for each of some steps: `.` free, `c` cached, a digit for the tables that hold a block.

    >>> print_blocks([["free", "owned", "shared 2", "cached"]], [0])
    step   0  .12c
    """
    for step in steps:
        signs = (state.removeprefix("shared ").replace("owned", "1") for state in frames[step])
        print(f"step {step:>3}  {''.join({'free': '.', 'cached': 'c'}.get(s, s) for s in signs)}")
