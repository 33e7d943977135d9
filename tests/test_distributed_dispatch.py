"""`dispatch` on an engine of plain objects, whose faults come when a test says so; Dask's own are elsewhere."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from itertools import count

import psutil
import pytest

from labutils.distributed.dispatch import Report, Settings, dispatch
from labutils.distributed.work import NodeGone, answer_batch, current_node
from labutils.lab.widgets.dispatch import dispatch_widget, print_progress, show_progress
from labutils.measurement.resources import peak_memory

looks = [0.0]


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

    def session(self):
        return self

    def submit(self, node, address, function, payloads):
        handle, payloads = next(self.handles), [pickle.loads(payload) for payload in payloads]
        if self.addresses.get(node) == address:
            self.queues[node].append((handle, function, payloads))
        self.most_held = max(self.most_held, sum(len(p) for q in self.queues.values() for *_, p in q))
        return handle

    def finished(self, timeout_s):
        looks[0] += 1
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
                found.append((handle, answer_batch(function, [pickle.dumps(payload) for payload in payloads], node)))
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
    """A second passes whenever somebody waits for outcomes: timeouts come after a number of steps."""
    monkeypatch.setattr(time, "monotonic", lambda: looks[0])


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
    assert (report.answers, report.errors, report.retries) == (3, 1, 4)  # each of the four ran again by itself


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


def test_a_request_that_is_late_ends_with_its_name_and_the_others_go_on():
    engine = PlainEngine()
    engine.stopped = {"b"}
    answers, report = run(range(12), engine, Settings(policy="static", timeout_s=50, deadline_s=9))
    late = [a.id for a in answers if a.error]
    assert late and {answers[i].error for i in late} == {"Late: no answer within 9 s"}
    assert [a.value for a in answers if not a.error] == [2 * i for i in range(12) if i not in late]
    assert report.lost_nodes == 0 and report.errors == len(late) == report.per_node["nowhere"]


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


@pytest.mark.parametrize(("problem", "errors"), [(NodeGone("b has ended"), 0), (OSError("too large"), 1)])
def test_a_batch_that_is_never_sent_is_blamed_only_if_its_node_was_there(problem, errors):
    class Refusing(PlainEngine):
        refusals = 5

        def submit(self, node, address, function, payloads):
            if pickle.loads(payloads[0]) == 3 and self.refusals:
                self.refusals -= 1
                raise problem
            return super().submit(node, address, function, payloads)

    answers, report = run(range(6), Refusing())
    assert [a.value for a in answers if not a.error] == [2 * i for i in range(6) if i != 3 or not errors]
    assert (report.errors, bool(report.retries)) == (errors, bool(errors))
    assert not errors or answers[3].error == "OSError: too large (request 3 was alone on 2 nodes that failed)"


class Unsendable:
    def __reduce__(self):
        raise TypeError("stays here")


class Unreadable:
    def __reduce__(self):
        return int, ("x",)


@pytest.mark.parametrize("bad", [Unsendable(), "long", "unmeasured", "unreadable", "exits"])
def test_a_bad_request_is_a_named_error_and_the_others_are_answered(bad):
    def work(batch):
        if "exits" in batch:
            sys.exit("bye")
        return [Unreadable() if request == "unreadable" else request for request in batch]

    settings = Settings(max_requests=3, max_tokens=9, length=lambda r: {"long": 10, "unmeasured": "?"}.get(r, 1))
    answers, report = run([0, 1, bad, 3, 4], PlainEngine(), settings, work)
    assert [a.value for a in answers] == [0, 1, None, 3, 4] and report.errors == 1
    expected = {
        "long": "NotSent: ValueError: a request must fit max_tokens=9; got 10",
        "unmeasured": "NotSent: ValueError: invalid literal for int() with base 10: '?'",
        "unreadable": "Unreadable answer: ValueError: invalid literal for int() with base 10: 'x'",
        "exits": "SystemExit: bye",
    }
    assert answers[2].error == expected.get(bad, "NotSent: TypeError: stays here")


def test_a_function_that_cannot_be_sent_is_refused_before_anything_is_read():
    read = iter(range(3))
    with pytest.raises(ValueError, match="a function must be picklable to reach the nodes; got TypeError"):
        run(read, PlainEngine(), function=Unsendable())
    assert next(read) == 0


def test_a_source_that_raises_is_answered_as_far_as_it_was_read():
    def broken():
        yield from range(5)
        raise OSError("the file ended early")

    answers = dispatch(broken(), doubled, PlainEngine())
    assert [next(answers).value for _ in range(5)] == [0, 2, 4, 6, 8]
    with pytest.raises(OSError, match="the file ended early"):
        next(answers)


def test_a_live_source_gets_its_answers_before_its_next_request_comes():
    answered = threading.Event()

    def users():
        yield 1
        assert answered.wait(30), "the first user was never answered"
        yield 2

    answers = dispatch(users(), doubled, PlainEngine(), Settings(live=True, timeout_s=10**9))
    assert next(answers).value == 2
    answered.set()
    assert [a.value for a in answers] == [4]


def test_a_live_source_that_raises_and_one_that_nobody_reads_to_its_end():
    def broken():
        yield 1
        raise OSError("no more users")

    answers = dispatch(broken(), doubled, PlainEngine(), Settings(live=True, timeout_s=10**9))
    assert next(answers).value == 2
    with pytest.raises(OSError, match="no more users"):
        next(answers)
    before = threading.active_count()
    answers = dispatch(count(), doubled, PlainEngine(), Settings(live=True, timeout_s=10**9))
    assert next(answers).value == 0
    answers.close()
    limit = time.perf_counter() + 30
    while threading.active_count() > before:
        assert time.perf_counter() < limit, "the thread outlives its run"


def test_memory_is_bounded_in_bytes():
    sent, engine = [], PlainEngine(speeds={"a": 5, "b": 5})
    requests = (sent.append(i) or bytes(1000) for i in range(100))
    for answer in dispatch(requests, lambda batch: batch, engine, Settings(window_bytes=10_000)):
        assert len(sent) <= answer.id + 11  # the tenth reaches 10,000 bytes, for a pickle is longer than its content
    assert len(sent) == 100


def test_progress_ends_at_n_of_n_in_print_and_box(capsys):
    box = dispatch_widget(9)
    shows = [show_progress(9, box), print_progress(9, steps=3)]
    answers = dispatch(
        ["bad", *range(8)], doubled, PlainEngine(), on_progress=lambda report: [show(report) for show in shows]
    )
    assert [next(answers).id for _ in range(9)] == list(range(9))  # nobody asks for more
    line = box.children[0].value
    assert line.startswith("9 of 9 answered, 1 with an error") and sum(b.value for b in box.children[1:]) == 9
    assert capsys.readouterr().out.splitlines()[-1] == line


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
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"window_bytes": 0}, "window_bytes must be at least 1; got 0"),
        ({"timeout_s": 0}, "timeout_s must be positive; got 0"),
        ({"deadline_s": 0}, "deadline_s must be positive; got 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive; got nan"),
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
