"""`dispatch` on Dask distributed: processes that are really killed, stopped and restarted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from waiting import PATIENCE_S, said, wait_until

pytest.importorskip("distributed", reason="Dask distributed is not installed")

from labutils.distributed.dask_engine import connect, local_cluster, make_certificates
from labutils.distributed.dispatch import Report, Settings, dispatch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")


@pytest.fixture(scope="module")
def cluster():
    with local_cluster(3) as engine:
        yield engine


@pytest.fixture
def engine(cluster):
    """The cluster with all its nodes back."""
    wait_until(lambda: len(cluster.nodes()) == 3, "the nodes did not come back")
    return cluster


def doubled(batch):
    return [2 * x for x in batch]


def run(requests, engine, function=doubled, **settings):
    report = Report()
    return list(dispatch(requests, function, engine, Settings(**settings), report=report)), report


def pids(engine):
    return list(engine.client.run(os.getpid).values())


def listening(process):
    sockets = [c for p in [process, *process.children(recursive=True)] for c in p.net_connections()]
    return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]


def assert_doubled(answers, requests, but=()):
    assert [a.id for a in answers] == list(range(len(requests)))
    assert [a.id for a in answers if a.error] == list(but)
    assert [a.value for a in answers if not a.error] == [2 * x for x in requests if x not in but]


@pytest.mark.parametrize("policy", ["pull", "static", "weighted"])
def test_answers_equal_the_single_process_in_order(engine, policy):
    rates = {"node-0": 1, "node-1": 2, "node-2": 3}
    answers, report = run(range(50), engine, policy=policy, rates=rates, max_requests=4)
    assert_doubled(answers, range(50))
    assert (report.retries, report.lost_nodes) == (0, 0)


def test_no_request_and_fewer_requests_than_nodes(engine):
    assert run([], engine)[0] == []
    assert_doubled(run([21], engine)[0], [21])


def test_it_listens_on_the_loopback_alone(engine):
    found = listening(psutil.Process())
    assert len(found) >= 7 and set(found) == {"127.0.0.1"}


def test_a_raising_request_is_a_named_error(engine):
    def fails(batch):
        if 3 in batch:
            raise KeyError("three")
        return [2 * x for x in batch]

    answers, report = run(range(8), engine, fails, max_requests=8)
    assert_doubled(answers, range(8), but=[3])
    assert answers[3].error == "KeyError: 'three'" and report.lost_nodes == 0


def test_a_function_that_nodes_cannot_unpickle_is_a_named_error(engine):
    class Broken:
        def __reduce__(self):
            return eval, ("1 / 0",)

    broken = Broken()
    answers, _ = run(range(2), engine, lambda batch: [broken] and batch)
    assert all("ZeroDivisionError" in a.error or "deserial" in a.error.lower() for a in answers)


def test_a_request_that_kills_nodes_is_given_up_and_the_others_answered(engine):
    def poisoned(batch):
        if 5 in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return [2 * x for x in batch]

    answers, report = run(range(24), engine, poisoned, max_requests=3)
    assert_doubled(answers, range(24), but=[5])
    assert "request 5 was alone on 2 nodes that failed" in answers[5].error and report.lost_nodes == 3


def slowly(batch):
    time.sleep(0.05)
    return [2 * x for x in batch]


@pytest.mark.slow
def test_ten_times_a_node_dies_at_work_and_comes_back(engine, tmp_path):
    for number in range(10):
        wait_until(lambda: len(engine.nodes()) == 3, "the nodes did not come back")
        marker = tmp_path / str(number)

        def dies_once(batch, marker=marker):
            if 5 in batch and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return [2 * x for x in batch]

        answers, report = run(range(30), engine, dies_once, max_requests=2)
        assert_doubled(answers, range(30))
        assert report.lost_nodes == 1 and report.retries >= 2


@pytest.mark.slow
def test_a_stopped_node_is_worked_around_and_its_answers_come_late(engine):
    answers, report, stopped = [], Report(), pids(engine)[0]
    try:
        for answer in dispatch(range(400), slowly, engine, Settings(timeout_s=4, window=50), report=report):
            answers.append(answer)
            if answer.id == 3:
                os.kill(stopped, signal.SIGSTOP)
            if answer.id == 200:
                os.kill(stopped, signal.SIGCONT)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert_doubled(answers, range(400))
    assert report.lost_nodes == 1 and report.retries >= 1


@pytest.mark.slow
def test_all_nodes_lost_is_an_error_for_each_request_that_is_left():
    with local_cluster(2) as engine:
        answers = []
        for answer in dispatch(range(60), slowly, engine, Settings(timeout_s=4, window=20)):
            answers.append(answer)
            if answer.id == 3:
                engine.client.cluster.scale(0)
    assert [a.id for a in answers] == list(range(60))
    assert answers[0].value == 0 and answers[-1].error == "NoNodes: all nodes are lost"


@pytest.mark.slow
def test_no_node_outlives_its_cluster_not_even_a_stopped_one():
    with local_cluster(2) as engine:
        found = pids(engine)
        os.kill(found[0], signal.SIGSTOP)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in found), "a node outlived its cluster")


@pytest.mark.slow
def test_nodes_end_with_a_killed_kernel(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from labutils.distributed.dask_engine import local_cluster\n"
        "if __name__ == '__main__':\n"
        "    with local_cluster(2) as engine:\n"
        "        found = engine.client.run(os.getpid).values()\n"
        f"        Path({str(tmp_path / 'made')!r}).write_text(' '.join(map(str, found)))\n"
        f"        Path({str(tmp_path / 'made')!r}).rename({str(tmp_path / 'pids')!r})\n"
        "        time.sleep(3600)\n",
        encoding="utf-8",
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    kernel = subprocess.Popen([sys.executable, script], env=environ)
    wait_until((tmp_path / "pids").exists, "the cluster did not start")
    kernel.kill()
    kernel.wait()
    found = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in found), "nodes outlived their kernel")


def test_a_cluster_beyond_this_machine_needs_certificates():
    with pytest.raises(ValueError, match=r"needs TLS: give its certificates; got 'tcp://10.0.0.7:8786' without"):
        connect("tcp://10.0.0.7:8786").__enter__()
    with pytest.raises(ValueError, match="a cluster needs at least 1 node; got 0"):
        local_cluster(0).__enter__()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="the program openssl makes the certificates")
def test_dispatch_by_address_on_two_nodes_over_tls(tmp_path):
    """Scheduler and nodes as programs of their own, as on two machines; who has no certificate stays out."""
    from distributed import Client

    folder = make_certificates(tmp_path)
    assert (folder / "key.pem").stat().st_mode & 0o077 == 0
    flags = {"--tls-ca-file": "ca", "--tls-cert": "cert", "--tls-key": "key"}
    tls = [part for flag, role in flags.items() for part in (flag, str(folder / f"{role}.pem"))]
    quiet = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]  # its status pages listen everywhere by default
    started = []

    def start(module, *options):
        log = (tmp_path / f"{len(started)}.log").open("wb")
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", *options, *tls, *quiet]
        started.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path))

    try:
        start("distributed.cli.dask_scheduler", "--protocol", "tls", "--port", "0", "--scheduler-file", "where")
        wait_until(lambda: said(tmp_path / "where").endswith("}"), "the scheduler did not start")
        for name in ("first", "second"):
            start("distributed.cli.dask_worker", "--scheduler-file", "where", "--name", name, "--nthreads", "1")
        address = json.loads(said(tmp_path / "where"))["address"]
        assert address.startswith("tls://127.0.0.1:")
        with connect(address, certificates=folder) as engine:
            wait_until(lambda: set(engine.nodes()) == {"first", "second"}, "the nodes did not join")
            answers, report = run(range(40), engine, lambda batch: [time.sleep(0.05) or 2 * x for x in batch])
            assert_doubled(answers, range(40))
            assert set(report.per_node) == {"first", "second"}
        with pytest.raises((OSError, TimeoutError, RuntimeError, TypeError)):
            Client(address, timeout=5)
        assert {ip for p in started for ip in listening(psutil.Process(p.pid))} == {"127.0.0.1"}
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(PATIENCE_S)
