"""Ways to decode for `bench decoding`: ours, transformers' and llama.cpp's, all asked alike."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from labutils.course.bench.decode import Clock
from labutils.course.bench.llama_server import Engine
from labutils.decoding.choosing import curve_of, predicted_speedup
from labutils.decoding.heads import LookAheadDraft
from labutils.decoding.proposers import Proposer
from labutils.decoding.speculate import Speculation, generate_speculative
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.drafting_text import KINDS
from labutils.lab.models.load import LanguageModel
from labutils.measurement.timing import measure_interleaved

MARGIN = 1e-3  # between two logits: below it float32 rounding may decide
LENGTHS = (2, 4, 8, 16)  # of a draft, to choose from on prompts that are not timed
BATCHES = (1, 4, 8)


@dataclass(frozen=True)
class Settings:
    """How much to measure: prompts of each kind, tokens of each answer, rounds, threads, and whether peers run."""

    prompts: int = 5
    new_tokens: int = 40
    rounds: int = 5
    threads: int = 1
    peers: bool = True
    width: int = 7  # of the tiled subject


class Remembering:
    """A decoder that reads each prompt once: the second time its keys and values are put back."""

    def __init__(self, decoder: FastLlama) -> None:
        self.decoder, self.max_length = decoder, decoder.max_length
        self.known: dict[tuple[int, ...], tuple] = {}
        self.extend, self.rewind, self.truncate = decoder.extend, decoder.rewind, decoder.truncate
        self.decode_one_token = decoder.decode_one_token

    @property
    def length(self) -> int:
        """Positions cached."""
        return self.decoder.length

    @property
    def hidden(self):
        """What the head read last."""
        return self.decoder.hidden

    def prefill(self, token_ids: Tensor) -> Tensor:
        """As the decoder's own, from memory where an empty cache reads a prompt it has read before."""
        key, decoder = tuple(token_ids[0].tolist()), self.decoder
        if decoder.length or len(key) == 1:
            return decoder.prefill(token_ids)
        if key not in self.known:
            logits = decoder.prefill(token_ids).clone()
            kept = (decoder.keys[:, :, : len(key)].copy(), decoder.values[:, :, : len(key)].copy())
            self.known[key] = (*kept, logits, decoder.hidden.copy())
        keys, values, logits, hidden = self.known[key]
        decoder.keys[:, :, : len(key)], decoder.values[:, :, : len(key)] = keys, values
        decoder.length, decoder.hidden = len(key), hidden
        return logits


@dataclass
class Way:
    """A way to decode.

    Attributes:
        run: kind, number of the prompt and prompt to its text, the tokens after the first, their seconds, and a record.
        plain: the name of the plain decoding whose text it must write, and whose speed it is compared with.
        lengths: of drafts, by kind; None where there is none to choose.
        prompts: how many of each kind it reads; slow ways read fewer.
    """

    name: str
    run: Callable[[str, int, Tensor], tuple[object, int, float, Speculation | None]]
    plain: str
    lengths: dict[str, int] | None = None
    prompts: int = 100


def plain_way(name: str, decoder: Remembering, settings: Settings, stop: Sequence[int]) -> Way:
    """Plain decoding, a token a step."""

    def run(kind: str, index: int, prompt: Tensor):
        decoder.truncate(0)
        clock, text = Clock(), prompt[0].tolist()
        text.append(int(clock(decoder.prefill(prompt))))
        while len(text) < prompt.shape[1] + settings.new_tokens and text[-1] not in stop:
            text.append(int(clock(decoder.decode_one_token(torch.tensor(text[-1:])))))
        return text, len(clock.ticks) - 1, clock.ticks[-1] - clock.ticks[0], None

    return Way(name, run, plain=name)


def draft_way(
    name: str, decoder: Remembering, proposer: Proposer, settings: Settings, stop: Sequence[int], plain: str
) -> Way:
    """Speculative decoding; the proposer has seen the prompt before the clock starts."""
    lengths = dict.fromkeys(KINDS, LENGTHS[0])

    def run(kind: str, index: int, prompt: Tensor):
        if not isinstance(proposer, LookAheadDraft):  # which reads the target's state instead of the prompt
            proposer.propose(prompt[0].tolist(), 1)
        made = generate_speculative(
            decoder, proposer, prompt, settings.new_tokens, draft_tokens=lengths[kind], stop=stop
        )
        text = made.token_ids[0].tolist()
        return text, len(text) - prompt.shape[1] - 1, made.draft_s + made.target_s, made

    return Way(name, run, plain, lengths)


def transformers_way(name: str, wise: LanguageModel, settings: Settings, **options) -> Way:
    """`generate` of transformers, alone, with an assistant, or with its prompt lookup; from its first tokens on.

    An assistant drafts as its own generation_config says; `generate` overrides none of that.
    """

    def run(kind: str, index: int, prompt: Tensor):
        config = copy.deepcopy(wise.model.generation_config)
        config.update(max_new_tokens=settings.new_tokens, do_sample=False)
        told, mask = _Streamer(), torch.ones_like(prompt)
        text = wise.model.generate(prompt, attention_mask=mask, generation_config=config, streamer=told, **options)
        return text[0].tolist(), sum(told.counts[2:]), told.clock.ticks[-1] - told.clock.ticks[1], None

    return Way(name, run, plain="transformers", prompts=1)


class _Streamer:
    """What `generate` hands over and when: the prompt, the first step's tokens, then those of each step."""

    def __init__(self) -> None:
        self.clock, self.counts = Clock(), []

    def put(self, value: Tensor) -> None:
        """Tokens have come."""
        self.clock.tick()
        self.counts.append(value.numel())

    def end(self) -> None:
        """The text is over."""


def llama_way(name: str, engine: Engine, settings: Settings) -> Way:
    """llama.cpp in its own process."""

    def run(kind: str, index: int, prompt: Tensor):
        slot = KINDS.index(kind) * settings.prompts + index % settings.prompts
        answer = engine.complete(prompt[0].tolist(), slot, settings.new_tokens)
        return answer.text, answer.tokens, answer.seconds, None

    return Way(name, run, plain="llama.cpp")


def step_curve(decoder: Remembering, *, context: int = 200, repeats: int = 5) -> list[float]:
    """Median seconds of a step with 1, 2, … rows behind a text, up to the most rows that a table asks for."""
    most = max(BATCHES) * (max(LENGTHS) + 1)
    decoder.truncate(0)
    decoder.extend([5] * context)
    functions = {str(rows): partial(_step, decoder, rows) for rows in (1, 2, 4, 8, 16, 32, 64, most)}
    timings = measure_interleaved(functions, repeats=repeats, warmup=1)
    return curve_of({int(rows): timing.median_s for rows, timing in timings.items()}, up_to=most)


def _step(decoder: Remembering, rows: int) -> None:
    decoder.extend([5] * rows)
    decoder.rewind(rows)


def predicted_at(batch: int, acceptance: float, draft_tokens: int, curve: Sequence[float], draft_s: float) -> float:
    """The speed-up for `batch` streams that are checked in one step: batch · (γ + 1) rows, batch · γ drafted tokens.

    >>> predicted_at(2, 0.5, 1, [1.0, 1.0, 1.5, 2.0], 0.0)
    0.75
    """
    steps = [curve[batch * rows - 1] for rows in range(1, draft_tokens + 2)]
    return predicted_speedup(acceptance, draft_tokens, steps, batch * draft_s)


def near_tie(decoders: dict[str, Remembering], plain: str, text: list[int], expected: list[int]) -> bool:
    """Whether two texts part where the plain decoder's two best logits are less than MARGIN apart."""
    decoder = decoders[plain.removeprefix("plain ") if plain.startswith("plain ") else "float32"]
    parted = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), 0)
    if parted == 0:
        return False
    decoder.truncate(0)
    best = decoder.decoder.prefill(torch.tensor([expected[:parted]]))[0].topk(2).values
    return bool(best[0] - best[1] < MARGIN)
