"""Service queries as speech, and the small recogniser that was trained on them: stored in data/speech."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from labutils.lab.data import service
from labutils.lab.data.service_grammar import FRAMES, PATTERNS, VALUES
from labutils.lab.models.checkpoint import verify_checksums, write_checksums
from labutils.lab.models.load import LoadError
from labutils.lab.paths import DATA, written_whole
from labutils.speech.ctc import TimeDelayNet, Utterance, train_
from labutils.speech.features import log_mel, normalized
from labutils.speech.voices import Voice, mix, speak, white_noise

FOLDER = DATA / "speech"
SPELLED = {*PATTERNS, "date", "time", "count"}  # slots whose values have digits
UNKNOWN = {"Hangzhou", "Xi'an", "hoodie", "tracksuit"}  # values that PocketSphinx's dictionary lacks
TRAIN_VOICES = ("en-us", "en-gb", "en-us+f2", "en-us+m3", "en-gb+f4", "en-us+m5", "en-gb-x-rp", "en-us+f5")
TEST_VOICES = ("en-us", "en-us+f2", "en-gb-scotland", "en-us+f3")  # the last two are never heard in training


@dataclass(frozen=True)
class SpokenQuery:
    """A query as it is written, its intent, and its words as they are spoken."""

    text: str
    intent: str

    @property
    def words(self) -> str:
        """Lower-case letters and apostrophes only; hyphens part words."""
        return spoken_form(self.text)


def spoken_form(text: str) -> str:
    """The words of a sentence without digits: lower case, no marks but the apostrophe.

    >>> spoken_form("Can I register the e-reader?")
    'can i register the e reader'

    Raises:
        ValueError: when it has digits, which can be read aloud in several ways.
    """
    if re.search(r"\d", text):
        raise ValueError(f"text must be written in words to be spoken one way; got {text!r}")
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def spoken_queries(split: str, count: int, *, seed: int = 0) -> list[SpokenQuery]:
    """Different queries of a split without opener, closer or digits, in random order.

    Raises:
        ValueError: for another split.
    """
    rng, found = Random(f"spoken-{split}-{seed}"), {}
    while len(found) < count:
        query = service.sample_query(rng, split)
        act = service.intents()[query.intent].acts[query.phrasing.act][0]
        names = service.slot_names(act)
        if not SPELLED & set(names):
            text = service.render(query.phrasing, {name: query.slots[name] for name in names})[0]
            found[text] = query.intent
    return [SpokenQuery(text, intent) for text, intent in found.items()]


def utterances(count: int, *, seed: int = 0) -> Iterator[Utterance]:
    """Training sentences as features and words: every voice and speed in turn, half of them in noise of 0 to 30 dB."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    for i, query in enumerate(spoken_queries("train", count, seed=seed)):
        name = TRAIN_VOICES[i % len(TRAIN_VOICES)]
        samples = speak(query.words, Voice(name, rng.randrange(140, 190), rng.randrange(35, 66)))
        if rng.random() < 0.5:
            samples = mix(samples, white_noise(len(samples), generator), snr_db=rng.uniform(0, 30))
        yield normalized(log_mel(samples)), query.words


def train_recogniser(*, steps: int, sentences: int = 1600, log: Callable[[str], None]) -> TimeDelayNet:
    """Speaks the training sentences, then trains a fresh network on them: minutes on one core.

    Raises:
        SpeechError: when espeak-ng is not installed.
    """
    torch.manual_seed(0)
    model = TimeDelayNet()
    train_(model, list(utterances(sentences)), steps=steps, log=log)
    return model


def save_recogniser(model: TimeDelayNet, folder: Path = FOLDER) -> None:
    """Writes the weights in bfloat16, and their checksum."""
    state = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    with written_whole(folder / "ctc.safetensors") as new:
        save_file(state, new)
    write_checksums(folder)


def load_recogniser(folder: Path = FOLDER) -> TimeDelayNet:
    """The stored recogniser in float32, in evaluation mode.

    Raises:
        LoadError: when it is missing or damaged.
    """
    path = folder / "ctc.safetensors"
    if not path.is_file():
        raise LoadError(f"the stored recogniser must lie in {folder}; there is none")
    try:
        verify_checksums(folder)
    except ValueError as error:
        raise LoadError(str(error)) from error
    model = TimeDelayNet()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.requires_grad_(False).eval()


def service_jsgf() -> str:
    """The spoken part of the service corpus as a grammar: the beginnings of its frames, its acts, their endings.

    Beginnings and endings combine freely, so that it accepts some sentences that the corpus lacks. Values with a word
    in `UNKNOWN` are left out.
    """
    acts = [act[0] for intent in service.intents().values() for act in intent.acts]
    acts = [act for act in acts if not SPELLED & set(service.slot_names(act))]
    slots = sorted({name for act in acts for name in service.slot_names(act)})
    frames = [frame.split("{act}") for frame, _ in FRAMES]
    rules = {
        "before": [before for before, _ in frames],
        "act": [re.sub(r"\{(\w+)\}", r" <\1> ", act) for act in acts],
        "after": [after for _, after in frames],
        **{name: [value for value, _ in VALUES[name] if value not in UNKNOWN] for name in slots},
    }
    lines = ["#JSGF V1.0;", "grammar service;", "public <sentence> = <before> <act> [<after>];"]
    for name, choices in rules.items():
        words = (" ".join(p if p.startswith("<") else spoken_form(p) for p in text.split()) for text in choices)
        lines.append(f"<{name}> = " + " | ".join(dict.fromkeys(w.strip() for w in words if w.strip())) + ";")
    return "\n".join(lines)


def written_form(words: str) -> str:
    """A recognised sentence as LabLM knows it: a capital, "I", and a mark at the end.

    >>> written_form("can i return the printer")
    'Can I return the printer?'
    """
    if not words:
        return ""
    text = re.sub(r"\bi\b", "I", words)
    asks = words.split()[0] in ("can", "could", "how", "is", "what", "where", "who")
    return text[0].upper() + text[1:] + ("?" if asks else ".")
