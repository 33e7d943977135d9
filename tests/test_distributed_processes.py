"""What plain processes as an engine do of their own; the faults that every engine meets are elsewhere."""

import os
import signal
import sys
import time
from functools import partial

import psutil
import pytest
from plain_processes import local_processes

from labutils.distributed.dispatch import Report, Settings, dispatch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def cluster():
    with local_processes(3) as engine:
        yield engine


@pytest.fixture
def engine(cluster):
    """The processes, all of them awake and answering: one that has just started needs a second or more."""
    list(dispatch(range(3), doubled, cluster, Settings(policy="static")))
    yield cluster
    for node in cluster.processes.values():
        if node.process.is_alive():
            os.kill(node.process.pid, signal.SIGCONT)


def doubled(batch):
    time.sleep(0.005)
    return [2 * x for x in batch]


def run(requests, engine, function=doubled, **settings):
    report = Report()
    return list(dispatch(requests, function, engine, Settings(**settings), report=report)), report


def pid_of(engine, name="node-0"):
    return engine.processes[name].process.pid


def poisoned(batch):
    if 5 in batch:
        os.kill(os.getpid(), signal.SIGKILL)
    return doubled(batch)


@pytest.mark.parametrize("policy", ["pull", "static"])
def test_a_request_that_kills_nodes_is_given_up_and_the_others_answered(engine, policy):
    answers, report = run(range(24), engine, poisoned, max_requests=3, policy=policy)
    assert [a.id for a in answers if a.error] == [5] and report.lost_nodes == 3
    assert answers[5].error == "NodeLost: the node ended (request 5 was alone on 2 nodes that failed)"
    assert [a.value for a in answers if not a.error] == [2 * i for i in range(24) if i != 5]


def test_a_stopped_node_holds_up_nobody_with_a_large_request_or_answer(engine):
    """Pipes hold 64 kB: whoever wrote to, or read from, a stopped process directly would wait for it for ever."""
    os.kill(pid_of(engine), signal.SIGSTOP)
    answers, report = run([bytes(10**6)] * 6, engine, list, timeout_s=TIMEOUT_S)
    assert all(a.value == bytes(10**6) for a in answers) and report.lost_nodes == 1


def cannot_be_read():
    raise ImportError("not installed on this node")


class LocalFunction:
    def __reduce__(self):
        return cannot_be_read, ()


def test_a_function_that_nodes_cannot_read_is_a_named_error_of_each_request(engine):
    answers, report = run(range(2), engine, LocalFunction())
    assert all("ImportError: not installed on this node" in a.error for a in answers) and report.lost_nodes == 0


def test_no_process_outlives_its_engine_not_even_a_stopped_or_busy_one():
    with local_processes(2) as engine:
        pids = [pid_of(engine, name) for name in engine.processes]
        busy = dispatch(range(2), partial(map, time.sleep), engine)
        busy.close()
        os.kill(pids[0], signal.SIGSTOP)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(ValueError, match="an engine needs at least 1 node; got 0"):
        local_processes(0).__enter__()
