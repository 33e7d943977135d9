"""Bits, granularity and clipping of one layer, and the bits of one number, by hand. Works with ipywidgets 7.7 and 8."""

from __future__ import annotations

from collections.abc import Iterable

import ipywidgets as widgets
import torch
from jaxtyping import Float
from torch import Tensor

from labutils.lab.language import language, retold, translated
from labutils.lab.plots.quantization import CLIPPINGS, GRANULARITIES, draw_quantized_layer, quantized_layer
from labutils.lab.plots.words import png
from labutils.quantization.floats import E2M1, E4M3, E5M2, decode

FLOATS = {"E4M3": E4M3, "E5M2": E5M2, "E2M1": E2M1}


def quantization_widget(weight: Float[Tensor, "out_features in_features"]) -> widgets.VBox:
    """Returns the controls and the picture of a layer; `quantized_layer` is the plain function behind them."""
    bits = widgets.IntSlider(value=4, min=2, max=8, description=translated("bits"), continuous_update=False)
    granularity = widgets.Dropdown(
        options=_choices(GRANULARITIES), value="group of 64", description=translated("scale per")
    )
    clipping = widgets.Dropdown(options=_choices(CLIPPINGS), description=translated("range"))
    line = widgets.Label()
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def redraw(_change=None) -> None:
        layer = quantized_layer(weight, bits=bits.value, granularity=granularity.value, clipping=clipping.value)
        picture.value, line.value = png(draw_quantized_layer(layer)), retold(language(), str(layer))

    for control in (bits, granularity, clipping):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([bits, granularity, clipping]), line, picture])


def spell_bits(bits: str, form: str) -> str:
    """What some bits, the highest first, mean in a format: "E4M3", "E5M2", "E2M1" or "int8".

    E2M1 takes the last four bits.

    Raises:
        ValueError: for another format, and for what is not eight times 0 or 1.

    >>> spell_bits("00111001", "E4M3"), spell_bits("11111111", "int8")
    ('0 0111 001 means 1.125', '11111111 means -1')
    """
    if form not in (*FLOATS, "int8"):
        raise ValueError(f"a format must be one of {', '.join(FLOATS)}, int8; got {form!r}")
    if len(bits) != 8 or not set(bits) <= set("01"):
        raise ValueError(f"bits must be eight times 0 or 1; got {bits!r}")
    if form == "int8":
        return f"{bits} means {int(bits, 2) - 256 * int(bits[0])}"
    shape = FLOATS[form]
    bits = bits[-(1 + shape.exponent_bits + shape.mantissa_bits) :]
    value = decode(torch.tensor([int(bits, 2)], dtype=torch.uint8), shape).item()
    parts = bits[0], bits[1 : 1 + shape.exponent_bits], bits[1 + shape.exponent_bits :]
    return f"{' '.join(parts)} means {value:g}"


def bits_widget() -> widgets.VBox:
    """Returns eight bits to flip and a format to read them in; `spell_bits` is the plain function behind them."""
    narrow = widgets.Layout(width="36px")
    buttons = [widgets.ToggleButton(value=bit == "1", description=bit, layout=narrow) for bit in "00111000"]
    form = widgets.Dropdown(options=[*FLOATS, "int8"], description=translated("read as"))
    line = widgets.Label()

    def respell(_change=None) -> None:
        for button in buttons:
            button.description = "1" if button.value else "0"
        line.value = spell_bits("".join(button.description for button in buttons), form.value)

    for control in (*buttons, form):
        control.observe(respell, names="value")
    respell()
    return widgets.VBox([widgets.HBox([*buttons, form]), line])


def _choices(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name as the learner reads it, with itself as the value."""
    return [(retold(language(), name), name) for name in names]
