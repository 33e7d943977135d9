"""`dispatch` on an engine of plain objects, whose faults come when a test says so; Dask's own are elsewhere."""

import os
import subprocess
import sys
from collections import deque
from itertools import count

import psutil
import pytest

from labutils.distributed import dispatch as module
from labutils.distributed.dispatch import Report, Settings, dispatch
from labutils.distributed.work import answer_batch, current_node
from labutils.measurement.resources import peak_memory


class PlainEngine:
    """Nodes that answer in this process, one batch for each look; `speeds` says how many looks a batch takes."""

    def __init__(self, nodes=("a", "b"), *, speeds=None, kills=(), stops=()):
        self.addresses = {node: f"{node}#0" for node in nodes}
        self.queues = {node: deque() for node in nodes}
        self.speeds, self.handles = speeds or {}, count()
        self.kills, self.stops = set(kills), set(stops)
        self.stopped, self.worked, self.born = set(), dict.fromkeys(nodes, 0), count(1)
        self.returns, self.forgotten, self.most_held = True, [], 0

    def nodes(self):
        return dict(self.addresses)

    def submit(self, node, address, function, payloads):
        handle = next(self.handles)
        if self.addresses.get(node) == address:
            self.queues[node].append((handle, function, payloads))
        self.most_held = max(self.most_held, sum(len(p) for q in self.queues.values() for *_, p in q))
        return handle

    def finished(self, timeout_s):
        found = []
        for node, queue in self.queues.items():
            self.worked[node] += 1
            if not queue or node in self.stopped or self.worked[node] % self.speeds.get(node, 1):
                continue
            handle, function, payloads = queue[0]
            if self.kills & set(payloads):
                self.kill(node)
            elif self.stops & set(payloads):
                self.stopped.add(node)
            else:
                queue.popleft()
                found.append((handle, answer_batch(function, payloads, node)))
        return found

    def kill(self, node):
        self.queues[node].clear()
        del self.addresses[node]
        if self.returns:
            self.addresses[node] = f"{node}#{next(self.born)}"

    def forget(self, handles):
        self.forgotten += handles


@pytest.fixture(autouse=True)
def time_by_looks(monkeypatch):
    """A second passes at every look at the clock: timeouts come after a number of steps, not of seconds."""
    ticks = count()
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))


def doubled(batch):
    if "bad" in batch:
        raise KeyError("bad")
    return [2 * x for x in batch]


def run(requests, engine, settings=None, function=doubled):
    report = Report()
    return list(dispatch(requests, function, engine, settings, report=report)), report


@pytest.mark.parametrize("policy", ["pull", "static", "weighted"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 57])
def test_dispatch_equals_the_single_process_in_order(policy, size):
    settings = Settings(policy=policy, rates={"a": 1, "b": 2, "c": 5}, max_requests=4, window=16)
    answers, report = run(range(size), PlainEngine("abc"), settings)
    assert [(a.id, a.value, a.error) for a in answers] == [(i, 2 * i, None) for i in range(size)]
    assert (report.answers, report.errors, report.retries, report.duplicates) == (size, 0, 0, 0)
    assert sum(report.per_node.values()) == size


def test_policies_share_out_as_they_say():
    slow = {"a": 1, "b": 1, "c": 8}
    _, pull = run(range(90), PlainEngine("abc", speeds=slow))
    _, static = run(range(90), PlainEngine("abc", speeds=slow), Settings(policy="static"))
    weighted = Settings(policy="weighted", rates={"a": 8, "b": 8, "c": 1})
    _, by_rate = run(range(85), PlainEngine("abc", speeds=slow), weighted)
    assert static.per_node == {"a": 30, "b": 30, "c": 30}
    assert by_rate.per_node == {"a": 40, "b": 40, "c": 5}
    assert pull.per_node["c"] < 15 and pull.per_node["a"] > 35


def test_a_raising_request_is_one_named_error_and_spoils_no_other():
    answers, report = run([1, "bad", 3, 4], PlainEngine(), Settings(max_requests=4))
    assert [(a.value, a.error) for a in answers] == [(2, None), (None, "KeyError: 'bad'"), (6, None), (8, None)]
    assert (report.answers, report.errors, report.retries) == (3, 1, 0)


def test_a_function_that_loses_answers_is_an_error_of_each_request():
    answers, _ = run([1, 2], PlainEngine(), Settings(max_requests=2), lambda batch: [])
    assert all(a.error == "ValueError: the function must answer each request of a batch; 0 for 1" for a in answers)


def test_an_answer_that_cannot_be_pickled_is_a_named_error():
    answers, _ = run([1, 2], PlainEngine(), Settings(max_requests=2), lambda batch: [lambda: 0 for _ in batch])
    assert all(a.value is None and "pickle" in a.error.lower() for a in answers)


def test_a_request_that_kills_nodes_is_given_up_and_the_others_answered():
    answers, report = run(range(30), PlainEngine(kills={7}), Settings(max_requests=4))
    assert [a.id for a in answers if a.error] == [7]
    assert answers[7].error == "NodeLost: the node ended (request 7 was alone on 2 nodes that failed)"
    assert [a.value for a in answers if not a.error] == [2 * i for i in range(30) if i != 7]
    assert report.lost_nodes == 3 and report.retries >= 4 and report.errors == 1


def test_a_lost_node_s_requests_run_elsewhere_and_only_its_first_batch_is_suspected():
    engine = PlainEngine(speeds={"b": 10**9})
    engine.returns = False
    requests = iter(range(12))

    def with_a_death():
        for request in requests:
            if request == 6:
                engine.kill("b")
            yield request

    answers, report = run(with_a_death(), engine, Settings(policy="static", window=8))
    assert [a.value for a in answers] == [2 * i for i in range(12)]
    assert report.lost_nodes == 1 and set(report.per_node) == {"a"}


def test_a_stopped_node_is_left_alone_and_its_late_answers_are_duplicates():
    engine = PlainEngine()
    engine.stopped = {"b"}
    awake = []

    def wakes_up(batch):
        if batch == [38] and not awake:
            awake.append(engine.stopped.clear())
        return doubled(batch)

    answers, report = run(range(40), engine, Settings(timeout_s=5, window=6), wakes_up)
    assert [a.value for a in answers] == [2 * i for i in range(40)]
    assert report.lost_nodes == 1 and report.retries == 2 and report.duplicates >= 1


def test_a_request_that_stops_nodes_takes_at_most_max_losses_of_them():
    answers, report = run(range(20), PlainEngine("abcd", stops={3}), Settings(timeout_s=5, max_requests=2))
    assert [a.id for a in answers if a.error] == [3] and "NodeStopped: no progress for 5 s" in answers[3].error
    assert report.lost_nodes == 3


def test_all_nodes_lost_is_an_error_for_each_request_that_is_left():
    engine = PlainEngine(kills={4})
    engine.returns = False
    answers, report = run(range(10), engine, Settings(timeout_s=5, window=4))
    assert [a.id for a in answers] == list(range(10))
    assert [a.value for a in answers[:4]] == [0, 2, 4, 6] and answers[9].error == "NoNodes: all nodes are lost"
    assert report.answers + report.errors == 10


def test_no_node_at_all_is_said_for_each_request():
    engine = PlainEngine(())
    answers, _ = run(range(3), engine, Settings(timeout_s=5))
    assert [a.error for a in answers] == ["NoNodes: all nodes are lost"] * 3


def test_requests_are_read_only_as_far_ahead_as_the_window():
    read, engine = [], PlainEngine()
    answers = dispatch((read.append(i) or i for i in range(1000)), doubled, engine, Settings(window=20))
    for expected in range(500):
        assert next(answers).id == expected
        assert len(read) <= expected + 1 + 20
    answers.close()
    assert len(read) < 530 and engine.most_held <= 20


def test_what_is_in_flight_is_forgotten_when_nobody_listens_any_more():
    engine = PlainEngine(speeds={"b": 10**9})
    answers = dispatch(range(100), doubled, engine, Settings(window=8))
    next(answers)
    answers.close()
    assert len(engine.forgotten) >= 2


def pass_a_million():
    """Prints how far the memory's peak rose, in bytes; run as a process of its own, where no shape is checked."""
    settings, report, before = Settings(max_requests=500, window=8000), Report(), psutil.Process().memory_info().rss
    with peak_memory() as peak:
        total = sum(a.value for a in dispatch(iter(range(10**6)), doubled, PlainEngine("abc"), settings, report=report))
    if (total, report.answers) != (999_999 * 1_000_000, 1_000_000):
        raise ValueError(f"a million answers of {999_999 * 1_000_000} in all are due; got {report.answers}, {total}")
    print(0 if peak.host_bytes is None else peak.host_bytes - before)


@pytest.mark.slow
def test_a_million_requests_pass_through_bounded_memory():
    code = "import test_distributed_dispatch as tests; tests.pass_a_million()"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60e6  # all answers at once would take over 200 MB


def test_batches_hold_similar_lengths_and_their_bound():
    seen = []
    settings = Settings(max_requests=8, max_tokens=12, length=len, window=64)
    texts = ["x" * (1 + 7 * i % 12) for i in range(30)]
    answers, _ = run(texts, PlainEngine(), settings, lambda batch: seen.append(batch) or batch)
    assert [a.value for a in answers] == texts
    assert all(len(batch) * max(map(len, batch)) <= 12 for batch in seen)


def test_progress_is_told_after_every_step_and_the_node_knows_its_name():
    told = []
    answers = dispatch(
        range(6),
        lambda batch: [current_node()] * len(batch),
        PlainEngine(),
        on_progress=lambda r: told.append(r.answers),
    )
    assert {a.value for a in answers} == {"a", "b"}
    assert told == sorted(told) and len(told) >= 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "random"}, "policy must be one of"),
        ({"policy": "weighted"}, "needs a positive rate for every node"),
        ({"policy": "weighted", "rates": {"a": 0.0}}, "needs a positive rate for every node"),
        ({"window": 0}, "must be positive"),
        ({"timeout_s": 0}, "must be positive"),
    ],
)
def test_settings_refuse_what_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_report_says_that_execution_is_at_least_once():
    report = Report(answers=3, retries=1)
    report.per_node.update(b=1, a=2)
    assert str(report) == (
        "3 answers, 0 errors, executed at least once: 1 retries, 0 duplicates; nodes lost 0; a 2, b 1"
    )
