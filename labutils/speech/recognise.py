"""Recognition while somebody speaks: chunks, partial hypotheses, what of them is certain, and when each was there.

The recogniser is PocketSphinx (`pip install pocketsphinx`; English; its models are inside). It searches with a language
model, in a grammar (JSGF) or for a single phrase. Two numbers must be told apart:

    real-time factor = seconds of work ÷ seconds of sound          (does the machine keep up?)
    latency          = when a text was there − when it was spoken  (how long does a person wait?)
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from labutils.speech.voices import RATE, Samples, SpeechError

MODES = ("lm", "jsgf", "keyphrase")


@dataclass(frozen=True)
class Step:
    """One chunk: the second of sound at which it ended, the seconds of work it took, and the text so far."""

    heard_s: float
    work_s: float
    text: str


@dataclass(frozen=True)
class Recognition:
    """What was recognised in one utterance.

    Attributes:
        steps: one for each chunk, in order.
        final_work_s: work after the last chunk, before the final text was there.
        text: the final text; empty where nothing was found.
    """

    steps: tuple[Step, ...]
    final_work_s: float
    text: str

    @property
    def sound_s(self) -> float:
        """Seconds of sound."""
        return self.steps[-1].heard_s

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of sound; below 1 the machine keeps up."""
        return (sum(step.work_s for step in self.steps) + self.final_work_s) / self.sound_s

    @property
    def ready_s(self) -> tuple[float, ...]:
        """When each partial text was there, in seconds since the beginning of the sound, had it come in real time.

        A chunk is worked on once it has been spoken and the one before it is done, as in a queue.
        """
        return ready_times([step.heard_s for step in self.steps], [step.work_s for step in self.steps])

    @property
    def latency_s(self) -> float:
        """How long after the end of the sound the final text was there."""
        return self.ready_s[-1] + self.final_work_s - self.sound_s


def ready_times(arrivals_s: Sequence[float], works_s: Sequence[float]) -> tuple[float, ...]:
    """When each piece of work is done, one after the other: max(arrival, end of the one before) + work.

    >>> ready_times([1.0, 2.0, 3.0], [0.5, 1.5, 0.25])
    (1.5, 3.5, 3.75)
    """
    ends: list[float] = []
    for arrival, work in zip(arrivals_s, works_s, strict=True):
        ends.append(max(arrival, ends[-1] if ends else arrival) + work)
    return tuple(ends)


def library():
    """The package pocketsphinx.

    Raises:
        SpeechError: when it is not installed.
    """
    try:
        import pocketsphinx
    except ImportError as error:
        raise SpeechError("recognising needs the package pocketsphinx: pip install pocketsphinx") from error
    return pocketsphinx


def open_decoder(mode: str = "lm", value: str | None = None, *, threshold: float = 1e-20):
    """A PocketSphinx decoder that hears a general English ("lm"), a grammar's sentences, or one phrase.

    Args:
        mode: one of `MODES`.
        value: the text of a JSGF grammar, or the phrase; nothing for "lm".
        threshold: of a phrase: larger, up to 1, means fewer false alarms and more misses.

    Raises:
        SpeechError: when pocketsphinx is not installed.
        ValueError: for another mode, or a word that the dictionary lacks.
    """
    if mode not in MODES or (value is None) != (mode == "lm"):
        raise ValueError(f"mode must be 'lm' alone, or 'jsgf' or 'keyphrase' with a value; got {mode!r}, {value!r}")
    sphinx = library()
    if mode == "lm":
        return sphinx.Decoder(loglevel="FATAL")
    decoder = sphinx.Decoder(lm=None, loglevel="FATAL", kws_threshold=threshold)
    words = value.split() if mode == "keyphrase" else grammar_words(value)
    unknown = [word for word in words if decoder.lookup_word(word) is None]
    if unknown:
        raise ValueError(f"every word must be in the recogniser's dictionary; got {unknown[0]!r}")
    if mode == "jsgf":
        decoder.add_jsgf_string("search", value)
    else:
        decoder.add_keyphrase("search", value)
    decoder.activate_search("search")
    return decoder


def grammar_of(sentences: Iterable[str]) -> str:
    """A JSGF grammar of exactly these sentences.

    >>> print(grammar_of(["yes", "no thanks"]))
    #JSGF V1.0;
    grammar sentences;
    public <sentence> = yes | no thanks;

    Raises:
        ValueError: when there is none.
    """
    kept = list(dict.fromkeys(sentences))
    if not kept:
        raise ValueError("a grammar needs at least one sentence; got none")
    return "#JSGF V1.0;\ngrammar sentences;\npublic <sentence> = " + " | ".join(kept) + ";"


def grammar_words(jsgf: str) -> list[str]:
    """The words that a grammar's rules name, each once, sorted.

    >>> grammar_words("#JSGF V1.0; grammar g; public <a> = (yes | no) <b>; <b> = [thanks];")
    ['no', 'thanks', 'yes']
    """
    bodies = " ".join(part.partition("=")[2] for part in jsgf.split(";"))
    for mark in "()[]|*+":
        bodies = bodies.replace(mark, " ")
    return sorted({word for word in bodies.split() if not word.startswith("<")})


def recognise(decoder, samples: Samples, *, chunk_s: float = 0.1) -> Recognition:
    """Feeds the sound in chunks and notes after each what was understood so far, and how long that took.

    Raises:
        ValueError: for silence of no length, or chunks shorter than a sample.
    """
    size = round(chunk_s * RATE)
    if size < 1 or len(samples) == 0:
        raise ValueError(f"sound and chunks must have at least one sample; got {len(samples)} and {size}")
    steps = []
    decoder.start_utt()
    for start in range(0, len(samples), size):
        chunk = samples[start : start + size]
        begin = time.perf_counter()
        decoder.process_raw(chunk.numpy().tobytes(), False, False)
        text = _text(decoder)
        steps.append(Step(min(start + size, len(samples)) / RATE, time.perf_counter() - begin, text))
    begin = time.perf_counter()
    decoder.end_utt()
    text = _text(decoder)
    return Recognition(tuple(steps), time.perf_counter() - begin, text)


def _text(decoder) -> str:
    """The decoder's best hypothesis; a phrase that was heard several times is reported several times."""
    hypothesis = decoder.hyp()
    return " ".join(hypothesis.hypstr.split()) if hypothesis is not None else ""


def committed(partials: Iterable[str]) -> list[str]:
    """What may be shown for good after each partial text: the beginning on which two in a row agree, word by word.

    Local agreement (Liu et al. 2020; Macháček et al. 2023, arXiv:2307.14743). What was committed stays, even where a
    later partial text contradicts it.

    >>> committed(["i", "i want", "i went to", "i want to pay"])
    ['', 'i', 'i', 'i']
    """
    done: list[str] = []
    before: list[str] = []
    shown = []
    for partial in partials:
        words = partial.split()
        agreed = [word for word, _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, before, strict=False))]
        if agreed[: len(done)] == done:
            done = agreed
        shown.append(" ".join(done))
        before = words
    return shown


def endpoints(samples: Samples, *, window_s: float = 0.3) -> list[tuple[float, float, float]]:
    """Where somebody speaks: (start, end, noticed) of each stretch, in seconds.

    PocketSphinx's endpointer votes over the last `window_s` of 30 ms frames; an end is therefore *noticed* later than
    it was. Speech that lasts to the end of the sound is noticed there.

    Raises:
        SpeechError: when pocketsphinx is not installed.
    """
    found, pointer = [], library().Endpointer(window=window_s)
    size = pointer.frame_bytes // 2
    for start in range(0, len(samples) - size, size):
        was_speech = pointer.in_speech
        pointer.process(samples[start : start + size].numpy().tobytes())
        if was_speech and not pointer.in_speech:
            found.append((pointer.speech_start, pointer.speech_end, (start + size) / RATE))
    if pointer.in_speech:
        pointer.end_stream(samples[(len(samples) - 1) // size * size :].numpy().tobytes())
        found.append((pointer.speech_start, pointer.speech_end, len(samples) / RATE))
    return found
