"""The cost of a million tokens, by the reader's own prices. Works with ipywidgets 7.7 and 8."""

from __future__ import annotations

import ipywidgets as widgets

from labutils.acceleration.cost import cost_per_million
from labutils.lab.language import translated


def cost_widget(tokens_per_s: float, *, joules_per_token: float | None = None) -> widgets.VBox:
    """Returns the controls and the answer; `cost_per_million` is the plain function behind them."""
    wide = {"style": {"description_width": "11em"}}
    speed = widgets.FloatText(value=round(tokens_per_s, 1), description=translated("tokens per second"), **wide)
    rent = widgets.FloatText(value=1.0, description=translated("price per hour"), **wide)
    tariff = widgets.FloatText(value=0.3, description=translated("price per kWh"), **wide)
    in_use = translated("share of time in use")
    share = widgets.FloatSlider(value=0.5, min=0.05, max=1.0, step=0.05, description=in_use, **wide)
    answer = widgets.Label()

    def redraw(_change=None) -> None:
        try:
            answer.value = str(
                cost_per_million(
                    speed.value,
                    price_per_hour=rent.value,
                    joules_per_token=joules_per_token,
                    price_per_kwh=tariff.value,
                    utilisation=share.value,
                )
            )
        except ValueError as error:
            answer.value = str(error)

    for control in (speed, rent, tariff, share):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([speed, rent, tariff, share, answer])
