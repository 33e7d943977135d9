"""Spoken sentences: synthesised by the program espeak-ng, read from WAV files, and mixed with noise.

Samples are 16-bit integers at 16 kHz, one channel: what speech recognisers expect.
"""

import io
import shutil
import subprocess
import wave
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int16
from torch import Tensor

RATE = 16_000  # samples per second
PROGRAM = "espeak-ng"
INSTALL = "install it with 'apt-get install espeak-ng' (Debian, Ubuntu, Colab) or 'brew install espeak-ng' (macOS)"
RECORDINGS = Path("/usr/share/pocketsphinx/test/data")  # of Debian's package pocketsphinx-testdata
Samples = Int16[Tensor, " samples"]


class SpeechError(RuntimeError):
    """Nothing could be spoken or read; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Voice:
    """One of espeak-ng's speakers.

    Attributes:
        name: a language and perhaps a variant, as `en-us+f3` (`espeak-ng --voices=en`, `--voices=variant`).
        words_per_minute: 80 to 450.
        pitch: 0 to 99.
    """

    name: str = "en-us"
    words_per_minute: int = 160
    pitch: int = 50

    def __post_init__(self) -> None:
        if not 80 <= self.words_per_minute <= 450:
            raise ValueError(f"words_per_minute must lie in 80 to 450; got {self.words_per_minute}")
        if not 0 <= self.pitch <= 99:
            raise ValueError(f"pitch must lie in 0 to 99; got {self.pitch}")


def can_speak() -> bool:
    """Whether espeak-ng is installed."""
    return shutil.which(PROGRAM) is not None


def speak(text: str, voice: Voice = Voice()) -> Samples:
    """The sentence as sound.

    Raises:
        SpeechError: when espeak-ng is not installed, or has no such voice.
        ValueError: when there is nothing to say.
    """
    if not text.strip():
        raise ValueError(f"text must hold something to say; got {text!r}")
    if not can_speak():
        raise SpeechError(f"speaking needs the program {PROGRAM}: {INSTALL}")
    options = ["-v", voice.name, "-s", str(voice.words_per_minute), "-p", str(voice.pitch)]
    done = subprocess.run([PROGRAM, "--stdin", "--stdout", *options], input=text.encode(), capture_output=True)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip() or "it wrote no sound"
        raise SpeechError(f"{PROGRAM} could not speak as {voice.name!r}: {reason}")
    return read_wav(io.BytesIO(done.stdout))


def read_wav(source: Path | io.BytesIO) -> Samples:
    """A WAV file's samples, resampled to 16 kHz.

    Raises:
        SpeechError: when it is missing or no WAV file of one channel and 16 bits.
    """
    try:
        with wave.open(source if isinstance(source, io.BytesIO) else str(source)) as sound:
            layout, rate = (sound.getnchannels(), sound.getsampwidth()), sound.getframerate()
            data = sound.readframes(sound.getnframes())  # espeak-ng's header promises more than there is
    except (OSError, EOFError, wave.Error) as error:
        raise SpeechError(f"a recording must be a readable WAV file; got {source}: {error}") from error
    if layout != (1, 2):
        raise SpeechError(f"a recording must have 1 channel of 16 bits; got {layout[0]} of {8 * layout[1]}")
    samples = torch.frombuffer(bytearray(data[: len(data) // 2 * 2]), dtype=torch.int16)
    return resample(samples, rate)


def resample(samples: Samples, rate: int) -> Int16[Tensor, " resampled"]:
    """The same sound at 16 kHz: its spectrum, cut off or continued by zeros.

    >>> resample(torch.full((4,), 100, dtype=torch.int16), 32_000)
    tensor([100, 100], dtype=torch.int16)
    """
    if rate == RATE:
        return samples
    count = round(len(samples) * RATE / rate)
    spectrum = torch.fft.rfft(samples.double())[: count // 2 + 1]
    return to_int16(torch.fft.irfft(spectrum, n=count) * (count / len(samples)))


def to_int16(signal: Float[Tensor, " samples"]) -> Samples:
    """Rounds to 16 bits. A signal that is too loud is scaled down as a whole: cut peaks would be noise of their own.

    >>> to_int16(torch.tensor([65534.0, 2.0]))
    tensor([32767,     1], dtype=torch.int16)
    """
    loudest = signal.abs().max().item() if len(signal) else 0.0
    return (signal * min(1.0, 32767 / max(loudest, 1.0))).round().to(torch.int16)


def mix(speech: Samples, noise: Int16[Tensor, " n"], *, snr_db: float) -> Samples:
    """Speech with noise, scaled so that their powers have the ratio 10^(snr_db / 10).

    Raises:
        ValueError: when either is silent, which leaves no ratio, or the lengths differ.
    """
    if len(speech) != len(noise):
        raise ValueError(f"noise must have as many samples as the speech, {len(speech)}; got {len(noise)}")
    powers = [samples.double().square().mean().item() if len(samples) else 0.0 for samples in (speech, noise)]
    if 0 in powers:
        raise ValueError("speech and noise must both be heard to have a ratio; got silence")
    gain = (powers[0] / powers[1] / 10 ** (snr_db / 10)) ** 0.5
    return to_int16(speech.double() + gain * noise.double())


def white_noise(count: int, generator: torch.Generator) -> Samples:
    """Noise of equal power at all frequencies.

    >>> white_noise(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    return to_int16(3000 * torch.randn(count, generator=generator))


def recordings(kind: str) -> list[tuple[Path, str]]:
    """Real voices and what they say: the files of Debian's pocketsphinx-testdata.

    Args:
        kind: "librivox" (a novel read aloud) or "cards" (names of playing cards).

    Raises:
        SpeechError: when the package is not installed.
    """
    folder = RECORDINGS / kind
    listing = next((p for p in (folder / "transcription", folder / "cards.transcription") if p.is_file()), None)
    if listing is None:
        raise SpeechError(f"real voices are in Debian's package pocketsphinx-testdata, which is missing: no {folder}")
    found = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        text, _, name = line.replace("<s>", "").replace("</s>", "").rpartition("(")
        found.append((folder / f"{name.strip(') ')}.wav", " ".join(text.split())))
    return found
