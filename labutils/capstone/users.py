"""How many users an engine answers within a second, measured with the arrivals of chapter 11.

A user sends a question, on average, once in `think_s` seconds and independently of all others, so N users are Poisson
arrivals at rate N / think_s. They are served if 99% of their questions have their whole answer within the limit: a rule
on counts, which is what p99 ≤ limit means for the nearest-rank quantile, and which a run can fail before its end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labutils.serving.engine import Engine, Output, StepModel, run, run_at
from labutils.serving.queueing import poisson_arrivals
from labutils.serving.scheduler import End, Limits, Request

THINK_S, LIMIT_S, SHARE = 20.0, 1.0, 0.99


@dataclass(frozen=True)
class Crowd:
    """One run: so many users, and how long each answer took; `math.inf` for answers that were not waited for."""

    users: int
    latency_s: tuple[float, ...]
    limit_s: float = LIMIT_S

    @property
    def late(self) -> int:
        """Answers that took longer than the limit."""
        return sum(seconds > self.limit_s for seconds in self.latency_s)

    @property
    def served(self) -> bool:
        """Whether 99% of the answers came in time."""
        return self.late <= allowed_late(len(self.latency_s))


def allowed_late(count: int) -> int:
    """Late answers that leave 99% in time.

    >>> allowed_late(300), allowed_late(99)
    (3, 0)
    """
    return count - math.ceil(round(SHARE * count, 9))


@dataclass(frozen=True)
class Questions:
    """What the users of a run ask.

    Attributes:
        prompts: Token ids, asked in turn.
        stop: Tokens that end an answer.
        new_tokens: At most so many an answer.
        duration_s: A run goes on for at least so long. It must be several times the limit: a queue that grows needs
            time to show.
        fewest: A run has at least so many questions; with fewer than 100, one late answer decides.
    """

    prompts: Sequence[Sequence[int]]
    stop: frozenset[int]
    new_tokens: int = 48
    duration_s: float = 5 * LIMIT_S
    fewest: int = 150

    def __post_init__(self) -> None:
        if not self.prompts or min(self.new_tokens, self.fewest) < 1 or self.duration_s <= LIMIT_S:
            rule = f"a run needs prompts, tokens, questions, and more than {LIMIT_S} s"
            raise ValueError(f"{rule}; got {len(self.prompts)}, {self.new_tokens}, {self.fewest} and {self.duration_s}")

    def count(self, users: int) -> int:
        """How many questions so many users ask in a run.

        >>> Questions([[1]], frozenset()).count(400), Questions([[1]], frozenset()).count(4000)
        (150, 1000)
        """
        return max(self.fewest, math.ceil(users / THINK_S * self.duration_s))


def serve_crowd(model: StepModel, questions: Questions, users: int, *, running: int, seed: int) -> Crowd:
    """Lets so many users ask, `running` of them served at a time; ends early once they surely are too many.

    Raises:
        ValueError: Without users.
    """
    if users < 1:
        raise ValueError(f"users must be at least 1; got {users}")
    count = questions.count(users)
    engine = Engine(model, Limits(max_running=running, max_waiting=count))
    prompts = [questions.prompts[i % len(questions.prompts)] for i in range(count)]
    requests = [Request(prompt, questions.new_tokens, questions.stop, salt=str(i)) for i, prompt in enumerate(prompts)]
    late = 0

    def too_many(outputs: list[Output]) -> bool:
        nonlocal late
        late += sum(output.end is not None and output.request.times.latency_s > LIMIT_S for output in outputs)
        now, scheduler = engine.clock(), engine.scheduler
        overdue = sum(now - r.arrival_s > LIMIT_S for r in (*scheduler.waiting, *scheduler.running))
        return late + overdue > allowed_late(count)

    run_at(engine, requests, poisson_arrivals(users / THINK_S, count, seed=seed), give_up=too_many)
    answered = (End.STOP, End.LENGTH)
    return Crowd(users, tuple(r.times.latency_s if r.end in answered else math.inf for r in requests))


def busiest(model: StepModel, questions: Questions, *, running: int) -> int:
    """Users whose questions come about as fast as the engine can answer: where a search begins."""
    requests = [Request(prompt, questions.new_tokens, questions.stop) for prompt in questions.prompts]
    began = time.monotonic()
    run(Engine(model, Limits(max_running=running, max_waiting=len(requests))), requests)
    return max(1, int(len(requests) / (time.monotonic() - began) * THINK_S))


@dataclass(frozen=True)
class Bracket:
    """The most users that were served, the fewest above them that were not, and every run on the way."""

    served: int
    not_served: int
    runs: tuple[Crowd, ...]

    def __str__(self) -> str:
        return f"{self.served} (not {self.not_served})"


def users_within(measure: Callable[[int], Crowd], *, start: int, factor: float = 1.25, most: int = 2**20) -> Bracket:
    """Searches the number of users: doubling or halving until both verdicts are seen, then bisecting down to `factor`.

    Noise can make a smaller crowd fail where a larger one passes; the search then ends at one of the borders, and
    `runs` shows it.

    >>> str(users_within(lambda n: Crowd(n, (0.5 if n <= 70 else 2.0,)), start=10))
    '68 (not 80)'

    Args:
        measure: Runs a crowd of so many users.
        start: The first guess.
        factor: The bracket is at most this wide.
        most: No more than so many users are tried.

    Raises:
        ValueError: For a start below 1 or a factor that is not above 1.
    """
    if start < 1 or factor <= 1:
        raise ValueError(f"start must be at least 1 and factor above 1; got {start} and {factor}")
    runs, low, high, users = [], 0, most + 1, start
    while True:
        runs.append(measure(users))
        if runs[-1].served:
            low = users
        else:
            high = users
        if high - low <= 1 or (low and high <= most and high <= low * factor):
            return Bracket(low, high, tuple(runs))
        users = (
            min(most, 2 * low)
            if high > most
            else max(1, high // 2)
            if not low
            else max(low + 1, round(math.sqrt(low * high)))
        )
