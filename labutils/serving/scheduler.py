"""Who computes what in the next step: iteration-level scheduling over a pool of blocks, without a model.

A *step* is one pass of the model over a few tokens of many requests (Orca, OSDI 2022). Requests join and leave between
steps. Decoding requests go first, one token each; what is left of the token budget reads prompts in chunks, so that a
long prompt does not hold up those who are decoding (Sarathi-Serve, arXiv:2403.02310). Where memory runs out, the last
request in line gives its blocks back and computes them again later.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

from labutils.serving.blocks import BlockPool, chained_hashes
from labutils.serving.queueing import RequestTimes


class Refusal(ValueError):
    """A request was turned away; `code` names the reason for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class End(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(eq=False)
class Request:
    """A prompt, what its client wants, and how far it is.

    Attributes:
        token_ids: The prompt and what was generated.
        max_new_tokens: At most so many are generated.
        stop: Tokens that end the text; the one that does is kept.
        priority: Lower goes first, among those that wait and those that keep their memory.
        deadline_s: Time by the scheduler's clock after which it is given up.
        salt: Prefixes are shared only under the same salt.
        arrival_s: When it was submitted, by the same clock.
        admitted_s: When it first got memory and a place in a step; None while it waits.
        choose: How the engine draws tokens from logits; None is greedy. The scheduler does not look at it.
        token_s: When each new token was made.
        computed: Tokens whose keys and values lie in the blocks of `table`.
        cached: Of those, the tokens that others had computed when it was last admitted.
        end: None while it goes on.
    """

    token_ids: list[int]
    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    priority: int = 0
    deadline_s: float = math.inf
    salt: str = ""
    arrival_s: float = 0.0
    choose: Callable | None = None
    admitted_s: float | None = field(init=False, default=None)
    token_s: list[float] = field(init=False, default_factory=list)
    prompt: int = field(init=False)
    place: tuple[int, int] = field(init=False, default=(0, 0))
    computed: int = field(init=False, default=0)
    cached: int = field(init=False, default=0)
    preemptions: int = field(init=False, default=0)
    table: list[int] = field(init=False, default_factory=list)
    hashes: list[bytes] = field(init=False, default_factory=list)
    end: End | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)  # it grows; the caller's stays as it is
        self.prompt = len(self.token_ids)

    @property
    def new_ids(self) -> list[int]:
        """What was generated so far."""
        return self.token_ids[self.prompt :]

    @property
    def times(self) -> RequestTimes:
        """What its client felt."""
        return RequestTimes(self.arrival_s, tuple(self.token_s))

    @property
    def left(self) -> int:
        """Tokens known and not computed: 1 while decoding, more while reading."""
        return len(self.token_ids) - self.computed


@dataclass(frozen=True)
class Chunk:
    """A request's tokens `start` to `end` in one step; its next token is drawn where they reach the text's end."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the logits after the last token are wanted."""
        return self.end == len(self.request.token_ids)


@dataclass(frozen=True)
class Step:
    """What the model does at once: first copy blocks, in this order, then compute the chunks."""

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...]
    ended: tuple[Request, ...]  # given up since the last step


@dataclass(frozen=True)
class Limits:
    """How much a scheduler takes on.

    Attributes:
        token_budget: Tokens in a step.
        max_running: Requests in a step.
        max_waiting: Requests in the queue; one more is refused, so that a flood costs no memory.
        max_positions: Tokens of one request, prompt and answer.
    """

    token_budget: int = 256
    max_running: int = 32
    max_waiting: int = 256
    max_positions: int = 1024

    def __post_init__(self) -> None:
        if min(self.token_budget, self.max_running, self.max_waiting, self.max_positions) < 1:
            raise ValueError(f"every limit must be at least 1; got {self}")
        if self.token_budget < self.max_running:
            raise ValueError(f"token_budget must have a token for each of max_running requests; got {self}")


class Scheduler:
    """Requests that wait and run, in the order of priority and arrival.

    >>> scheduler = Scheduler(BlockPool(8, block_size=2), Limits(token_budget=4, max_running=2))
    >>> request = scheduler.submit(Request([1, 2, 3, 4, 5], max_new_tokens=2))
    >>> [(chunk.start, chunk.end) for chunk in scheduler.schedule().chunks]
    [(0, 4)]
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.arrivals = count()

    def submit(self, request: Request) -> Request:
        """Queues a request.

        Raises:
            Refusal: If it can never be served, or too many wait; nothing has changed then.
        """
        positions = request.prompt + request.max_new_tokens
        if request.prompt < 1 or request.max_new_tokens < 1:
            raise Refusal("empty", f"a request needs a prompt and a new token; got {request.prompt} tokens")
        largest = min(self.limits.max_positions, self.pool.block_size * len(self.pool.references) + 1)
        if positions > largest:
            raise Refusal(
                "context_length_exceeded", f"prompt and answer may have {largest} tokens together; got {positions}"
            )
        if len(self.waiting) >= self.limits.max_waiting:
            raise Refusal("queue_full", f"{len(self.waiting)} requests are waiting already; try again later")
        request.place = (request.priority, next(self.arrivals))
        insort(self.waiting, request, key=lambda r: r.place)
        return request

    def finish(self, request: Request, end: End) -> None:
        """Ends a request, wherever it is, and takes its blocks back; one that has ended stays as it is."""
        if request.end is None:
            (self.running if request in self.running else self.waiting).remove(request)
            self._give_back(request)
            request.end = end

    def schedule(self, now_s: float = 0.0) -> Step:
        """The next step: those past their deadline go, decoding goes first, then prompts in chunks, then newcomers."""
        ended = [request for request in (*self.running, *self.waiting) if request.deadline_s <= now_s]
        for request in ended:
            self.finish(request, End.DEADLINE)
        chunks = self._decode()
        budget = self.limits.token_budget - len(chunks)
        copies: list[tuple[int, int]] = []
        for request in self.running:
            if request.left > 1 and budget:
                chunks.append(self._chunk(request, budget))
                budget -= chunks[-1].end - chunks[-1].start
        while budget and self.waiting and len(self.running) < self.limits.max_running:
            if not self._admit(self.waiting[0], copies):
                break  # nobody overtakes: a large request would starve
            request = self.waiting.pop(0)
            request.admitted_s = now_s if request.admitted_s is None else request.admitted_s
            insort(self.running, request, key=lambda r: r.place)
            chunks.append(self._chunk(request, budget))
            budget -= chunks[-1].end - chunks[-1].start
        return Step(tuple(chunks), tuple(copies), tuple(ended))

    def complete(self, step: Step, sampled: dict[Request, int], now_s: float = 0.0) -> list[Request]:
        """Takes in what a step made and returns the requests that ended; `sampled` holds those that go on.

        A request that was ended in the meantime is passed over.
        """
        ended = []
        for chunk in step.chunks:
            request = chunk.request
            if request.end is not None:
                continue
            request.computed = chunk.end
            self._publish(request, chunk.start)
            if request in sampled:
                request.token_ids.append(sampled[request])
                request.token_s.append(now_s)
                stopped = sampled[request] in request.stop
                if stopped or len(request.new_ids) == request.max_new_tokens:
                    self.finish(request, End.STOP if stopped else End.LENGTH)
                    ended.append(request)
        return ended

    def _decode(self) -> list[Chunk]:
        """One token of every request that has read its prompt; memory is taken from the last in line."""
        chunks = []
        for request in list(self.running):
            if request not in self.running or request.left > 1:
                continue
            missing = self._blocks(len(request.token_ids)) - len(request.table)
            while missing and not self.pool.available and self._preempt_last() is not request:
                pass
            if request in self.running:
                request.table += self.pool.allocate([], missing)
                chunks.append(self._chunk(request, 1))
        return chunks

    def _preempt_last(self) -> Request:
        request = self.running.pop()
        self._give_back(request)
        request.preemptions += 1
        insort(self.waiting, request, key=lambda r: r.place)
        return request

    def _admit(self, request: Request, copies: list[tuple[int, int]]) -> bool:
        """Takes blocks for the whole known text, if there is room; looks before it touches anything.

        At least the last token is computed, since the next one is drawn from its logits. If its block is known too, it
        is written into a copy, or in place where nobody else holds it.
        """
        total = len(request.token_ids)
        self._hash(request)
        shared = self.pool.match(request.hashes)
        whole = len(shared) * self.pool.block_size == total
        copy = whole and self.pool.references[shared[-1]] > 0
        new = self._blocks(total) - len(shared)
        if not self.pool.room_for(shared, new + copy):
            return False
        request.table = self.pool.allocate(shared, new)
        if whole and (pair := self.pool.own(request.table, len(shared) - 1)):
            copies.append(pair)
        request.computed = request.cached = min(len(shared) * self.pool.block_size, total - 1)
        return True

    def _publish(self, request: Request, start: int) -> None:
        """Makes the blocks known that were filled by the tokens from `start` on."""
        size = self.pool.block_size
        full = request.computed // size
        if full > len(request.hashes):
            self._hash(request)
        for index in range(start // size, full):
            self.pool.publish(request.table[index], request.hashes[index])

    def _hash(self, request: Request) -> None:
        """Names the full blocks of a text that has grown."""
        size = self.pool.block_size
        request.hashes = chained_hashes(request.token_ids, size, salt=request.salt, known=request.hashes)

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.table)
        request.table, request.computed = [], 0

    def _blocks(self, positions: int) -> int:
        return -(-positions // self.pool.block_size)

    @staticmethod
    def _chunk(request: Request, budget: int) -> Chunk:
        return Chunk(request, request.computed, min(len(request.token_ids), request.computed + budget))
