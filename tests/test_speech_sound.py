"""Sound: spoken, read, resampled, mixed at a ratio, and turned into log-mel features."""

import io
import math
import subprocess
import wave

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.speech import voices
from labutils.speech.features import DEFAULT, hz_to_mel, log_mel, mel_filters, mel_to_hz, normalized, power_spectrum

needs_espeak = pytest.mark.skipif(not voices.can_speak(), reason="espeak-ng is not installed")


def tone(hz, *, count=16_000, rate=16_000, loud=10_000):
    return (loud * torch.sin(2 * math.pi * hz * torch.arange(count).double() / rate)).round().to(torch.int16)


def wav(samples, *, rate=16_000, channels=1, width=2):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(samples.numpy().tobytes())
    return io.BytesIO(stream.getvalue())


@needs_espeak
def test_speech_is_heard_for_about_as_long_as_its_words_take():
    samples = voices.speak("I want to return the printer.")
    assert samples.dtype == torch.int16 and 1.0 < len(samples) / voices.RATE < 4.0
    assert samples.abs().max() > 3000
    assert torch.equal(samples, voices.speak("I want to return the printer."))


@needs_espeak
def test_a_faster_voice_takes_less_time_and_a_text_may_begin_with_a_dash():
    slow, fast = (voices.speak("a long sentence to say", voices.Voice("en-us", speed)) for speed in (100, 200))
    assert len(fast) < 0.75 * len(slow)
    assert len(voices.speak("--version")) > 4000  # spoken, not read as an option


@needs_espeak
def test_an_unknown_voice_is_named():
    with pytest.raises(voices.SpeechError, match="could not speak as 'xx-nobody'"):
        voices.speak("hello", voices.Voice("xx-nobody"))


def test_without_espeak_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not voices.can_speak()
    with pytest.raises(voices.SpeechError, match="needs the program espeak-ng: install it with 'apt-get install"):
        voices.speak("hello")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: voices.speak("  "), "text must hold something to say"),
        (lambda: voices.Voice(words_per_minute=60), "must lie in 80 to 450; got 60"),
        (lambda: voices.Voice(pitch=100), "must lie in 0 to 99; got 100"),
        (lambda: voices.mix(tone(440), tone(440, count=9), snr_db=0), "as many samples as the speech, 16000; got 9"),
        (lambda: voices.mix(tone(440), tone(0), snr_db=0), "both be heard"),
    ],
)
def test_what_cannot_be_spoken_or_mixed_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wav_is_read_whole_and_resampled():
    assert torch.equal(voices.read_wav(wav(tone(440))), tone(440))
    read = voices.read_wav(wav(tone(440, count=22_050, rate=22_050), rate=22_050))
    assert len(read) == 16_000
    assert (read - tone(440)).abs().max() <= 1  # 440 whole periods: no edge effect


def test_resampling_drops_what_the_new_rate_cannot_hold():
    read = voices.resample(tone(440, count=44_100, rate=44_100) + tone(10_000, count=44_100, rate=44_100), 44_100)
    assert (read - tone(440)).abs().max() <= 1


@pytest.mark.parametrize("data", [b"", b"RIFF", b"nonsense" * 20])
def test_a_file_that_is_no_wav_is_refused(tmp_path, data):
    path = tmp_path / "sound.wav"
    path.write_bytes(data)
    with pytest.raises(voices.SpeechError, match="must be a readable WAV file"):
        voices.read_wav(path)
    with pytest.raises(voices.SpeechError, match="must have 1 channel of 16 bits; got 2 of 16"):
        voices.read_wav(wav(tone(440), channels=2))


@given(st.floats(-10, 40))
def test_mixed_noise_has_the_ratio_asked_for(decibels):
    speech, noise = tone(300), voices.white_noise(16_000, torch.Generator().manual_seed(0))
    mixed = voices.mix(speech, noise, snr_db=decibels).double()
    share = (mixed @ speech.double()) / (speech.double() @ speech.double())  # how much of it is speech
    left = mixed - share * speech.double()
    ratio = 10 * math.log10(share**2 * speech.double().square().mean() / left.square().mean())
    assert ratio == pytest.approx(decibels, abs=0.3)


def test_noise_of_0_db_is_as_strong_as_the_speech_and_of_20_db_a_tenth_as_high():
    speech, noise = torch.full((1000,), 1000, dtype=torch.int16), torch.tensor([500, -500] * 500, dtype=torch.int16)
    assert voices.mix(speech, noise, snr_db=0).tolist()[:2] == [2000, 0]
    assert voices.mix(speech, noise, snr_db=20).tolist()[:2] == [1100, 900]


@pytest.mark.skipif(not voices.RECORDINGS.is_dir(), reason="pocketsphinx-testdata is not installed")
def test_real_voices_have_files_and_words():
    spoken = voices.recordings("cards") + voices.recordings("librivox")
    assert len(spoken) == 10 and spoken[0][1] == "ten of clubs"
    assert all(len(voices.read_wav(path)) > 16_000 for path, _ in spoken)


def test_missing_recordings_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(voices, "RECORDINGS", tmp_path)
    with pytest.raises(voices.SpeechError, match="package pocketsphinx-testdata, which is missing"):
        voices.recordings("cards")


def test_mel_scale_by_hand():
    assert hz_to_mel(700 * 9) == pytest.approx(2595)  # log10(1 + 9) = 1
    assert mel_to_hz(hz_to_mel(1234.0)) == pytest.approx(1234)


def test_spectrum_is_that_of_torch_stft():
    samples = voices.white_noise(4000, torch.Generator().manual_seed(1))
    left = (DEFAULT.fft - DEFAULT.window) // 2  # torch puts a short window into the middle of its frame
    ours = power_spectrum(samples)
    signal = torch.nn.functional.pad(samples.float() / 32768, (left, left))
    theirs = torch.stft(
        signal,
        DEFAULT.fft,
        hop_length=DEFAULT.hop,
        win_length=DEFAULT.window,
        window=torch.hann_window(DEFAULT.window),
        center=False,
        return_complex=True,
    )
    torch.testing.assert_close(ours, theirs.abs().square().T[: len(ours)], rtol=1e-4, atol=1e-6)


def test_filters_are_triangles_with_peaks_of_one_that_overlap_to_one():
    filters = mel_filters()
    assert filters.shape == (40, 257) and (filters >= 0).all() and (filters.sum(dim=1) > 0).all()
    inner = filters[:, 8:200].sum(dim=0)  # between the first peak and the last
    torch.testing.assert_close(inner, torch.ones_like(inner), rtol=0, atol=1e-5)


def test_a_tone_is_loudest_in_its_own_band_and_tenfold_loudness_is_a_constant():
    quiet, loud = log_mel(tone(1000, loud=1000)), log_mel(tone(1000, loud=10_000))
    step = (hz_to_mel(DEFAULT.high_hz) - hz_to_mel(DEFAULT.low_hz)) / 41
    expected = round((hz_to_mel(1000) - hz_to_mel(DEFAULT.low_hz)) / step) - 1
    assert (loud.argmax(dim=1) == expected).all()
    assert (loud - quiet)[:, expected].numpy() == pytest.approx(np.log(100), abs=0.02)


def test_features_count_whole_windows_and_silence_has_a_floor():
    assert log_mel(torch.zeros(400, dtype=torch.int16)).shape == (1, 40)
    assert log_mel(torch.zeros(719, dtype=torch.int16)).shape == (2, 40)
    assert (log_mel(torch.zeros(400, dtype=torch.int16)) == math.log(1e-6)).all()
    with pytest.raises(ValueError, match="at least 400 samples; got 399"):
        log_mel(torch.zeros(399, dtype=torch.int16))


def test_normalized_features_do_not_know_the_loudness():
    speech = voices.mix(tone(700), voices.white_noise(16_000, torch.Generator().manual_seed(2)), snr_db=5)
    torch.testing.assert_close(normalized(log_mel(speech)), normalized(log_mel(speech // 4)), atol=0.05, rtol=0)


def test_espeak_is_called_without_a_shell(monkeypatch):
    seen = {}

    def run(command, **options):
        seen.update(command=command, **options)
        return subprocess.CompletedProcess(command, 0, wav(tone(440)).getvalue(), b"")

    monkeypatch.setattr(voices, "can_speak", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    voices.speak("hello; rm x", voices.Voice("en-gb", 150, 40))
    assert seen["command"] == ["espeak-ng", "--stdin", "--stdout", "-v", "en-gb", "-s", "150", "-p", "40"]
    assert seen["input"] == b"hello; rm x" and "shell" not in seen
