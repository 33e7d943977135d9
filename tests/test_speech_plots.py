"""The figure of an utterance shows what was there, when it was there."""

import matplotlib.pyplot as plt
import pytest
import torch

from labutils.lab.plots.speech import draw_utterance
from labutils.speech.recognise import Recognition, Step, committed
from labutils.speech.voices import white_noise


def test_texts_stand_where_they_were_ready():
    samples = white_noise(32_000, torch.Generator().manual_seed(0))
    heard = Recognition((Step(1.0, 0.3, "can"), Step(2.0, 0.5, "can i pay")), 0.25, "can i pay")
    figure = draw_utterance(samples, heard, committed(step.text for step in heard.steps))
    wave, mel, words = figure.axes
    partial, shown, final, end = words.lines
    assert list(partial.get_xdata()) == pytest.approx([1.3, 2.5]) and list(partial.get_ydata()) == [1, 3]
    assert list(shown.get_ydata()) == [0, 1]
    assert (final.get_xdata()[0], final.get_ydata()[0]) == pytest.approx((2.75, 3)) and end.get_xdata()[0] == 2.0
    assert mel.images[0].get_array().shape == (40, 198) and wave.get_title() == "can i pay"
    plt.close(figure)
