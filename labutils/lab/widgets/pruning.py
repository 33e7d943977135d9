"""Prune a model while it speaks: each move of the slider prunes it anew, and the text goes on from where it was."""

import html
from collections.abc import Sequence

import ipywidgets as widgets
import torch

from labutils.generation.decode import generate_cached
from labutils.lab.language import translated
from labutils.lab.layers.calibration import InputStatistics
from labutils.lab.layers.linears import linear_layers, set_weight_, weight_of
from labutils.pruning.masks import apply_masks_, mask_model
from labutils.pruning.scores import magnitude_scores, wanda_scores

CRITERIA = ("magnitude", "Wanda")


class PrunedSpeaker:
    """A model that goes on with one text at any sparsity; its weights come back after each piece.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        statistics: of its linear layers' inputs, for Wanda.
        prompt: the text to go on with.
    """

    def __init__(self, model, tokenizer, statistics: dict[str, InputStatistics], prompt: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.scores = {"magnitude": magnitude_scores(model), "Wanda": wanda_scores(model, statistics)}
        self.prompt = prompt
        self.pieces: list[tuple[float, str, str]] = []  # sparsity, criterion, text

    @property
    def text(self) -> str:
        """Everything so far."""
        return self.prompt + "".join(piece for _, _, piece in self.pieces)

    def speak(self, sparsity: float, *, criterion: str = "magnitude", tokens: int = 16) -> str:
        """Goes on for some tokens with that share of the body's weights at zero, and returns the new text.

        Raises:
            ValueError: for a sparsity outside [0, 1].
        """
        masks = mask_model(self.scores[criterion], sparsity, scope="row" if criterion == "Wanda" else "layer")
        whole = {name: weight_of(layer).clone() for name, layer in linear_layers(self.model)}
        ids = self.tokenizer(self.text, return_tensors="pt", add_special_tokens=False).input_ids.to(self.model.device)
        try:
            apply_masks_(self.model, masks)
            new = generate_cached(self.model, ids, tokens)[0, ids.shape[1] :]
        finally:
            for name, layer in linear_layers(self.model):
                set_weight_(layer, whole[name])
        piece = self.tokenizer.decode(torch.as_tensor(new), skip_special_tokens=True)
        self.pieces.append((sparsity, criterion, piece))
        return piece


def print_speech(speaker: PrunedSpeaker, sparsities: Sequence[float], *, criterion: str = "magnitude") -> None:
    """The plain alternative: speaks once at each sparsity and prints what it said."""
    for sparsity in sparsities:
        print(f"[{sparsity:>4.0%} zeros, {criterion}] {speaker.speak(sparsity, criterion=criterion)!r}")


def pruning_widget(speaker: PrunedSpeaker) -> widgets.VBox:
    """A slider, a choice of criterion, a button that starts anew, and the text, each piece with its sparsity."""
    sparsity = widgets.FloatSlider(value=0, min=0, max=0.95, step=0.05, readout_format=".0%", continuous_update=False)
    sparsity.description = translated("zeros")
    criterion = widgets.Dropdown(options=CRITERIA, description=translated("criterion"))
    anew = widgets.Button(description=translated("start anew"))
    page = widgets.HTML()

    def show() -> None:
        rows = [f"<pre style='white-space: pre-wrap; margin: 0'>{html.escape(speaker.prompt)}</pre>"]
        for level, name, piece in speaker.pieces:
            label = f"<small>{level:.0%} zeros, {name}</small>"
            rows.append(f"{label}<pre style='white-space: pre-wrap; margin: 0'>{html.escape(piece)}</pre>")
        page.value = "".join(rows)

    def go_on(_change=None) -> None:
        speaker.speak(sparsity.value, criterion=criterion.value)
        show()

    def start(_button) -> None:
        speaker.pieces.clear()
        show()

    sparsity.observe(go_on, names="value")
    criterion.observe(go_on, names="value")
    anew.on_click(start)
    show()
    return widgets.VBox([widgets.HBox([sparsity, criterion, anew]), page])
