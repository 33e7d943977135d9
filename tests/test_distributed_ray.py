"""The same `dispatch` on Ray (the extra `cluster`), installed beside the environment where it does not stand in it."""

import contextlib
import importlib.util
import os
import signal
import sys
from types import SimpleNamespace

import psutil
import pytest
from aside import install_aside

from labutils.distributed import ray_engine
from labutils.distributed.dispatch import Report, Settings, dispatch


def test_a_cluster_beyond_this_machine_needs_tls(monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(ValueError, match=r"Ray needs RAY_USE_TLS=1 and certificates; got '10.0.0.7:6379' without"):
        ray_engine.ray_cluster(2, address="10.0.0.7:6379").__enter__()


def test_a_cluster_without_tokens_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="open to all without tokens; got RAY_AUTH_MODE='disabled'"):
        ray_engine.ray_cluster(2).__enter__()


def test_a_start_that_fails_leaves_nothing_running(monkeypatch):
    calls = []

    def init(**_):
        calls.append("init")
        raise RuntimeError("no start")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown")))
    with pytest.raises(RuntimeError, match="no start"):
        ray_engine.ray_cluster(2).__enter__()
    assert calls == ["init", "shutdown"]


@pytest.fixture(scope="module")
def ray_stands(tmp_path_factory):
    """Ray in this process and in those it starts; what it shares with the environment is the environment's own."""
    if importlib.util.find_spec("ray") is not None:
        yield
        return
    if sys.platform != "linux" or sys.version_info[:2] > (3, 13):
        pytest.skip("Ray's own build for this system was never tried here: pip install 'ray>=2.60'")
    folder = tmp_path_factory.mktemp("ray")
    install_aside(folder, ["ray==2.60.0", "protobuf==7.36.2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)])))
        yield


def patient_cluster(stack, attempts=4):
    """Two actors; Ray's own start has 30 s, which an overloaded machine does not always keep, so it may begin again."""
    for attempt in range(attempts):
        try:
            return stack.enter_context(ray_engine.ray_cluster(2))
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts - 1:
                raise


@pytest.fixture
def cluster(ray_stands):
    """Two actors and their processes' ids, by node; whatever a test stopped goes on afterwards, and ends."""
    with contextlib.ExitStack() as stack:
        engine = patient_cluster(stack)
        first = dispatch(range(8), lambda batch: [os.getpid()] * len(batch), engine, Settings(policy="static"))
        pids = {answer.node: answer.value for answer in first}
        assert set(pids) == {"node-0", "node-1"}
        yield engine, pids
    left = [process for process in psutil.process_iter() if process.pid in pids.values()]
    assert psutil.wait_procs(left, timeout=30)[1] == [], "an actor outlives its cluster"


def run(engine, requests, function, **settings):
    report = Report()
    return list(dispatch(requests, function, engine, Settings(**settings), report=report)), report


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["pull", "static"])
def test_dispatch_on_ray_survives_raising_and_killing_requests(cluster, policy):
    engine, _ = cluster

    def careless(batch):
        if 7 in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        if 9 in batch:
            raise KeyError("nine")
        return [2 * x for x in batch]

    answers, _ = run(engine, range(30), careless, policy=policy, max_requests=4)
    assert [a.id for a in answers if a.error] == [7, 9]
    assert "alone on 2 nodes that failed" in answers[7].error and answers[9].error == "KeyError: 'nine'"
    assert [a.value for a in answers if not a.error] == [2 * i for i in range(30) if i not in (7, 9)]


@pytest.mark.slow
def test_no_request_and_fewer_requests_than_nodes_on_ray(cluster):
    assert run(cluster[0], [], lambda batch: batch)[0] == []
    assert [a.value for a in run(cluster[0], [5], lambda batch: [2 * x for x in batch])[0]] == [10]


@pytest.mark.slow
def test_a_node_that_dies_at_work_is_replaced_on_ray(cluster, tmp_path):
    engine, pids = cluster
    died = tmp_path / "died"

    def dies_once(batch):
        if os.getpid() == pids["node-0"] and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [2 * x for x in batch]

    answers, report = run(engine, range(20), dies_once, policy="static")
    assert [a.value for a in answers] == [2 * i for i in range(20)]
    assert died.exists() and report.lost_nodes == 1 and report.retries >= 1


@pytest.mark.slow
def test_a_stopped_node_is_worked_around_on_ray(cluster):
    engine, pids = cluster
    os.kill(pids["node-0"], signal.SIGSTOP)
    try:
        answers, report = run(engine, range(12), lambda batch: [2 * x for x in batch], timeout_s=5)
    finally:
        os.kill(pids["node-0"], signal.SIGCONT)
    assert [a.value for a in answers] == [2 * i for i in range(12)]
    assert report.lost_nodes == 1


@pytest.mark.slow
def test_all_nodes_stopped_is_an_error_for_each_request_on_ray(cluster):
    engine, pids = cluster
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    answers, report = run(engine, range(6), lambda batch: batch, timeout_s=3)
    assert [a.error for a in answers] == ["NoNodes: all nodes are lost"] * 6
    assert report.lost_nodes == 2  # left stopped: the fixture sees them end all the same
