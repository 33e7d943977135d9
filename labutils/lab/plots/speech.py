"""The figure of an utterance: its sound, its features, and what was understood when."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from labutils.lab.plots.style import PALETTE
from labutils.speech.features import log_mel
from labutils.speech.recognise import Recognition
from labutils.speech.voices import RATE, Samples


def draw_utterance(samples: Samples, heard: Recognition, shown: Sequence[str]) -> Figure:
    """Draws the waveform, the log-mel features, and the words of each partial and committed text over time.

    Args:
        samples: the sound.
        heard: how it was recognised; its texts stand where they were there, had the sound come in real time.
        shown: what was committed after each chunk.
    """
    import matplotlib.pyplot as plt

    figure, (wave, mel, words) = plt.subplots(3, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    seconds = len(samples) / RATE
    wave.plot([i / RATE for i in range(0, len(samples), 8)], samples[::8].tolist(), color=PALETTE[0], linewidth=0.4)
    wave.set(ylabel="sample", title=heard.text or "(nothing was recognised)")
    features = log_mel(samples).T.numpy()
    mel.imshow(features, aspect="auto", origin="lower", extent=(0, seconds, 0, len(features)), cmap="viridis")
    mel.set(ylabel="mel band")
    ready = heard.ready_s
    words.step(ready, [len(step.text.split()) for step in heard.steps], where="post", color=PALETTE[1])
    words.step(ready, [len(text.split()) for text in shown], where="post", color=PALETTE[2], linestyle="--")
    words.plot(seconds + heard.latency_s, len(heard.text.split()), marker="s", linestyle="", color=PALETTE[6])
    words.axvline(seconds, color=PALETTE[6], linewidth=0.8, linestyle=":")
    words.legend(["partial text", "committed text", "final text", "end of the sound"], loc="upper left")
    words.set(xlabel="seconds since the sound began", ylabel="words")
    return figure
