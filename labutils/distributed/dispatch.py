"""Requests over nodes that are slow, die, stop or raise: one answer or one named error per request, in order.

Execution is *at least once*: whoever loses a node cannot know whether it had finished, so its requests run again.
"""

import pickle
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from labutils.distributed.partition import partition
from labutils.distributed.work import AnswerBatch, Outcome

POLICIES = ("pull", "static", "weighted")
POLL_S = 0.1


class Engine(Protocol):
    """What `dispatch` needs of an engine; see `dask_engine` and `ray_engine`."""

    def nodes(self) -> Mapping[str, str]:
        """Returns the nodes that are there now: name to address. A restarted node has a new address."""

    def submit(self, node: str, address: str, function: AnswerBatch, payloads: list) -> object:
        """Queues a batch on a node and returns a handle at once."""

    def finished(self, timeout_s: float) -> list[tuple[object, Sequence[Outcome] | Exception]]:
        """Waits for something to finish; returns handles with what came of them, or nothing after the timeout."""

    def forget(self, handles: Iterable[object]) -> None:
        """Cancels what need not run any more."""


@dataclass(frozen=True)
class Answer:
    """The outcome of one request: a value, or a named error."""

    id: int
    value: object
    error: str | None
    node: str


@dataclass
class Report:
    """What happened. Every request was executed at least once, `retries` and `duplicates` of them more often."""

    answers: int = 0
    errors: int = 0
    retries: int = 0
    duplicates: int = 0
    lost_nodes: int = 0
    per_node: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        shares = ", ".join(f"{node} {count}" for node, count in sorted(self.per_node.items()))
        return (
            f"{self.answers} answers, {self.errors} errors, executed at least once: {self.retries} retries, "
            f"{self.duplicates} duplicates; nodes lost {self.lost_nodes}; {shares or 'no node'}"
        )


@dataclass(frozen=True)
class Settings:
    """How to dispatch.

    Attributes:
        policy: "pull" (a free node takes the next batch), "static" (batches dealt out in turn) or "weighted" (in
            proportion to `rates`). What a lost node leaves behind is pulled.
        rates: Requests/s of each node, for "weighted".
        max_requests: Requests in a batch.
        max_tokens: Padded length of a batch; needs `length`.
        length: Length of a request; batches hold similar ones.
        in_flight: Batches that a node holds: one in work, the others so that it need not wait.
        window: At most this many requests are read ahead of the oldest unanswered one: it bounds the memory.
        timeout_s: A node without progress for so long counts as stopped; all nodes gone for so long as lost.
        max_losses: A request that was alone on so many lost nodes is given up as their killer.
    """

    policy: str = "pull"
    rates: Mapping[str, float] | None = None
    max_requests: int = 1
    max_tokens: int | None = None
    length: Callable[[Any], int] = lambda payload: 1
    in_flight: int = 2
    window: int = 4096
    timeout_s: float = 60.0
    max_losses: int = 2

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}; got {self.policy!r}")
        if self.policy == "weighted" and not (self.rates and min(self.rates.values()) > 0):
            raise ValueError(f"the weighted policy needs a positive rate for every node; got {self.rates}")
        if min(self.max_requests, self.in_flight, self.window, self.max_losses) < 1 or self.timeout_s <= 0:
            raise ValueError("max_requests, in_flight, window, max_losses and timeout_s must be positive")


def dispatch(
    requests: Iterable,
    function: AnswerBatch,
    engine: Engine,
    settings: Settings | None = None,
    *,
    report: Report | None = None,
    on_progress: Callable[[Report], object] | None = None,
) -> Iterator[Answer]:
    """Yields one `Answer` per request, in the order of the requests, as they become complete.

    Args:
        requests: Any iterable; it is read only as far ahead as `settings.window` says. A request's id is its place.
        function: Answers a list of requests with a list of as many values. It runs on the nodes, so it must not
            depend on which requests share its batch.
        engine: Where the nodes are.
        settings: How; see `Settings`.
        report: Filled while it runs.
        on_progress: Called with the report after every batch.
    """
    run = _Run(iter(requests), function, engine, settings or Settings(), report or Report())
    began = time.monotonic()
    try:
        while True:
            run.read_ahead()
            run.assign()
            run.collect()
            run.look_after_nodes()
            run.report.seconds = time.monotonic() - began
            if on_progress:
                on_progress(run.report)
            yield from run.deliver()
            if run.finished:
                return
    finally:
        engine.forget([*run.running, *run.abandoned])


@dataclass
class _Batch:
    ids: list[int]
    alone: bool = False  # it was on a lost node: it is sent to an idle one, so that the blame is clear


@dataclass
class _Placed:
    batch: _Batch
    node: str
    address: str


class _Run:
    """The state of one `dispatch`."""

    def __init__(self, source: Iterator, function: AnswerBatch, engine: Engine, settings: Settings, report: Report):
        self.source, self.function, self.engine = source, function, engine
        self.settings, self.report = settings, report
        self.read = self.delivered = 0
        self.exhausted = False
        self.payloads: dict[int, object] = {}  # read and not answered
        self.answers: dict[int, Answer] = {}  # answered and not delivered
        self.losses: Counter[int] = Counter()
        self.shared: deque[_Batch] = deque()
        self.own: dict[str, deque[_Batch]] = defaultdict(deque)
        self.dealt: Counter[str] = Counter()
        self.running: dict[object, _Placed] = {}
        self.abandoned: dict[object, _Placed] = {}  # on stopped nodes; their answers may still come, as duplicates
        self.nodes = dict(engine.nodes())
        self.looked_at = self.last_seen = time.monotonic()
        self.progress_at: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        return self.exhausted and self.delivered == self.read

    def read_ahead(self) -> None:
        """Reads and cuts the next block of requests once half of the window is free."""
        room = self.settings.window - (self.read - self.delivered)
        if self.exhausted or room < self.settings.window / 2:
            return
        block = []
        for payload in self.source:
            block.append(payload)
            if len(block) == room:
                break
        self.exhausted = len(block) < room
        first, self.read = self.read, self.read + len(block)
        self.payloads.update(enumerate(block, first))
        cut = partition(
            [self.settings.length(payload) for payload in block],
            max_requests=self.settings.max_requests,
            max_tokens=self.settings.max_tokens,
        )
        for batch in cut:
            self.queue_for(batch).append(_Batch([first + i for i in batch]))

    def queue_for(self, batch: list[int]) -> deque[_Batch]:
        """Returns the queue that the policy gives a batch to."""
        if self.settings.policy == "pull" or not self.nodes:
            return self.shared
        rates = self.settings.rates if self.settings.policy == "weighted" else None
        node = min(self.nodes, key=lambda n: (self.dealt[n] + 1) / (rates.get(n, 1e-9) if rates else 1))
        self.dealt[node] += len(batch)
        return self.own[node]

    def usable(self) -> dict[str, str]:
        """Returns the nodes that are there and not stopped."""
        stopped = {(p.node, p.address) for p in self.abandoned.values()}
        return {node: address for node, address in self.nodes.items() if (node, address) not in stopped}

    def assign(self) -> None:
        """Hands batches to nodes that have room, one each in turn, so that the last ones spread out."""
        usable = self.usable()
        held = Counter(placed.node for placed in self.running.values())
        for level in range(self.settings.in_flight):
            for node, address in usable.items():
                if held[node] == level and (batch := self.take(node, idle=level == 0)):
                    payloads = [self.payloads[i] for i in batch.ids]
                    handle = self.engine.submit(node, address, self.function, payloads)
                    self.running[handle] = _Placed(batch, node, address)
                    held[node] += 1
                    if level == 0:
                        self.progress_at[node] = time.monotonic()

    def take(self, node: str, *, idle: bool) -> _Batch | None:
        """Returns the next batch for a node; a suspect goes to an idle one only, where it is the first in work."""
        for queue in (self.own[node], self.shared):
            while queue and (idle or not queue[0].alone):
                batch = queue.popleft()
                batch.ids = [i for i in batch.ids if i in self.payloads]  # a late answer may have come meanwhile
                if batch.ids:
                    return batch
        return None

    def collect(self) -> None:
        """Waits for batches to finish and takes their outcomes."""
        for handle, result in self.engine.finished(POLL_S if self.running or not self.finished else 0):
            placed = self.running.pop(handle, None) or self.abandoned.pop(handle, None)
            if placed is None:
                continue
            self.progress_at[placed.node] = time.monotonic()
            if isinstance(result, Exception):
                self.retry(placed.batch, f"{type(result).__name__}: {result}")
                continue
            for request, outcome in zip(placed.batch.ids, result, strict=True):
                self.settle(request, outcome, placed.node)

    def settle(self, request: int, outcome: Outcome, node: str) -> None:
        """Keeps the first outcome of a request; counts any further one as a duplicate."""
        if request not in self.payloads:
            self.report.duplicates += 1
            return
        value = None if outcome.value is None else pickle.loads(outcome.value)
        self.answers[request] = Answer(request, value, outcome.error, node)
        del self.payloads[request]
        self.losses.pop(request, None)
        self.report.per_node[node] += 1

    def retry(self, batch: _Batch, problem: str) -> None:
        """Queues the requests of a lost batch again, each alone; gives up one that was alone often enough."""
        waiting = [request for request in batch.ids if request in self.payloads]
        for request in waiting:
            if batch.alone:
                self.losses[request] += 1
            if self.losses[request] >= self.settings.max_losses:
                words = f"{problem} (request {request} was alone on {self.losses[request]} nodes that failed)"
                self.settle(request, Outcome(None, words), "nowhere")
            else:
                self.report.retries += 1
                self.shared.append(_Batch([request], alone=True))

    def look_after_nodes(self) -> None:
        """Finds nodes that are gone or stopped, and takes their batches back."""
        now = time.monotonic()
        if now - self.looked_at < POLL_S:
            return
        self.looked_at, before, self.nodes = now, self.nodes, dict(self.engine.nodes())
        gone = [node for node, address in before.items() if self.nodes.get(node) != address]
        self.report.lost_nodes += len(gone)
        self.abandoned = {h: p for h, p in self.abandoned.items() if self.nodes.get(p.node) == p.address}
        for node in gone:
            self.take_back(node, "NodeLost: the node ended", keep=False)
        for node in {placed.node for placed in self.running.values()}:
            if now - self.progress_at.get(node, now) > self.settings.timeout_s:
                self.report.lost_nodes += 1
                self.take_back(node, f"NodeStopped: no progress for {self.settings.timeout_s} s", keep=True)
        if self.usable():
            self.last_seen = now
        elif now - self.last_seen > self.settings.timeout_s:
            for request in list(self.payloads):
                self.settle(request, Outcome(None, "NoNodes: all nodes are lost"), "nowhere")

    def take_back(self, node: str, problem: str, *, keep: bool) -> None:
        """Queues again what a lost node held. The first batch was in work, so it alone may be the cause."""
        held = {handle: placed for handle, placed in self.running.items() if placed.node == node}
        for position, (handle, placed) in enumerate(held.items()):
            del self.running[handle]
            if keep:
                self.abandoned[handle] = placed
            if position == 0:
                self.retry(placed.batch, problem)
            else:
                self.report.retries += len(placed.batch.ids)
                self.shared.append(_Batch(list(placed.batch.ids), placed.batch.alone))
        if not keep:
            self.engine.forget(held)
        self.shared.extend(self.own.pop(node, ()))

    def deliver(self) -> Iterator[Answer]:
        """Yields the answers whose turn has come."""
        while (answer := self.answers.pop(self.delivered, None)) is not None:
            self.delivered += 1
            self.report.answers += answer.error is None
            self.report.errors += answer.error is not None
            yield answer
