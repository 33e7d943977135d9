import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from labutils.distributed.launch import RankError, launch, require_free_port
from labutils.distributed.rank import resolve

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def no_rank_is_left():
    """After every test: no process of `labutils.distributed.rank` started by it runs on."""
    before = set(ranks())
    yield
    wait_until(lambda: not set(ranks()) - before, "ranks were left running")


def ranks():
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if "labutils.distributed.rank" in (process.info["cmdline"] or ()) and process.info["status"] != "zombie":
            yield process.pid


def wait_until(condition, problem):
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, problem
        time.sleep(0.1)


def test_launch_returns_results_in_rank_order_and_whole_lines_of_what_ranks_print(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    assert launch("rank_tasks:rank_and_sum", 2, {"offset": 10}) == [(0, 21), (1, 21)]
    assert sorted(capsys.readouterr().out.splitlines()) == ["rank 0 says hello", "rank 1 says hello"]


def test_launch_raises_the_failing_rank_s_own_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*raises_on.*KeyError: 'rank 1 lost its key'") as info:
        launch("rank_tasks:raises_on", 2, {"rank": 1})
    assert info.value.rank == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "no function"}, "target must read 'module:function'"),
        ({"nproc": 0}, "nproc and nnodes must be at least 1"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"device": "cuda", "nproc": 99}, "needs a GPU for each of nproc=99 ranks"),
        ({"nnodes": 2}, "rdzv='host:port' goes with nnodes > 1"),
        ({"nnodes": 2, "node_rank": 2, "rdzv": "127.0.0.1:1"}, "0 <= node_rank < nnodes"),
    ],
)
def test_launch_refuses_what_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        launch(**{"target": "rank_tasks:rank_and_sum", "nproc": 2} | settings)


def test_require_free_port_names_a_busy_one():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"rdzv must name a free port of this machine; got '{address}'"):
            launch("rank_tasks:rank_and_sum", 2, nnodes=2, rdzv=address)
    require_free_port(address)


def test_resolve_finds_a_nested_module():
    assert resolve("os.path:join") is os.path.join


@pytest.mark.slow
def test_four_ranks_listen_on_the_loopback_alone():
    found = launch("rank_tasks:listening_addresses", 4)
    assert len(found) == 4 and {address for addresses in found for address in addresses} == {"127.0.0.1"}


@pytest.mark.slow
def test_launch_names_the_rank_that_was_killed():
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL") as info:
        launch("rank_tasks:signals_itself", 2, {"rank": 1, "number": int(signal.SIGKILL)})
    assert info.value.rank == 1


@pytest.mark.slow
def test_launch_ends_a_stopped_rank_and_says_where_the_others_stood():
    with pytest.raises(TimeoutError, match=r"(?s)2 of 2 ranks had not finished.*rank 0 stood here"):
        launch("rank_tasks:signals_itself", 2, {"rank": 1, "number": int(signal.SIGSTOP)}, timeout_s=20)


def in_another_process(folder):
    call = f"launch('rank_tasks:sleeps_for_ever', 2, {{'pid_folder': {str(folder)!r}}})"
    code = f"from labutils.distributed.launch import launch; {call}"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    kernel = subprocess.Popen([sys.executable, "-c", code], env=environ, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(folder.glob("*.pid"))) == 2, "the ranks did not start")
    return kernel, [int(path.read_text()) for path in folder.glob("*.pid")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_the_kernel(tmp_path, number):
    kernel, pids = in_another_process(tmp_path)
    kernel.send_signal(number)
    kernel.wait(PATIENCE_S)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), f"ranks outlived {number.name}")


@pytest.mark.slow
def test_ten_restarts_end_well():
    results = launch("rank_tasks:succeeds_at_restart", 2, {"count": 10}, restarts=10, timeout_s=500)
    assert results == [(0, 3), (1, 3)]


@pytest.mark.slow
def test_two_nodes_meet_at_an_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        rdzv = f"127.0.0.1:{free.getsockname()[1]}"
    found = {}

    def node(number):
        with contextlib.suppress(Exception):
            found[number] = launch("rank_tasks:address_family", 2, nnodes=2, node_rank=number, rdzv=rdzv)

    threads = [threading.Thread(target=node, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everyone = sorted(rank for results in found.values() for _, rank, _ in results)
    assert everyone == [0, 1, 2, 3] and all(size == 4 for results in found.values() for *_, size in results)
    assert len({group for group, *_ in found[0]}) == 1 and found[0][0][0] != found[1][0][0]
