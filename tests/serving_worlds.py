"""A world of requests without a model: memory that notes what lies in it, and texts that follow from what is read."""

import json
import random
import sys
from collections import Counter

from labutils.serving.blocks import BlockPool, check_blocks
from labutils.serving.scheduler import End, Limits, Refusal, Request, Scheduler

VOCAB = 3  # few words, so that beginnings coincide


def contents(token_ids, salt):
    """What must lie at each position: a fingerprint of everything up to it."""
    found, state = [], len(salt)  # not hash(salt), which differs from run to run
    for token in token_ids:
        state = hash((state, token))
        found.append(state)
    return found


def next_token(read):
    return hash(tuple(read)) % VOCAB


def alone(request):
    """The new tokens that a request gets by itself."""
    token_ids = request.token_ids[: request.prompt]
    while True:
        token_ids.append(next_token(contents(token_ids, request.salt)))
        if token_ids[-1] in request.stop or len(token_ids) == request.prompt + request.max_new_tokens:
            return token_ids[request.prompt :]


class World:
    """Runs a scheduler on a memory of fingerprints and verifies everything after every step."""

    def __init__(self, scheduler):
        self.scheduler, self.pool = scheduler, scheduler.pool
        self.memory = {}
        self.now_s = 0.0

    def slot(self, request, position):
        size = self.pool.block_size
        return request.table[position // size], position % size

    def step(self):
        step = self.scheduler.schedule(self.now_s)
        self.check(step)
        for source, target in step.copies:
            for offset in range(self.pool.block_size):
                self.memory[target, offset] = self.memory.get((source, offset))
        for chunk in step.chunks:
            truth = contents(chunk.request.token_ids, chunk.request.salt)
            for position in range(chunk.start, chunk.end):
                assert self.pool.references[self.slot(chunk.request, position)[0]] == 1, "writes what others hold"
                self.memory[self.slot(chunk.request, position)] = truth[position]
        sampled = {}
        for chunk in step.chunks:
            read = [self.memory.get(self.slot(chunk.request, position)) for position in range(chunk.end)]
            assert read == contents(chunk.request.token_ids, chunk.request.salt)[: chunk.end], "foreign or stale memory"
            if chunk.samples:
                sampled[chunk.request] = next_token(read)
        ended = self.scheduler.complete(step, sampled)
        self.now_s += 1
        self.invariants()
        return step, [*step.ended, *ended]

    def check(self, step):
        limits, seen = self.scheduler.limits, [chunk.request for chunk in step.chunks]
        assert len(set(seen)) == len(seen) <= limits.max_running
        assert all(chunk.start < chunk.end for chunk in step.chunks), "a request without a query"
        assert sum(chunk.end - chunk.start for chunk in step.chunks) <= limits.token_budget
        assert all(request in self.scheduler.running for request in seen)
        decoding = [r for r in self.scheduler.running if r.left == 1]
        assert all(request in seen for request in decoding), "a decoding request was left out"
        self.invariants()

    def invariants(self):
        scheduler = self.scheduler
        check_blocks(self.pool, [request.table for request in scheduler.running])
        assert all(r.end is None for r in (*scheduler.running, *scheduler.waiting)), "an ended request is still there"
        assert not any(request.table or request.computed for request in scheduler.waiting)
        assert not set(scheduler.running) & set(scheduler.waiting)
        for line in (scheduler.running, scheduler.waiting):
            assert [r.place for r in line] == sorted(r.place for r in line)


def random_request(rng, limits):
    beginning = [0] * rng.randint(1, 8)
    text = beginning + [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 1, 4]))]
    return Request(
        text[: limits.max_positions],
        max_new_tokens=rng.randint(1, 10),
        stop=frozenset([rng.randrange(VOCAB)] if rng.random() < 0.2 else []),
        priority=rng.choice([0, 0, 0, -1, 1]),
        deadline_s=rng.choice([1e9] * 9 + [rng.randint(1, 30)]),
        salt=rng.choice(["", "", "mine"]),
    )


def random_world(rng):
    running = rng.randint(1, 5)
    limits = Limits(
        token_budget=running + rng.randint(0, 8), max_running=running, max_waiting=rng.randint(1, 6), max_positions=16
    )
    return World(Scheduler(BlockPool(rng.randint(3, 10), block_size=rng.randint(1, 4)), limits))


def explore(seed):
    """One random schedule: arrivals, cancellations and deadlines on a small pool; returns what was seen of it."""
    rng = random.Random(seed)
    world, requests = random_world(rng), []
    seen = {"steps": 0, "copies": 0, "preemptions": 0, "hits": 0, "refused": 0, "ended": 0}
    to_come = rng.randint(1, 12)
    while to_come or world.scheduler.waiting or world.scheduler.running:
        while to_come and rng.random() < 0.5:
            to_come -= 1
            try:
                requests.append(world.scheduler.submit(random_request(rng, world.scheduler.limits)))
            except Refusal:
                seen["refused"] += 1
        alive = [request for request in requests if request.end is None]
        if alive and rng.random() < 0.05:
            world.scheduler.finish(rng.choice(alive), End.CANCELLED)
        waited = bool(world.scheduler.waiting or world.scheduler.running)
        step, ended = world.step()
        assert step.chunks or ended or not waited, "nothing moves"
        seen["steps"] += 1
        seen["copies"] += len(step.copies)
        seen["hits"] += sum(chunk.request.cached > 0 for chunk in step.chunks)
        assert seen["steps"] < 2000, "no end"
    assert world.pool.available == len(world.pool.references), "blocks were lost"
    for request in requests:
        assert request.end is not None
        truth = alone(request)
        assert request.new_ids == (truth if request.end in (End.STOP, End.LENGTH) else truth[: len(request.new_ids)])
        seen["preemptions"] += request.preemptions
        seen["ended"] += 1
    return seen


if __name__ == "__main__":  # a process of its own, without the suite's checks of shapes, is 25 times faster
    total = Counter()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            total.update(explore(seed))
        except Exception as error:
            raise SystemExit(f"seed {seed}: {type(error).__name__}: {error}") from error
    print(json.dumps(total))
