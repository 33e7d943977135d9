"""The same faults on plain processes, Dask and Ray: nodes killed, stopped, slow, a lost scheduler, hostile requests."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from compileall import compile_dir
from functools import partial
from pathlib import Path

import pytest
from aside import install_aside
from plain_processes import local_processes
from waiting import PATIENCE_S, said, wait_until

from labutils.distributed.dispatch import Report, Settings, dispatch
from labutils.distributed.work import current_node

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
TIMEOUT_S, COUNT = 3.0, 60
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "slow": None}
RATES = {"node-0": 1, "node-1": 2, "node-2": 3}
SILENT = "NoNodes: ConnectionError: the scheduler does not answer"
over_windows = pytest.mark.parametrize(
    "window", [12, *(pytest.param(size, marks=pytest.mark.slow) for size in (COUNT, 200))]
)
over_policies = pytest.mark.parametrize("policy", ["pull", "static", "weighted"])


def our_path():
    """What other programs need to import the functions of this module."""
    return os.pathsep.join(path for path in sys.path if path)


def dask_nodes(stack):
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    from labutils.distributed.dask_engine import local_cluster

    return stack.enter_context(local_cluster(3))


@pytest.fixture(scope="module")
def ray_stands(tmp_path_factory):
    """Ray in this process and in those it starts; what it shares with the environment is the environment's own."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("ray") is None:
            if sys.platform != "linux" or sys.version_info[:2] > (3, 13):
                pytest.skip("Ray's own build for this system was never tried here: pip install 'ray>=2.60'")
            folder = tmp_path_factory.mktemp("ray")
            install_aside(folder, ["ray==2.60.0", "protobuf==7.36.2"])
            for part in ("", "_common", "_private", "autoscaler", "core", "dashboard", "util"):
                compile_dir(
                    folder / "ray" / part, maxlevels=10 if part else 0, quiet=2
                )  # its five programs start in time
            patch.setattr(sys, "path", [*sys.path, str(folder)])
        patch.setenv("PYTHONPATH", our_path())  # Ray's actors import our functions
        yield


def patient_cluster(stack, nodes, attempts=4):
    """Actors; Ray's own start has 30 s, which an overloaded machine does not always keep, so it may begin again."""
    from labutils.distributed.ray_engine import ray_cluster

    for attempt in range(attempts):
        try:
            return stack.enter_context(ray_cluster(nodes))
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts - 1:
                raise


STARTERS = {
    "plain": lambda stack: stack.enter_context(local_processes(3)),
    "dask": dask_nodes,
    "ray": lambda stack: patient_cluster(stack, 3),
}


@pytest.fixture(scope="module", params=["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dask", "ray"))])
def cluster(request):
    if request.param == "ray":
        request.getfixturevalue("ray_stands")
    with contextlib.ExitStack() as stack:
        yield STARTERS[request.param](stack)


def process_ids(batch):
    """Of this module, so that nodes have imported it before a short `timeout_s` counts."""
    return [os.getpid()] * len(batch)


@pytest.fixture
def nodes(cluster):
    """The engine with all its nodes awake, and their processes' ids; what a test stops goes on afterwards."""
    wait_until(lambda: len(cluster.nodes()) == 3, "the nodes did not come back")
    first = dispatch(range(12), process_ids, cluster, Settings(policy="static"))
    pids = {answer.node: answer.value for answer in first}
    yield cluster, pids
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def doubled(batch):
    time.sleep(0.005)
    return [2 * x for x in batch]


def held_by_one(path, batch):
    """`doubled`, but node-0 keeps what comes after the fourth answer: whatever strikes it finds it at work."""
    while batch[0] > 3 and current_node() == "node-0" and not os.path.exists(path):
        time.sleep(0.005)
    return doubled(batch)


def slow_on_one(batch):
    time.sleep(2 * TIMEOUT_S if current_node() == "node-0" else 0.005)
    return [2 * x for x in batch]


def struck(engine, strike, function=doubled, **settings):
    """`COUNT` requests; after the fourth answer something happens."""
    answers, report = [], Report()
    settings = {"timeout_s": TIMEOUT_S, "rates": RATES, **settings}
    for answer in dispatch(range(COUNT), function, engine, Settings(**settings), report=report):
        answers.append(answer)
        if answer.id == 3:
            strike()
    assert [answer.id for answer in answers] == list(range(COUNT))
    assert all(answer.value == 2 * answer.id for answer in answers if not answer.error)
    return [answer for answer in answers if answer.error], report


@over_windows
@pytest.mark.parametrize("fault", FAULTS)
@over_policies
def test_every_request_is_answered_whatever_strikes_a_node(nodes, policy, fault, window, tmp_path):
    engine, pids = nodes
    function = slow_on_one if fault == "slow" else partial(held_by_one, tmp_path / "struck")

    def strike():
        if fault != "slow":
            os.kill(pids["node-0"], FAULTS[fault])
        (tmp_path / "struck").touch()

    errors, report = struck(engine, strike, function, policy=policy, window=window)
    assert errors == [] and report.answers == COUNT and report.lost_nodes >= 1


def nobody_can_read():
    raise ValueError("nobody can read this")


class Unreadable:
    def __reduce__(self):
        return nobody_can_read, ()


def test_each_hostile_request_has_an_error_of_its_own_and_its_neighbours_an_answer(nodes):
    def answer(batch):
        if "raises" in batch:
            raise KeyError("raises")
        if "kills" in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return [Unreadable() if x == "unreadable" else x for x in batch]

    def source():
        yield from ("a", "raises", "long", "kills", threading.Lock(), "b", "unreadable", "unmeasured", "c")
        raise OSError("the source broke")

    def length(request):
        return {"long": 99, "unmeasured": None}.get(request, 1) if isinstance(request, str) else 1

    settings = Settings(max_requests=4, max_tokens=50, length=length, timeout_s=20)
    answers = []
    with pytest.raises(OSError, match="the source broke"):
        answers.extend(dispatch_into(answers, source(), answer, nodes[0], settings))
    errors = {a.id: a.error for a in answers if a.error}
    assert [a.value for a in answers if not a.error] == ["a", "b", "c"] and len(answers) == 9
    words = {1: "KeyError: 'raises'", 2: "must fit max_tokens=50; got 99", 3: "request 3 was alone on 2 nodes"}
    words |= {4: "NotSent: TypeError", 6: "Unreadable answer: ValueError", 7: "NotSent: TypeError"}
    assert errors.keys() == words.keys() and all(words[i] in errors[i] for i in words), errors


def dispatch_into(answers, *arguments):
    """Appends as `dispatch` yields, so that a source's error leaves what came before it."""
    for answer in dispatch(*arguments):
        answers.append(answer)
    return ()


def test_two_runs_share_one_engine(nodes):
    first, second = (dispatch(range(40), doubled, nodes[0], Settings(timeout_s=20)) for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    assert [(a.value, b.value) for a, b in pairs] == [(2 * i, 2 * i) for i in range(40)]


def test_a_live_source_is_answered_as_it_comes(nodes):
    answered = threading.Event()

    def users():
        yield 1
        assert answered.wait(PATIENCE_S), "the first user was never answered"
        yield 2

    answers = dispatch(users(), doubled, nodes[0], Settings(live=True))
    assert next(answers).value == 2
    answered.set()
    assert [a.value for a in answers] == [4]


def test_all_nodes_stopped_is_a_named_error_for_each_request(nodes):
    engine, pids = nodes
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    answers = list(dispatch(range(6), doubled, engine, Settings(timeout_s=0.5), report=(report := Report())))
    assert [a.error for a in answers] == ["NoNodes: all nodes are lost"] * 6 and report.lost_nodes == 3


@pytest.fixture
def programs(tmp_path):
    """A Dask cluster of programs of their own, as on other machines: its engine and its scheduler's process id."""
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    from labutils.distributed.dask_engine import connect

    environ = os.environ | {"PYTHONPATH": our_path()}
    quiet = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    started = []

    def start(module, *options):
        with (tmp_path / f"{module}{len(started)}.log").open("wb") as log:
            command = [sys.executable, "-m", f"distributed.cli.{module}", *quiet, *options]
            started.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=tmp_path))

    try:
        start("dask_scheduler", "--port", "0", "--scheduler-file", "where")
        for number in range(2):
            start("dask_worker", "--scheduler-file", "where", "--name", f"node-{number}", "--no-nanny")
        wait_until(lambda: said(tmp_path / "where").endswith("}"), "the scheduler did not start")
        with connect(json.loads(said(tmp_path / "where"))["address"]) as engine:
            wait_until(lambda: len(engine.nodes()) == 2, "the nodes did not join")
            list(dispatch(range(8), doubled, engine, Settings(policy="static")))  # imports, which take seconds
            yield engine, started[0].pid
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
@over_windows
@over_policies
def test_a_killed_scheduler_leaves_each_request_an_answer_or_its_name(programs, policy, window):
    engine, scheduler = programs
    errors, report = struck(engine, lambda: os.kill(scheduler, signal.SIGKILL), policy=policy, window=window)
    assert {answer.error for answer in errors} == {SILENT} and report.lost_nodes == 0


@pytest.mark.slow
@over_policies
def test_a_stopped_scheduler_that_wakes_in_time_costs_nothing_but_time(programs, policy):
    engine, scheduler = programs

    def pause():
        os.kill(scheduler, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, [scheduler, signal.SIGCONT]).start()

    for window in (12, COUNT, 200):
        errors, report = struck(engine, pause, policy=policy, window=window, timeout_s=20)
        assert errors == [] and report.lost_nodes == 0
        errors, _ = struck(engine, lambda: os.kill(scheduler, signal.SIGSTOP), policy=policy, window=window)
        assert {answer.error for answer in errors} == {SILENT}
        os.kill(scheduler, signal.SIGCONT)


RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after so long Ray ends who uses it, where the engine allows that


def ray_program(*arguments, attempts=4):
    """The rows that one of `ray_programs` prints, and how it ended."""
    program = [sys.executable, str(Path(__file__).with_name("ray_programs.py")), *arguments]
    environ = os.environ | {"PYTHONPATH": our_path()} | ({RECONNECT: "5"} if "without_gcs" in arguments else {})
    for _ in range(attempts):
        ended = subprocess.run(program, env=environ, capture_output=True, text=True, timeout=300)
        if "imed out" not in ended.stderr:
            break
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert ended.returncode == 0, f"ended with {ended.returncode} after {rows}: {ended.stderr[-2000:]}"
    return rows


@pytest.mark.slow
@over_policies
def test_ray_without_its_scheduler_answers_every_request(ray_stands, policy):
    *runs, alone, last = ray_program("without_gcs", policy, "10")
    assert [row["name"].partition(",")[0] for row in runs[::3]][:3] == ["woken", "stopped", "killed"]
    assert all(row["kept"] and row["errors"] == [] and row["answers"] == 60 for row in runs)
    assert [row["lost"] for row in runs] == [0] * 10 + [1] and runs[-1]["name"] == "a node as well"
    assert alone["kept"] and alone["errors"] == ["NoNodes: all nodes are lost"] and last == {"name": "closed"}


@pytest.mark.slow
def test_ray_spreads_over_machines_and_gives_each_node_its_gpu(ray_stands):
    without, with_gpus = ray_program("two_nodes")
    for row in (without, with_gpus):
        assert [name for name, *_ in row["places"]] == ["node-0", "node-1"]
        assert len({machine for _, machine, _ in row["places"]}) == 2
    assert {gpus for *_, gpus in with_gpus["places"]} == {"0"}  # each machine's own first one
