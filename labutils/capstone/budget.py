"""The best LabLM under a budget: a design is judged by size, by quality in pairs, and by speed in turns.

Size and quality do not depend on the machine's mood (`examine`). Speed does, so `judge` times the design against
float32 LabLM in one run, and float32 LabLM against itself: where that control is off, there is no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from labutils.applications.scores import Difference, paired_difference
from labutils.applications.tasks import Task
from labutils.capstone.designs import Design
from labutils.decoding.proposers import PromptLookup
from labutils.decoding.speculate import Speculation, generate_speculative
from labutils.generation.fast_llama import FastLlama
from labutils.lab.data import service
from labutils.lab.data.service_labels import read_answer
from labutils.lab.models.load import load_model
from labutils.lab.models.tokenizer import chat_ids
from labutils.measurement.timing import Ratio, check_repeats, measure_interleaved, paired_ratio

REFERENCE = Design(model="lablm-small", bits=4, group_size=64, calibrated=True, draft_tokens=4)  # a solution of 13.11
READ_BYTES = 1_200_000  # the exercise's limit in place of a time: bytes read for a token
ITEMS = 40  # of each task of the service
NOISE = 0.1  # how far from 1 the control's interval may reach
Samples = dict[str, tuple[float, ...]]  # seconds, round by round: "baseline", "again" (the control) and "design"


class TooNoisy(RuntimeError):
    """The machine is too busy to judge speed now; the message says how far off the control was."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a design may cost.

    Attributes:
        weight_bytes: At most so many bytes of weights.
        latency_ratio: An answer takes at most this share of float32 LabLM's time, by the interval's upper end.
        margin: The mean score is shown to lose no more than this.

    Raises:
        ValueError: For a budget that no design can meet, or every one.
    """

    weight_bytes: int = 1_300_000
    latency_ratio: float = 0.5
    margin: float = 0.06

    def __post_init__(self) -> None:
        if self.weight_bytes < 1:
            raise ValueError(f"weight_bytes must be at least 1; got {self.weight_bytes}")
        if not 0 < self.latency_ratio <= 1:
            raise ValueError(f"latency_ratio must be above 0 and at most 1, the baseline's; got {self.latency_ratio}")
        least = 3 / (ITEMS * len(service.TASKS))
        if not least <= self.margin < 1:
            raise ValueError(
                f"margin must be at least {least:.3f}, what the items can show, below 1; got {self.margin}"
            )


@dataclass(frozen=True)
class Examined:
    """What does not depend on the machine's speed: bytes, and scores of the same requests."""

    weight_bytes: int
    steps_per_token: float
    scores: tuple[float, ...]
    baseline_scores: tuple[float, ...]

    @property
    def quality(self) -> Difference:
        """The design's score minus float32 LabLM's."""
        return paired_difference(self.scores, self.baseline_scores)

    @property
    def read_bytes(self) -> float:
        """A model of speed: bytes of weights read for a token; guesses that stand share one reading."""
        return self.weight_bytes * self.steps_per_token

    def misses(self, budget: Budget) -> list[str]:
        """Which limits are missed, a sentence each."""
        found = []
        if self.weight_bytes > budget.weight_bytes:
            found.append(f"the weights take {self.weight_bytes:,} bytes; at most {budget.weight_bytes:,} are allowed")
        if (verdict := self.quality.verdict(budget.margin)) != "keeps":
            found.append(f"the quality is {verdict!r}, not kept: {self.quality} at a margin of {budget.margin}")
        return found


@dataclass(frozen=True)
class Judgement(Examined):
    """An examined design with its speed."""

    samples_s: Samples

    @property
    def latency(self) -> Ratio:
        """Time of the design ÷ time of the baseline."""
        return paired_ratio(self.samples_s["design"], self.samples_s["baseline"])

    @property
    def speedup(self) -> Ratio:
        """Time of the baseline ÷ time of the design."""
        return paired_ratio(self.samples_s["baseline"], self.samples_s["design"])

    @property
    def control(self) -> Ratio:
        """The baseline against itself."""
        return paired_ratio(self.samples_s["again"], self.samples_s["baseline"])

    def misses(self, budget: Budget) -> list[str]:
        """Which limits are missed, a sentence each."""
        late = f"an answer takes {self.latency} of the baseline's time; at most {budget.latency_ratio} is allowed"
        return super().misses(budget) + [late] * (self.latency.high > budget.latency_ratio)

    def score(self, budget: Budget) -> float:
        """How many times as fast as float32 LabLM, at least: the interval's lower end; 0 where a limit is missed."""
        return 0.0 if self.misses(budget) else self.speedup.low


def require_quiet(judgement: Judgement) -> None:
    """Refuses a judgement whose control is off.

    Raises:
        TooNoisy: If the control's interval reaches further than `NOISE` from 1, or leaves 1 out.
    """
    control = judgement.control
    if not 1 - NOISE <= control.low <= 1 <= control.high <= 1 + NOISE:
        raise TooNoisy(
            f"this machine is too noisy now: the baseline against itself is {control}, which must hold 1 and lie "
            f"within {1 - NOISE} to {1 + NOISE}; try again"
        )


@cache
def service_task(items: int = ITEMS) -> Task:
    """Test requests of all tasks; an answer is right if its sentence and values are, any other reply word for word."""
    chosen = [item for kind in service.TASKS for item in service.evaluation_set(kind, "test", items, seed=13)]

    def read(text: str) -> object:
        return read_answer(text) or text.strip()

    return Task(
        "service",
        [chat_ids(_tokenizer(), item.messages[:-1], add_generation_prompt=True) for item in chosen],
        [read(item.messages[-1]["content"]) for item in chosen],
        parse=read,
    )


@cache
def _baseline() -> tuple[FastLlama, tuple[float, ...]]:
    decoder = Design().decoder()
    return decoder, _answers(decoder, 0)[0]


def _answers(decoder: FastLlama, draft_tokens: int) -> tuple[tuple[float, ...], float]:
    """The score of each request, and steps of the model per token."""
    task, scores, steps, tokens = service_task(), [], 0, 0
    for index, prompt in enumerate(task.prompts):
        made = _serve(decoder, prompt, draft_tokens)
        new = made.token_ids[0, len(prompt) :].tolist()
        scores.append(task.judge(_tokenizer().decode(new, skip_special_tokens=True), index))
        steps, tokens = steps + made.target_steps + 1, tokens + len(new)
    return tuple(scores), steps / tokens


def _serve(decoder: FastLlama, prompt: Sequence[int], draft_tokens: int) -> Speculation:
    stop = {_tokenizer().eos_token_id}
    ids = torch.tensor([list(prompt)])
    return generate_speculative(decoder, PromptLookup(), ids, 64, draft_tokens=draft_tokens, stop=stop)


@cache
def _tokenizer():
    return load_model("lablm").tokenizer


def examine(design: Design) -> Examined:
    """Builds a design and lets it answer the same requests as float32 LabLM.

    Raises:
        KernelError: For packed weights without a C compiler.
    """
    return _built(design)[1]


@lru_cache(maxsize=4)
def _built(design: Design) -> tuple[FastLlama, Examined]:
    decoder = design.decoder()
    scores, steps_per_token = _answers(decoder, design.draft_tokens)
    return decoder, Examined(decoder.weight_bytes, steps_per_token, scores, _baseline()[1])


def judge(design: Design, *, rounds: int = 31) -> Judgement:
    """Examines a design and times its answers in turn with float32 LabLM's, which is also timed against itself.

    Args:
        design: What was composed.
        rounds: Rounds of one request; at least 5.

    Raises:
        TooNoisy: See `require_quiet`; there is no verdict then.
        ValueError: For fewer than five rounds.
    """
    check_repeats(rounds)
    (decoder, examined), (baseline, _) = _built(design), _baseline()
    prompt = service_task().prompts[0]
    serve: dict[str, Callable[[], object]] = {
        "baseline": lambda: _serve(baseline, prompt, 0),
        "again": lambda: _serve(baseline, prompt, 0),
        "design": lambda: _serve(decoder, prompt, design.draft_tokens),
    }
    timings = measure_interleaved(serve, repeats=rounds)
    judgement = Judgement(*vars(examined).values(), {name: t.samples_s for name, t in timings.items()})
    require_quiet(judgement)
    return judgement
