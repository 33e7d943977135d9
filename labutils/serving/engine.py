"""The engine: a scheduler's steps, a model that computes them, and a token for every request that is due one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor

from labutils.serving.blocks import BlockPool
from labutils.serving.scheduler import End, Limits, Request, Scheduler, Step

logger = logging.getLogger(__name__)


class StepModel(Protocol):
    """What an engine needs of a model; `PagedLlama` is one."""

    blocks: int
    block_size: int

    def __call__(self, step: Step) -> Float[Tensor, "sampled vocab"]:
        """Computes a step and returns the logits after each chunk that samples."""


@dataclass(frozen=True)
class Output:
    """What a step brought a request: a token, its end, or both."""

    request: Request
    token_id: int | None
    end: End | None


class Engine:
    """Serves requests with a model, step by step, in one thread.

    Args:
        model: Computes steps; it holds the keys and values.
        limits: How much to take on.
        clock: Seconds, for deadlines and for `Request.token_s`.
    """

    def __init__(
        self, model: StepModel, limits: Limits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model, self.clock = model, clock
        self.scheduler = Scheduler(BlockPool(model.blocks, block_size=model.block_size), limits or Limits())
        self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def submit(self, request: Request) -> Request:
        """Queues a request and notes when.

        Raises:
            Refusal: If it can never be served, or too many wait.
        """
        request.arrival_s = self.clock()
        return self.scheduler.submit(request)

    def cancel(self, request: Request) -> None:
        """Ends a request for its client's sake; one that has ended stays as it is."""
        self.scheduler.finish(request, End.CANCELLED)

    def step(self) -> list[Output]:
        """One pass of the model; what it brought. A request that goes wrong ends alone, with `End.ERROR`."""
        step = self.scheduler.schedule(self.clock())
        outputs = [Output(request, None, request.end) for request in step.ended]
        if not step.chunks:
            return outputs
        self.steps += 1
        sampled, failed = self._compute(step)
        for request in failed:
            self.scheduler.finish(request, End.ERROR)
        self.scheduler.complete(step, sampled, self.clock())
        outputs += [Output(request, None, End.ERROR) for request in failed]
        return outputs + [Output(request, token, request.end) for request, token in sampled.items()]

    def _compute(self, step: Step) -> tuple[dict[Request, int], list[Request]]:
        due = [chunk.request for chunk in step.chunks if chunk.samples]
        try:
            logits = self.model(step)
        except Exception:  # whose fault it was is unknown: what the step has half written must not be used
            logger.exception("a step of %d requests failed", len(step.chunks))
            return {}, [chunk.request for chunk in step.chunks]
        sampled, failed = {}, []
        if not due:
            return sampled, failed
        numbers = logits.detach().float().cpu().numpy()  # whose argmax is twenty times as fast as PyTorch's
        finite, likeliest = np.isfinite(numbers).all(axis=1), numbers.argmax(axis=1).tolist()
        for row, (request, is_finite, token) in enumerate(zip(due, finite, likeliest, strict=True)):
            try:
                if not is_finite:
                    raise ValueError("logits must be finite")
                sampled[request] = int(request.choose(logits[row : row + 1])) if request.choose else token
            except Exception:
                logger.exception("no token could be drawn")
                failed.append(request)
        return sampled, failed


def run(engine: Engine, requests: Iterable[Request]) -> list[Request]:
    """Continuous batching: whoever waits takes a place as soon as one is free. Returns when all have ended."""
    todo, done = list(requests)[::-1], []
    while todo or engine.busy:
        while todo and len(engine.scheduler.waiting) < engine.scheduler.limits.max_waiting:
            done.append(engine.submit(todo.pop()))
        engine.step()
    return done


def run_static(engine: Engine, requests: Iterable[Request], *, batch: int) -> list[Request]:
    """Static batching, to compare with: the next `batch` requests start when the last of these has ended."""
    todo = list(requests)
    return [r for start in range(0, len(todo), batch) for r in run(engine, todo[start : start + batch])]


def run_at(
    engine: Engine,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    *,
    give_up: Callable[[list[Output]], bool] = lambda outputs: False,
) -> list[Request]:
    """An open loop: each request is submitted at its time after the start, whatever the engine is doing then.

    A load generator that waits for an answer before it sends the next request never sees the worst moments
    ("coordinated omission"). Returns when all have ended.

    Args:
        engine: Its clock must run by itself, as `time.monotonic` does.
        requests: In the order of their arrivals.
        arrivals: Seconds after the start.
        give_up: Is shown what each step brought; once it says yes, those that run are cancelled and no more are sent.
    """
    start, todo = engine.clock(), deque(zip(arrivals, requests, strict=True))
    while todo or engine.busy:
        while todo and start + todo[0][0] <= engine.clock():
            arrival, request = todo.popleft()
            engine.submit(request).arrival_s = start + arrival  # when it came, not when we had time to look
        if not engine.busy:
            time.sleep(max(start + todo[0][0] - engine.clock(), 0))
        elif give_up(engine.step()):
            for request in requests[: len(requests) - len(todo)]:
                engine.cancel(request)
            break
    return list(requests)
