"""`bench users`: how many users have their whole answer within a second, before and after each technique.

Every rung of the ladder changes one thing. A rung is searched several times, each time with other arrivals; two
replicas are two processes that serve half of the users each.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from labutils.capstone.designs import Design
from labutils.capstone.users import (
    LIMIT_S,
    THINK_S,
    Bracket,
    Crowd,
    Questions,
    allowed_late,
    busiest,
    serve_crowd,
    users_within,
)
from labutils.lab.data import service
from labutils.lab.models.load import load_model
from labutils.lab.models.served import paged_llama
from labutils.lab.models.tokenizer import chat_ids
from labutils.measurement.ledger import host_description
from labutils.serving.engine import StepModel
from labutils.serving.lookahead import Lookahead

POSITIONS = 112  # of one request: the longest question and 64 tokens of an answer


@dataclass(frozen=True)
class Rung:
    """A design and how it is served.

    Attributes:
        name: For the table.
        against: The rung from which it differs in one thing.
        running: Requests in a step.
        replicas: Processes, each with its own model and its own share of the users.
    """

    name: str
    against: str
    design: Design
    running: int = 16
    replicas: int = 1


ALONE, BATCHED, INT8, SMALL = "float32, one at a time", "float32, 16 at a time", "int8", "LabLM-small, int8"
RUNGS = (
    Rung(ALONE, "", Design(), running=1),
    Rung(BATCHED, ALONE, Design()),
    Rung(INT8, BATCHED, Design(bits=8)),
    Rung("int4", INT8, Design(bits=4)),
    Rung("int8, 4 tokens guessed", INT8, Design(bits=8, draft_tokens=4)),
    Rung(SMALL, INT8, Design(model="lablm-small", bits=8)),
    Rung("two replicas of that", SMALL, Design(model="lablm-small", bits=8), replicas=2),
)


@functools.cache
def questions(*, new_tokens: int = 48) -> Questions:
    """A hundred questions of the service corpus, in both languages, in phrasings that training never showed."""
    tokenizer = load_model("lablm").tokenizer
    chats = [item.messages[:-1] for item in service.evaluation_set(service.ANSWER, "test", 100, seed=13)]
    prompts = [chat_ids(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    return Questions(prompts, frozenset({tokenizer.eos_token_id}), new_tokens)


@functools.cache
def paged_design(design: Design, running: int) -> StepModel:
    """The model of a rung, with memory for the requests of a step."""
    paged = paged_llama(design.build().model, positions=running * POSITIONS)
    return Lookahead(paged, draft_tokens=design.draft_tokens) if design.draft_tokens else paged


def replica(design: Design, running: int, users: int, seed: int, start_s: float) -> Crowd:
    """One of several processes: serves its users from a moment that all of them share."""
    model = paged_design(design, running)
    time.sleep(max(0.0, start_s - time.monotonic()))
    return serve_crowd(model, questions(), users, running=running, seed=seed)


class Replicas:
    """Processes that serve crowds side by side."""

    def __init__(self, rung: Rung) -> None:
        self.rung = rung
        self.pool = ProcessPoolExecutor(rung.replicas, mp_context=get_context("spawn"))
        self(4000, seed=0)  # builds the models

    def __call__(self, users: int, *, seed: int) -> Crowd:
        """What all users felt; they are dealt out evenly."""
        start_s, count, rung = time.monotonic() + 0.2, self.rung.replicas, self.rung
        shares = [max(1, users // count + (i < users % count)) for i in range(count)]
        jobs = [
            self.pool.submit(replica, rung.design, rung.running, share, count * seed + i, start_s)
            for i, share in enumerate(shares)
        ]
        return Crowd(users, tuple(seconds for job in jobs for seconds in job.result().latency_s))

    def close(self) -> None:
        """Ends the processes."""
        self.pool.shutdown()


def search(rung: Rung, *, rounds: int, say: Callable[[str], None]) -> Iterator[Bracket]:
    """A search of a rung for each seed from 1 to `rounds`."""
    model, asked = paged_design(rung.design, rung.running), questions()
    start = max(1, int(0.8 * rung.replicas * busiest(model, asked, running=rung.running)))
    alone = functools.partial(serve_crowd, model, asked, running=rung.running)
    with contextlib.closing(Replicas(rung)) if rung.replicas > 1 else contextlib.nullcontext(alone) as measure:
        for seed in range(1, rounds + 1):
            bracket = users_within(functools.partial(measure, seed=seed), start=start)
            say(f"{rung.name}: {bracket}")
            yield bracket


@dataclass(frozen=True)
class UsersRow:
    """A rung and what every search of it found."""

    rung: Rung
    brackets: tuple[Bracket, ...]

    def to_json(self) -> dict[str, object]:
        """The users served in every search, and all runs on the way."""
        rung, runs = self.rung, [run for bracket in self.brackets for run in bracket.runs]
        counts = [{"users": r.users, "questions": len(r.latency_s), "late": r.late, "p99_s": p99(r)} for r in runs]
        return asdict(rung) | {
            "think_s": THINK_S,
            "limit_s": LIMIT_S,
            "served": [bracket.served for bracket in self.brackets],
            "not_served": [bracket.not_served for bracket in self.brackets],
            "runs": counts,
            "host": host_description(),
        }


def bench_users(*, rounds: int, say: Callable[[str], None] = print, rungs: tuple[Rung, ...] = RUNGS) -> list[UsersRow]:
    """Searches each rung as many times as there are rounds."""
    return [UsersRow(rung, tuple(search(rung, rounds=rounds, say=say))) for rung in rungs]


def p99(crowd: Crowd) -> float | None:
    """The nearest-rank 99th percentile; None for a run that was given up."""
    ordered = sorted(crowd.latency_s)
    found = ordered[-1 - allowed_late(len(ordered))]
    return found if math.isfinite(found) else None


def table(rows: Sequence[Mapping]) -> str:
    """Rows as `to_json` gives them: users at p99 within the limit, median and span of the searches, and each step."""
    users = {row["name"]: statistics.median(row["served"]) for row in rows}
    lines = [f"{'':<24}{'users':>8}  {'span':<16} times as many as with"]
    for row in rows:
        span, name, base = f"[{min(row['served']):,}, {max(row['served']):,}]", row["name"], row["against"]
        step = f"{users[name] / users[base]:.2f}  {base}" if users.get(base) else ""
        lines.append(f"{name:<24}{users[name]:>8,.0f}  {span:<16} {step}".rstrip())
    return "\n".join(lines)
