"""Bits, granularity and clipping of one layer, by hand. Works with ipywidgets 7.7 and 8."""

from __future__ import annotations

import io

import ipywidgets as widgets
from jaxtyping import Float
from torch import Tensor

from labutils.plots.quantization import CLIPPINGS, GRANULARITIES, draw_quantized_layer, quantized_layer


def quantization_widget(weight: Float[Tensor, "out_features in_features"]) -> widgets.VBox:
    """Returns the controls and the picture of a layer; `quantized_layer` is the plain function behind them."""
    bits = widgets.IntSlider(value=4, min=2, max=8, description="bits", continuous_update=False)
    granularity = widgets.Dropdown(options=list(GRANULARITIES), value="group of 64", description="scale per")
    clipping = widgets.Dropdown(options=list(CLIPPINGS), description="range")
    line = widgets.Label()
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def redraw(_change=None) -> None:
        layer = quantized_layer(weight, bits=bits.value, granularity=granularity.value, clipping=clipping.value)
        image = io.BytesIO()
        draw_quantized_layer(layer).savefig(image, format="png", dpi=90)
        picture.value, line.value = image.getvalue(), str(layer)

    for control in (bits, granularity, clipping):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([bits, granularity, clipping]), line, picture])
