"""Seeded simulations of `dispatch`: whatever happens, each request ends once, with its answer or with a named error.

`python tests/test_distributed_simulation.py SEED` repeats one of them and prints what happened.
"""

import math
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from fake_nodes import Clock, FakeEngine
from shapes import unchecked

from labutils.distributed.dispatch import Report, Settings, dispatch

RAISES, LONG, UNMEASURED, UNREADABLE = 200, 300, 400, 500
POISONS = [100, 101, 102, 103, 104, 105]
OWN_ERRORS = {
    RAISES: r"KeyError: 200",
    LONG: r"NotSent: ValueError: a request must fit max_tokens=50; got 300",
    UNMEASURED: r"NotSent: ZeroDivisionError: .*",
    UNREADABLE: r"Unreadable answer: ValueError: nobody can read this",
}
LOST = r"(NodeLost|NodeStopped|OSError|ConnectionError): .* \(request \d+ was alone on 2 nodes that failed\)"
LATE = r"Late: no answer within [\d.]+ s"
NO_NODES = r"NoNodes: (all nodes are lost|ConnectionError: the scheduler does not answer)"
FAULTS = (
    "none",
    "kill",
    "kill twice",
    "stop",
    "wake",
    "slow",
    "silent",
    "silent long",
    "poison",
    "stopper",
    "flaky",
    "mixed",
)


class Unsendable:
    def __reduce__(self):
        raise TypeError("nobody can send this")


def nobody_can_read():
    raise ValueError("nobody can read this")


class Unreadable:
    def __reduce__(self):
        return nobody_can_read, ()


def answer(batch):
    if RAISES in batch:
        raise KeyError(RAISES)
    return [Unreadable() if request == UNREADABLE else 2 * request for request in batch]


def length(request):
    if isinstance(request, Unsendable):
        return 1
    return 1 // 0 if request == UNMEASURED else request if request == LONG else 1 + request % 3


@dataclass
class Scenario:
    """Everything that a seed decides."""

    seed: int
    fault: str
    engine: FakeEngine
    clock: Clock
    settings: Settings
    runs: list[list]
    allowed: str  # errors that an innocent request may end with, as a regular expression
    raising_source: bool = False
    patience_s: tuple = (0.0,)
    reports: list[Report] = field(default_factory=list)


def scenario(seed):
    """Draws a scenario; the fault goes round, so that every one is drawn equally often."""
    draw, clock, fault = random.Random(seed), Clock(), FAULTS[seed % len(FAULTS)]
    names = "abc"[: draw.randint(1, 3)]
    count, unit, restart_s = draw.randint(0, 20), draw.choice([0.1, 0.3]), draw.choice([0.0, 0.5, None])
    window = draw.choice([1 + count // 4, 1 + count // 2, max(1, count), 2 * count + 1])
    settings = Settings(
        policy=draw.choice(["pull", "static", "weighted"]), rates={"a": 1, "b": 2, "c": 3}, window=window,
        max_requests=draw.randint(1, 4), max_tokens=50, length=length, in_flight=draw.randint(1, 3), timeout_s=2.0,
        window_bytes=draw.choice([1, 60, 2**20]), deadline_s=draw.choice([math.inf, math.inf, 0.5, 3.0]),
    )  # fmt: skip
    runs = [list(range(count)) for _ in range(1 if draw.random() < 0.75 else 2)]
    for requests in runs:
        for bad in [Unsendable(), RAISES, LONG, UNMEASURED, UNREADABLE]:
            if draw.random() < 0.15:
                requests.insert(draw.randint(0, len(requests)), bad)
    if fault in ("poison", "stopper", "mixed"):
        for poison in POISONS[: draw.choice([1, 2, 6])]:
            runs[0].insert(draw.randint(0, len(runs[0])), poison)
    engine = FakeEngine(
        clock, names, seed=seed, speed=lambda node: unit, message_s=draw.choice([0, 0.5, 1.0]),
        restart_s=restart_s, spared=draw.choice([0.0, 0.5]), tells=draw.random() < 0.5,
        kills=POISONS if fault in ("poison", "mixed") else (), stops=POISONS if fault == "stopper" else (),
    )  # fmt: skip
    lasts_s = unit * count / len(names) / settings.max_requests
    return Scenario(
        seed, fault, engine, clock, settings, runs, plan_fault(fault, engine, draw, len(runs), lasts_s),
        draw.random() < 0.2, draw.choice([(0.0,), (0.0, 0.1, 3.0)]),
    )  # fmt: skip


def plan_fault(fault, engine, draw, runs, lasts_s):
    """Plans what strikes from outside; returns what innocents may end with for it."""
    names, when = list(engine.nodes_now), draw.uniform(0, lasts_s)
    victim, unit = draw.choice(names), engine.speed("a")
    if fault in ("kill", "kill twice", "mixed"):
        engine.at(when, lambda: engine.kill(victim))
    if fault == "kill twice":
        engine.at(when + draw.uniform(0, 1), lambda: engine.kill(draw.choice(names)))
    if fault in ("stop", "wake", "mixed"):
        engine.at(when, lambda: engine.stop(victim))
    if fault in ("wake", "mixed"):
        engine.at(when + draw.uniform(1, 4), lambda: engine.stop(victim, stopped=False))
    if fault == "slow":
        engine.speed = lambda node: draw.choice([1.0, 3.0]) if node == victim else unit
    if fault in ("silent", "silent long", "mixed"):
        engine.at(when, lambda: setattr(engine, "silent", True))
        if draw.random() < 0.5:
            engine.at(when, engine.disconnect)
        lasts_s = 5.0 if fault == "silent long" else draw.uniform(0.5, 1.7)
        engine.at(when + lasts_s, lambda: setattr(engine, "silent", False))
    if fault in ("flaky", "mixed"):
        engine.flaky = 0.1
    gone = NO_NODES if len(names) == 1 or engine.restart_s is None else None
    alone = NO_NODES if len(names) == 1 else None
    return {
        "none": None, "kill": alone if engine.restart_s is None else None, "kill twice": f"{LOST}|{NO_NODES}",
        "stop": alone, "wake": alone, "silent": None, "slow": f"{LOST}|{NO_NODES}" if alone else None,
        "silent long": NO_NODES, "poison": gone if runs == 1 else f"{LOST}|{NO_NODES}", "flaky": LOST,
    }.get(fault, f"{LOST}|{NO_NODES}")  # fmt: skip


def source(scene, requests, delivered):
    """Yields requests, at most a window ahead of those delivered; may be slow, and may raise in the end."""
    for number, request in enumerate(requests):
        assert number < len(delivered) + scene.settings.window, "read too far ahead"
        scene.clock.now += scene.engine.random.choice([0, 0, 0.04])
        yield request
    if scene.raising_source:
        raise OSError("the source broke")


def consume(scene):
    """Runs all of a scenario's dispatches, interleaved, with pauses of the consumer; returns the answers of each."""
    scene.reports = [Report() for _ in scene.runs]
    answers = [[] for _ in scene.runs]
    streams = [
        dispatch(source(scene, requests, found), answer, scene.engine, scene.settings, report=report)
        for requests, found, report in zip(scene.runs, answers, scene.reports, strict=True)
    ]
    left = list(range(len(streams)))
    while left:
        run = scene.engine.random.choice(left)
        try:
            answers[run].append(next(streams[run]))
            for _ in range(round(10 * scene.engine.random.choice(scene.patience_s))):
                scene.engine.advance(0.1)
        except StopIteration:
            assert not scene.raising_source, "the source's error was lost"
            left.remove(run)
        except OSError as error:
            assert str(error) == "the source broke"
            left.remove(run)
    return answers


def check(scene, requests, answers, report):
    """One answer or one named error for each request, in order, and the innocents' answers are right."""
    assert [a.id for a in answers] == list(range(len(requests)))
    assert (report.answers, report.errors) == (
        sum(a.error is None for a in answers),
        sum(bool(a.error) for a in answers),
    )
    assert sum(report.per_node.values()) == len(requests)
    assert report.lost_nodes <= {"none": 0, "silent": 0, "flaky": 0, "kill": 1, "stop": 1, "wake": 2}.get(
        scene.fault, 99
    )
    for a, request in zip(answers, requests, strict=True):
        if isinstance(request, Unsendable):
            expected = r"NotSent: TypeError: nobody can send this"
        elif request in POISONS:
            expected = f"{LOST}|{NO_NODES}"
        else:
            expected = OWN_ERRORS.get(request)
        late = LATE if scene.settings.deadline_s < math.inf else None
        allowed = "|".join(words for words in (expected, scene.allowed, late) if words)
        if a.error is None:
            assert expected is None and a.value == 2 * request, (a, request)
        else:
            assert allowed and re.fullmatch(allowed, a.error, re.DOTALL), (a, request)


def explore(seed):
    """Runs the scenario of a seed; returns its interleaving: who was sent what, and in which order outcomes came."""
    scene = scenario(seed)
    try:
        answers = consume(scene)
        for requests, found, report in zip(scene.runs, answers, scene.reports, strict=True):
            check(scene, requests, found, report)
        assert scene.engine.complaints == [], "a suspect shared its node"
        times = Counter(scene.engine.executed)
        most = (3 + scene.settings.max_losses) * len(scene.runs)
        assert all(number <= most for number in times.values()), times
    except Exception as error:
        raise AssertionError(f"seed {seed} ({scene.fault}): {error!r}\n{scene.runs}\n{scene.engine.trace}") from error
    return (scene.fault, *scene.engine.trace)


@pytest.fixture(autouse=True)
def simulated_time(monkeypatch):
    patch_clock(monkeypatch.setattr)


def patch_clock(setattr_):
    """The dispatcher's clock is that of whichever scenario was drawn last."""
    original, newest = Clock.__init__, []

    def remember(self):
        original(self)
        newest[:] = [self]

    setattr_(Clock, "__init__", remember)
    setattr_(time, "monotonic", lambda: newest[0].now if newest else 0.0)


def test_dispatch_keeps_its_word_in_hundreds_of_interleavings():
    with unchecked():
        assert len({explore(seed) for seed in range(300)}) > 250


@pytest.mark.slow
def test_dispatch_keeps_its_word_in_ten_thousand_interleavings():
    found, seed = set(), 1000
    with unchecked():
        while len(found) < 10_000:
            found.add(explore(seed))
            seed += 1
    print(f"{len(found)} interleavings of {seed - 1000} seeds")


if __name__ == "__main__":
    patch_clock(setattr)
    print(*explore(int(sys.argv[1])), sep="\n")
