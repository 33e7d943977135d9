"""Log-mel features: how much energy each band of frequencies has, every hundredth of a second.

The steps are those of every recogniser: cut overlapping windows, Fourier-transform them, add up the power in bands that
are as wide as the ear's, take the logarithm (Davis and Mermelstein 1980). The mel scale is O'Shaughnessy's (1987).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.speech.voices import RATE, Samples


@dataclass(frozen=True)
class MelSettings:
    """Sizes in samples at 16 kHz: windows of 25 ms, one every 10 ms, 40 bands."""

    window: int = 400
    hop: int = 160
    fft: int = 512
    bands: int = 40
    low_hz: float = 20.0
    high_hz: float = 7600.0


DEFAULT = MelSettings()


def hz_to_mel(hz: float) -> float:
    """2595 log10(1 + hz / 700).

    >>> round(hz_to_mel(700.0), 1)
    781.2
    """
    return 2595 * math.log10(1 + hz / 700)


def mel_to_hz(mel: float) -> float:
    """The inverse of `hz_to_mel`."""
    return 700 * (10 ** (mel / 2595) - 1)


@cache
def mel_filters(settings: MelSettings = DEFAULT) -> Float[Tensor, "bands bins"]:
    """Triangles over the bins of the spectrum: each rises from its left neighbour's peak and falls to its right one's.

    Peaks are equally far apart in mel; a filter's weight is 1 at its peak.
    """
    low, high = hz_to_mel(settings.low_hz), hz_to_mel(settings.high_hz)
    step = (high - low) / (settings.bands + 1)
    edges = torch.tensor([mel_to_hz(low + i * step) for i in range(settings.bands + 2)])
    hz = torch.arange(settings.fft // 2 + 1) * RATE / settings.fft
    left, peak, right = (edges[i : i + settings.bands, None] for i in range(3))
    return torch.minimum((hz - left) / (peak - left), (right - hz) / (right - peak)).clamp(min=0)


def power_spectrum(samples: Samples, settings: MelSettings = DEFAULT) -> Float[Tensor, "frames bins"]:
    """|Fourier transform|² of each Hann window, of samples between −1 and 1.

    Frames: 1 + (samples − window) // hop; what is left at the end is dropped.

    Raises:
        ValueError: when there is less than one window of sound.
    """
    if len(samples) < settings.window:
        raise ValueError(f"features need at least {settings.window} samples; got {len(samples)}")
    frames = (samples.float() / 32768).unfold(0, settings.window, settings.hop)
    windowed = frames * torch.hann_window(settings.window)
    return torch.fft.rfft(windowed, n=settings.fft).abs().square()


def log_mel(samples: Samples, settings: MelSettings = DEFAULT) -> Float[Tensor, "frames bands"]:
    """Natural logarithm of each band's power; a floor of 1e-6 stands for silence.

    >>> log_mel(torch.zeros(16_000, dtype=torch.int16)).shape
    torch.Size([98, 40])
    """
    return (power_spectrum(samples, settings) @ mel_filters(settings).T).clamp(min=1e-6).log()


def normalized(features: Float[Tensor, "frames bands"]) -> Float[Tensor, "frames bands"]:
    """Each band less its mean over the utterance, and all divided by one deviation: loudness and microphone drop out.

    >>> normalized(torch.tensor([[1.0, 5.0], [3.0, 7.0]]))
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    centred = features - features.mean(dim=0)
    return centred / centred.square().mean().sqrt().clamp(min=1e-3)
