"""An engine whose nodes, messages and clock are simulated from one seed, so that a run can be repeated exactly."""

import pickle
import random
from collections import deque
from itertools import count

from labutils.distributed.work import NodeGone, answer_batch


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class FakeNode:
    def __init__(self, address):
        self.address = address
        self.queue = deque()
        self.stopped = False
        self.work_left = None


class FakeEngine:
    """Nodes "a", "b", … that work while somebody waits for them.

    A batch takes `speed(node)` seconds of simulated time. A request in `kills` ends its node, one in `stops` stops it.
    A node that ends comes back after `restart_s` (never if None), and a share `spared` of the outcomes that are still
    on their way arrives. A share `flaky` of submissions and of outcomes fails. Where `tells`, a batch for
    a node that has ended is refused; otherwise it is lost.
    """

    def __init__(
        self,
        clock,
        nodes,
        *,
        seed=0,
        speed=None,
        kills=(),
        stops=(),
        restart_s=0.0,
        message_s=0.0,
        spared=0.5,
        tells=False,
    ):
        self.clock, self.random = clock, random.Random(seed)
        self.speed = speed or (lambda node: 1.0)
        self.kills, self.stops = set(kills), set(stops)
        self.restart_s, self.message_s, self.spared = restart_s, message_s, spared
        self.tells = tells
        self.born, self.handles = count(), count()
        self.nodes_now = {name: FakeNode(f"{name}#{next(self.born)}") for name in nodes}
        self.back_at, self.outbox, self.plan = {}, [], []
        self.silent, self.flaky, self.steps, self.most_steps = False, 0.0, 0, 5000
        self.executed, self.trace, self.complaints, self.most_held = [], [], [], 0

    def nodes(self):
        if self.silent:
            raise ConnectionError("the scheduler does not answer")
        return {name: node.address for name, node in self.nodes_now.items()}

    def session(self):
        return FakeSession(self)

    def disconnect(self):
        """Loses the connection to the scheduler, and with it every batch that was sent."""
        for name, node in self.nodes_now.items():
            self.outbox += [(self.clock.now, name, b[1], b[0], NodeGone("the connection broke")) for b in node.queue]
            node.queue.clear()
            node.work_left = None

    def at(self, when, action):
        """Plans something to happen at a moment."""
        self.plan.append((when, action))

    def kill(self, name):
        node = self.nodes_now.pop(name, None)
        if node is None:
            return
        if node.queue:
            _, session, *_, requests = node.queue[0]
            session.suspects |= set(requests)
        self.outbox = [m for m in self.outbox if m[1] != name or self.random.random() < self.spared]
        if self.restart_s is not None:
            self.back_at[name] = self.clock.now + self.restart_s

    def stop(self, name, stopped=True):
        if name in self.nodes_now:
            self.nodes_now[name].stopped = stopped

    def advance(self, seconds):
        """Lets `seconds` pass: planned events, nodes that come back, work, in random order of the nodes."""
        self.clock.now += seconds
        self.steps += 1
        assert self.steps < self.most_steps, "the run makes no progress"
        for event in [event for event in self.plan if event[0] <= self.clock.now]:
            self.plan.remove(event)
            event[1]()
        for name in [name for name, when in self.back_at.items() if when <= self.clock.now]:
            del self.back_at[name]
            self.nodes_now[name] = FakeNode(f"{name}#{next(self.born)}")
        names = list(self.nodes_now)
        self.random.shuffle(names)
        for name in names:
            self.work(name, seconds)

    def work(self, name, seconds):
        node = self.nodes_now[name]
        while node.queue and not node.stopped:
            if node.work_left is None:
                node.work_left = self.speed(name)
            done = min(seconds, node.work_left)
            node.work_left, seconds = node.work_left - done, seconds - done
            if node.work_left > 1e-9:
                return
            node.work_left = None
            handle, session, function, payloads, requests = node.queue[0]
            self.executed += requests
            if self.kills & set(requests):
                return self.kill(name)
            if self.stops & set(requests):
                node.stopped = True
                return None
            node.queue.popleft()
            session.suspects -= set(requests)
            arrives = self.clock.now + self.random.random() * self.message_s
            broken = self.random.random() < self.flaky
            result = OSError("the message broke") if broken else answer_batch(function, payloads, name)
            self.outbox.append((arrives, name, session, handle, result))
        return None


class FakeSession:
    def __init__(self, engine):
        self.engine, self.forgotten, self.suspects = engine, [], set()

    def submit(self, node, address, function, payloads):
        engine, handle = self.engine, next(self.engine.handles)
        if engine.silent or engine.random.random() < engine.flaky:
            raise ConnectionError("the scheduler does not answer")
        requests = [pickle.loads(payload) for payload in payloads]
        engine.trace.append((node, *requests))
        there = engine.nodes_now.get(node)
        if engine.tells and (there is None or there.address != address):
            raise NodeGone(f"{node} has ended")
        if there and there.address == address:
            beside = [r for batch in there.queue if batch[1] is self for r in batch[-1]]
            if beside and self.suspects & {*beside, *requests}:
                engine.complaints.append(f"{requests} beside {beside} on {node}")
            there.queue.append((handle, self, function, payloads, requests))
        held = sum(len(batch[-1]) for other in engine.nodes_now.values() for batch in other.queue)
        engine.most_held = max(engine.most_held, held)
        return handle

    def finished(self, timeout_s):
        engine = self.engine
        engine.advance(timeout_s * engine.random.choice((0.3, 1.0)))
        if engine.silent:
            return []
        here = [m for m in engine.outbox if m[2] is self and m[0] <= engine.clock.now]
        engine.outbox = [m for m in engine.outbox if m not in here]
        engine.random.shuffle(here)
        engine.trace.append(tuple(m[3] for m in here))
        return [(m[3], m[4]) for m in here]

    def forget(self, handles):
        self.forgotten += handles
        for node in self.engine.nodes_now.values():
            node.queue = deque(b for i, b in enumerate(node.queue) if i == 0 or b[0] not in self.forgotten)
