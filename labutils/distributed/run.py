"""The state of one `dispatch`: every request is read, waits in a batch, is sent, and ends once, in `Run.settle`."""

import pickle
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from labutils.distributed.partition import partition
from labutils.distributed.settings import Answer, Report, Settings
from labutils.distributed.source import NOTHING_YET
from labutils.distributed.work import AnswerBatch, Batch, NodeGone, Outcome, Placed, describe, dumps

if TYPE_CHECKING:
    from labutils.distributed.dispatch import Engine

POLL_S, LIVE_POLL_S = 0.1, 0.01


class Run:
    """One `dispatch`: `step` and `deliver` in turn until it is `finished`."""

    def __init__(self, source: Iterator, function: AnswerBatch, engine: "Engine", settings: Settings, report: Report):
        self.source, self.function, self.engine = source, function, engine
        self.settings, self.report, self.session = settings, report, engine.session()
        self.read = self.delivered = self.held_bytes = 0
        self.exhausted, self.source_error = False, None
        self.payloads: dict[int, bytes] = {}  # read and not ended
        self.answers: dict[int, Answer] = {}  # ended and not delivered
        self.sizes: dict[int, int] = {}  # bytes of both
        self.read_at: dict[int, float] = {}  # of those that have not ended
        self.losses: Counter[int] = Counter()
        self.shared: deque[Batch] = deque()
        self.own: dict[str, deque[Batch]] = defaultdict(deque)
        self.dealt: Counter[str] = Counter()
        self.running: dict[object, Placed] = {}
        self.abandoned: dict[object, Placed] = {}  # on stopped nodes; their outcomes may still come
        self.nodes: dict[str, str] = {}
        self.unsure = "the engine was never asked"  # why `nodes` may be out of date; nothing is sent then
        self.looked_at = self.none_since = None
        self.progress_at: dict[str, float] = {}
        self.look_after_nodes()

    @property
    def finished(self) -> bool:
        """Whether every request has been delivered."""
        return self.exhausted and self.delivered == self.read

    def step(self) -> None:
        """Reads, sends, collects and looks after the nodes, in this order: an outcome that is there is progress."""
        self.read_ahead()
        self.assign()
        self.collect()
        self.look_after_nodes()

    def read_ahead(self) -> None:
        """Reads and cuts the next block of requests once half of the window is free."""
        settings = self.settings
        room = settings.window - (self.read - self.delivered)
        if self.exhausted or room < settings.window / 2 or self.held_bytes > settings.window_bytes / 2:
            return
        lengths, began, routes, held = {}, time.monotonic(), defaultdict(list), self.held_requests()
        for payload in self.take_from_source(room):
            request, self.read = self.read, self.read + 1
            self.payloads[request], self.read_at[request] = b"", time.monotonic()
            try:
                self.payloads[request], length = dumps(payload), int(settings.length(payload))
                if settings.max_tokens is not None and length > settings.max_tokens:
                    raise ValueError(f"a request must fit max_tokens={settings.max_tokens}; got {length}")
                routes[self.route(payload, held)].append(request)
                lengths[request] = length
            except Exception as error:
                self.refuse([request], f"NotSent: {describe(error)}")
            self.hold(request, len(self.payloads.get(request, b"")))
            if self.held_bytes >= settings.window_bytes or time.monotonic() - began > POLL_S:
                break
        for node, ids in routes.items():
            for batch in partition(
                [lengths[i] for i in ids], max_requests=settings.max_requests, max_tokens=settings.max_tokens
            ):
                self.queue_for(batch, node).append(Batch([ids[i] for i in batch]))

    def held_requests(self) -> Counter[str]:
        """Returns how many requests each usable node has queued for it alone or in work."""
        batches = [(node, batch) for node, queue in self.own.items() for batch in queue]
        batches += [(placed.node, placed.batch) for placed in self.running.values()]
        return Counter({name: sum(len(batch.ids) for node, batch in batches if node == name) for name in self.usable()})

    def route(self, payload: object, held: Counter[str]) -> str | None:
        """Returns the node that the setting `route` names, and counts the request there; None where it names none."""
        if not (self.settings.route and held):
            return None
        node = self.settings.route(payload, held)
        if node not in held:
            raise ValueError(f"a route must name one of {', '.join(held)}; got {node!r}")
        held[node] += 1
        return node

    def take_from_source(self, room: int) -> Iterator:
        """Yields at most `room` requests, and none once the source has nothing, ends or raises."""
        for _ in range(room):
            try:
                payload = next(self.source)
            except StopIteration:
                self.exhausted = True
                return
            except Exception as error:
                self.exhausted, self.source_error = True, error
                return
            if payload is NOTHING_YET:
                return
            yield payload

    def hold(self, request: int, nbytes: int) -> None:
        """Notes how many bytes a request or its answer takes."""
        self.held_bytes += nbytes - self.sizes.pop(request, 0)
        if nbytes:
            self.sizes[request] = nbytes

    def usable(self) -> dict[str, str]:
        """Returns the nodes that are there and not stopped."""
        stopped = {(placed.node, placed.address) for placed in self.abandoned.values()}
        return {node: address for node, address in self.nodes.items() if (node, address) not in stopped}

    def queue_for(self, batch: list[int], node: str | None) -> deque[Batch]:
        """Returns the queue that the policy gives a batch to; `node` is where it was routed."""
        usable = self.usable()
        if self.settings.policy == "routed" and node in usable:
            return self.own[node]
        if self.settings.policy in ("pull", "routed") or not usable:
            return self.shared
        rates = self.settings.rates if self.settings.policy == "weighted" else None
        node = min(usable, key=lambda n: (self.dealt[n] + 1) / (rates.get(n, 1e-9) if rates else 1))
        self.dealt[node] += len(batch)
        return self.own[node]

    def assign(self) -> None:
        """Hands batches to nodes that have room, one each in turn, so that the last ones spread out."""
        held = defaultdict(list)
        for placed in self.running.values():
            held[placed.node].append(placed.batch)
        for level in range(self.settings.in_flight):
            for node, address in self.usable().items():
                if self.unsure or len(held[node]) != level or any(batch.suspect for batch in held[node]):
                    continue
                if batch := self.take(node, idle=level == 0):
                    self.send(batch, node, address)
                    held[node].append(batch)

    def take(self, node: str, *, idle: bool) -> Batch | None:
        """Returns the next batch for a node; a suspect goes to an idle one only."""
        for queue in (self.own[node], self.shared):
            while queue and (idle or not queue[0].suspect):
                batch = queue.popleft()
                batch.ids = [i for i in batch.ids if i in self.payloads]  # a late answer may have come meanwhile
                if batch.ids:
                    return batch
        return None

    def send(self, batch: Batch, node: str, address: str) -> None:
        """Submits a batch. If that fails, nothing more is sent before the engine has been asked again."""
        if not any(placed.node == node for placed in self.running.values()):
            self.progress_at[node] = time.monotonic()
        payloads = [self.payloads[i] for i in batch.ids]
        try:
            handle = self.session.submit(node, address, self.function, payloads)
        except NodeGone as error:
            self.put_back(batch, error)
        except Exception as error:
            self.unsure = describe(error)
            self.retry(batch, self.unsure)
        else:
            self.running[handle] = Placed(batch, node, address)

    def put_back(self, batch: Batch, error: NodeGone) -> None:
        """Queues a batch again, first and unblamed; nothing is sent before the engine has been asked again."""
        self.unsure = describe(error)
        self.shared.appendleft(batch)

    def collect(self) -> None:
        """Waits for batches to finish and takes their outcomes."""
        wait_s = LIVE_POLL_S if self.settings.live else POLL_S
        for handle, result in self.session.finished(wait_s if self.payloads or self.settings.live else 0):
            late = handle in self.abandoned
            placed = self.abandoned.pop(handle) if late else self.running.pop(handle, None)
            if placed is None:
                continue
            self.progress_at[placed.node] = time.monotonic()
            if isinstance(result, list) and len(result) == len(placed.batch.ids):
                for request, outcome in zip(placed.batch.ids, result, strict=True):
                    self.settle(request, outcome, placed.node)
            elif not late and isinstance(result, NodeGone):
                self.put_back(placed.batch, result)
            elif not late and result is None:
                self.run_singly(placed.batch)
            elif not late:  # the requests of a late one are queued again already
                self.retry(placed.batch, describe(result) if isinstance(result, Exception) else f"got {result!r:.99}")

    def settle(self, request: int, outcome: Outcome, node: str) -> None:
        """Ends a request, here and nowhere else: its first outcome counts, any further one is a duplicate."""
        if request not in self.payloads:
            self.report.duplicates += 1
            return
        value, error = None, outcome.error
        if error is None:
            try:
                value = pickle.loads(outcome.value)
            except Exception as problem:
                error = f"Unreadable answer: {describe(problem)}"
        self.answers[request] = Answer(request, value, error, node)
        self.hold(request, len(outcome.value or b""))
        del self.payloads[request], self.read_at[request]
        self.losses.pop(request, None)
        self.report.per_node[node] += 1
        self.report.answers += error is None
        self.report.errors += error is not None

    def refuse(self, requests: list[int], error: str) -> None:
        """Ends requests with an error that no node sent."""
        for request in requests:
            self.settle(request, Outcome(None, error), "nowhere")

    def run_singly(self, batch: Batch, *, suspect: bool = False) -> None:
        """Queues each request of a batch again by itself."""
        waiting = [request for request in batch.ids if request in self.payloads]
        self.report.retries += len(waiting)
        self.shared.extend(Batch([request], suspect) for request in waiting)

    def retry(self, batch: Batch, problem: str) -> None:
        """Queues a lost batch again, one by one; gives up a request that was alone often enough."""
        if batch.suspect and len(batch.ids) == 1 and batch.ids[0] in self.payloads:
            request = batch.ids[0]
            self.losses[request] += 1
            if self.losses[request] >= self.settings.max_losses:
                times = self.losses[request]
                self.refuse([request], f"{problem} (request {request} was alone on {times} nodes that failed)")
        self.run_singly(batch, suspect=True)

    def look_after_nodes(self) -> None:
        """Finds nodes that are gone or stopped, and takes their batches back."""
        now = time.monotonic()
        if self.looked_at is not None and now - self.looked_at < POLL_S:
            return
        self.looked_at = now
        self.drop_late(now)
        try:
            seen, was_unsure, self.unsure = dict(self.engine.nodes()), self.unsure, None
        except Exception as error:  # the scheduler's silence is no node's fault
            self.unsure = describe(error)
        else:
            self.drop_gone(seen)
            if was_unsure:
                self.progress_at = dict.fromkeys(self.nodes, now)
            self.drop_stopped(now)
        usable = {} if self.unsure else self.usable()
        for node in [node for node in self.own if node not in usable]:
            self.shared.extend(self.own.pop(node))
        if usable:
            self.none_since = None
        elif self.none_since is None:
            self.none_since = now
        elif now - self.none_since > self.settings.timeout_s:
            self.refuse(list(self.payloads), f"NoNodes: {self.unsure or 'all nodes are lost'}")

    def drop_late(self, now: float) -> None:
        """Ends the requests that were read longer ago than `deadline_s`, wherever they are."""
        late = [request for request, read in self.read_at.items() if now - read > self.settings.deadline_s]
        self.refuse(late, f"Late: no answer within {self.settings.deadline_s} s")

    def drop_gone(self, seen: dict[str, str]) -> None:
        """Takes back what the nodes held that have ended since the last look."""
        gone = {node: address for node, address in self.nodes.items() if seen.get(node) != address}
        usable, self.nodes = self.usable(), seen
        self.report.lost_nodes += sum(node in usable for node in gone)  # a stopped one was counted when it stopped
        ended = [handle for handle, placed in self.abandoned.items() if gone.get(placed.node) == placed.address]
        self.session.forget(ended)
        for handle in ended:
            del self.abandoned[handle]
        for node in gone:
            self.session.forget(self.take_back(node, "NodeLost: the node ended"))

    def drop_stopped(self, now: float) -> None:
        """Takes back what nodes without progress hold, and remembers it: they may wake up."""
        for node in {placed.node for placed in self.running.values()}:
            if now - self.progress_at.setdefault(node, now) > self.settings.timeout_s:
                self.report.lost_nodes += 1
                self.abandoned |= self.take_back(node, f"NodeStopped: no progress for {self.settings.timeout_s} s")

    def take_back(self, node: str, problem: str) -> dict[object, Placed]:
        """Queues again what a lost node held, and returns it. The first batch was probably in work, so it is split."""
        held = {handle: placed for handle, placed in self.running.items() if placed.node == node}
        for position, (handle, placed) in enumerate(held.items()):
            del self.running[handle]
            if position == 0:
                self.retry(placed.batch, problem)
            elif waiting := [request for request in placed.batch.ids if request in self.payloads]:
                self.report.retries += len(waiting)
                self.shared.append(Batch(waiting, suspect=True))
        return held

    def deliver(self) -> Iterator[Answer]:
        """Yields the answers whose turn has come."""
        while (answer := self.answers.pop(self.delivered, None)) is not None:
            self.hold(self.delivered, 0)
            self.delivered += 1
            yield answer
