"""A slider for temperature: how a teacher's opinion of the next token spreads out."""

import html

import ipywidgets as widgets
import torch
from jaxtyping import Float
from torch import Tensor


def opinion_at(tokenizer, logits: Float[Tensor, " vocab"], temperature: float, *, count: int = 8) -> str:
    """The likeliest tokens at a temperature, one a line with a bar of characters, and what all others share."""
    probs, ids = torch.softmax(logits.float() / temperature, dim=-1).topk(count)
    names = [repr(tokenizer.decode([int(i)])) for i in ids]
    rows = [f"{name:<16}{p:6.1%} {'█' * round(40 * p)}" for name, p in zip(names, probs.tolist(), strict=True)]
    rest = 1 - probs.sum().item()
    return "\n".join([f"T = {temperature:g}", *rows, f"{'all others':<16}{rest:6.1%} {'█' * round(40 * rest)}"])


def temperature_widget(tokenizer, logits: Float[Tensor, " vocab"]) -> widgets.VBox:
    """A slider from ½ to 16; the plain alternative is `print(opinion_at(tokenizer, logits, 4.0))`."""
    slider = widgets.FloatLogSlider(value=1.0, base=2, min=-1, max=4, step=0.5, description="T", readout_format=".2f")
    page = widgets.HTML()

    def show(_change=None) -> None:
        page.value = f"<pre>{html.escape(opinion_at(tokenizer, logits, slider.value))}</pre>"

    slider.observe(show, names="value")
    show()
    return widgets.VBox([slider, page])
