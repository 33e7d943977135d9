"""Techniques side by side: the same requests, each served by all of them in turn, every answer judged and timed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from labutils.applications.tasks import Task, answer
from labutils.decoding.proposers import NoDraft, PromptLookup
from labutils.decoding.speculate import generate_speculative
from labutils.generation.fast_llama import FastLlama
from labutils.generation.sampling import Sampler
from labutils.lab.models.load import LanguageModel
from labutils.measurement.ledger import Record


@dataclass(frozen=True)
class Written:
    """One answer: its text, the tokens that were made for it, and the seconds that they took, prompt included."""

    text: str
    tokens: int
    seconds: float


Write = Callable[[Sequence[int], int], Written]


@dataclass(frozen=True)
class Technique:
    """A way to answer, and what is known of its model.

    Attributes:
        name: For the plot.
        family: What kind of technique it is.
        write: From (prompt, most new tokens) to an answer.
        dtype: Format of the weights.
        bytes_resident: Of its weights.
        document_bits: (bits, bytes) of each held-out document; empty where it has no probabilities.
    """

    name: str
    family: str
    write: Write
    dtype: str = "float32"
    bytes_resident: float | None = None
    document_bits: tuple[tuple[float, int], ...] = ()


def plain(decoder: FastLlama, decode: Callable[[list[int]], str], stop: Collection[int]) -> Write:
    """Greedy decoding, token by token."""

    def write(prompt: Sequence[int], new_tokens: int) -> Written:
        reply = answer(decoder, prompt, new_tokens, stop=stop)
        return Written(decode(list(reply.token_ids)), len(reply.token_s), reply.latency_s)

    return write


def guessing(decoder: FastLlama, decode, stop: Collection[int], *, draft_tokens: int) -> Write:
    """Speculative decoding of what the text has said before: the same answers as `plain`, but for near-ties."""

    def write(prompt: Sequence[int], new_tokens: int) -> Written:
        began, ids = time.perf_counter(), torch.tensor([list(prompt)])
        made = generate_speculative(decoder, PromptLookup(), ids, new_tokens, draft_tokens=draft_tokens, stop=stop)
        new = made.token_ids[0, len(prompt) :].tolist()
        return Written(_shown(new, decode, stop), len(new), time.perf_counter() - began)

    return write


def voting(decoder: FastLlama, decode, stop: Collection[int], *, votes: int, temperature: float, seed: int) -> Write:
    """Samples several answers and gives the one that was written most often, the first of equals (self-consistency).

    Wang et al. 2022, arXiv:2203.11171, with whole answers as what is counted: test-time compute for quality.
    """
    sampler = Sampler(temperature=temperature, generator=torch.Generator().manual_seed(seed))
    options = {"draft_tokens": 0, "choose": sampler, "stop": stop}

    def write(prompt: Sequence[int], new_tokens: int) -> Written:
        began, ids = time.perf_counter(), torch.tensor([list(prompt)])
        made = [generate_speculative(decoder, NoDraft(), ids, new_tokens, **options) for _ in range(votes)]
        answers = [each.token_ids[0, len(prompt) :].tolist() for each in made]
        texts = Counter(_shown(new, decode, stop) for new in answers)
        return Written(texts.most_common(1)[0][0], sum(map(len, answers)), time.perf_counter() - began)

    return write


def library(loaded: LanguageModel, decode, stop: Collection[int]) -> Write:
    """`generate` of transformers, as it comes: the baseline that nobody tuned."""

    @torch.inference_mode()
    def write(prompt: Sequence[int], new_tokens: int) -> Written:
        began, ids = time.perf_counter(), torch.tensor([list(prompt)])
        made = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=list(stop),
        )
        new = made[0, len(prompt) :].tolist()
        return Written(_shown(new, decode, stop), len(new), time.perf_counter() - began)

    return write


def _shown(token_ids: Sequence[int], decode: Callable[[list[int]], str], stop: Collection[int]) -> str:
    return decode([token for token in token_ids if token not in stop])


def compare(techniques: Sequence[Technique], task: Task, *, model: str, chapter: str, rounds: int = 8) -> list[Record]:
    """Serves each request with every technique before the next one, beginning with another technique each time.

    The requests are dealt to rounds in turn. A record has a sample for each round, tokens/s and seconds of whole
    requests, and a score for each request, so that any two techniques can be compared in pairs.

    Raises:
        ValueError: Without a technique, with fewer than five rounds, or with fewer requests than rounds.
    """
    if not techniques or not 5 <= rounds <= len(task.prompts):
        rule = "a comparison needs a technique, 5 rounds, and a request for each"
        raise ValueError(f"{rule}; got {len(techniques)}, {rounds} and {len(task.prompts)}")
    for technique in techniques:
        technique.write(task.prompts[0], task.new_tokens)  # warm-up
    made: list[list[Written]] = [[] for _ in techniques]
    for index, prompt in enumerate(task.prompts):
        for place in range(len(techniques)):
            number = (place + index) % len(techniques)
            made[number].append(techniques[number].write(prompt, task.new_tokens))
    lengths = [len(prompt) for prompt in task.prompts]
    return [
        _record(t, written, task, rounds, model=model, chapter=chapter, prompt_tokens=round(fmean(lengths)))
        for t, written in zip(techniques, made, strict=True)
    ]


def _record(t: Technique, written: Sequence[Written], task: Task, rounds: int, **common) -> Record:
    parts = [written[i::rounds] for i in range(rounds)]
    scores = tuple(task.judge(each.text, index) for index, each in enumerate(written))
    bits, size = (sum(column) for column in zip(*t.document_bits, strict=True)) if t.document_bits else (0.0, 0)
    return Record(
        technique=t.name,
        family=t.family,
        device="cpu",
        dtype=t.dtype,
        threads=torch.get_num_threads(),
        output_tokens=max(1, round(fmean(each.tokens for each in written))),
        samples=tuple(sum(each.tokens for each in part) / sum(each.seconds for each in part) for part in parts),
        answer_s=tuple(fmean(each.seconds for each in part) for part in parts),
        bytes_resident=t.bytes_resident,
        bits_per_byte=bits / size if size else None,
        document_bits=t.document_bits,
        task=task.name,
        task_score=fmean(scores),
        task_scores=scores,
        **common,
    )
