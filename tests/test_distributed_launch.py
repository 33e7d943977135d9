import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
import torch
from waiting import PATIENCE_S, wait_until

from labutils.distributed import launch as module
from labutils.distributed.launch import RankError, Tail, end, environment, launch, require_address, results
from labutils.distributed.rank import resolve

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")


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
        ({"nnodes": 2, "rdzv": "127.0.0.1:1"}, "with nnodes > 1 all machines must name the same device.*; got 'auto'"),
        *[
            ({"nnodes": 2, "device": "cpu", "rdzv": rdzv}, f"rdzv must read 'host:port'.*; got '{rdzv}'")
            for rdzv in ("10.0.0.1", ":29500", "10.0.0.1:", "10.0.0.1:x", "10.0.0.1:-1", "10.0.0.1:65536")
        ],
    ],
)
def test_launch_refuses_what_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        launch(**{"target": "rank_tasks:rank_and_sum", "nproc": 2} | settings)


def test_require_address_names_a_busy_port():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"rdzv must name a free port of this machine; got '{address}'"):
            launch("rank_tasks:rank_and_sum", 2, nnodes=2, device="cpu", rdzv=address)
        require_address(address, free=False)  # for the machines that join
    require_address(address, free=True)


def test_a_network_interface_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME must name one of .*; got 'eth77'"):
        launch("rank_tasks:rank_and_sum", 1, nnodes=2, node_rank=1, device="cpu", rdzv="10.0.0.1:29500")


def test_gloo_and_nccl_stay_on_the_loopback_unless_machines_are_several():
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for rdzv in (None, "127.0.0.1:29500"):
        assert {environment(rdzv)[name] for name in names} <= {"lo", "lo0"}
    assert [environment("10.0.0.1:29500").get(name) for name in names] == [os.environ.get(name) for name in names]


def leave(folder, rank, ending, value):
    (folder / f"{rank}.{ending}").write_bytes(pickle.dumps(value))


def test_results_miss_a_rank_that_ended_well_and_sent_nothing(tmp_path):
    for rank in (10, 9):
        (tmp_path / f"{rank}.pid").write_text("1")
        leave(tmp_path, rank, "result", f"from {rank}")
    assert results(tmp_path, 0, "") == ["from 9", "from 10"]
    (tmp_path / "9.result").unlink()
    with pytest.raises(RankError, match="rank 9 ended with exit code 0 before it sent a result") as info:
        results(tmp_path, 0, "")
    assert info.value.rank == 9


def test_results_blame_the_first_rank_of_the_last_attempt(tmp_path):
    leave(tmp_path, 0, "error", (0, 1.0, "of the first attempt"))
    leave(tmp_path, 1, "error", (-1, 3.0, "an echo"))
    leave(tmp_path, 2, "error", (-1, 2.0, "the cause"))
    with pytest.raises(RankError, match=r"rank 2 failed first:\nthe cause"):
        results(tmp_path, 1, "")


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_results_name_the_signal_even_one_without_a_name(tmp_path, number, name):
    table = f"  rank      : 1 (local_rank: 1)\n  exitcode  : -{number} (pid: 7)\n"
    with pytest.raises(RankError, match=f"rank 1 was killed by {name}"):
        results(tmp_path, 1, table)


def test_tail_keeps_the_end_of_an_endless_stream():
    read, write = os.pipe()
    tail = Tail(os.fdopen(read, "rb"))
    with os.fdopen(write, "wb") as stream:
        stream.write(b"x" * 10**6 + "the end é".encode())
    found = tail.text()
    assert found.startswith(f"[{10**6 + 10 - 2**16} bytes of output left out]\nxxx") and found.endswith("the end é")
    assert len(tail.kept) == 2**16


def test_end_ends_the_agent_and_hides_no_error_where_it_may_not_look(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "children", refuse)
    monkeypatch.setattr(module, "GRACE_S", 0.2)
    agent = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE)
    end(agent, tmp_path)
    assert not psutil.pid_exists(agent.pid) and (tmp_path / "ended").exists()


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
    environ["TMPDIR"] = str(folder)
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
    wait_until(lambda: not list(tmp_path.glob("ranks-*")), f"a folder outlived {number.name}")


@pytest.mark.slow
def test_a_rank_that_leaves_without_a_word_is_an_error():
    with pytest.raises(RankError, match="rank 0 ended with exit code 0 before it sent a result"):
        launch("os:_exit", 1, {"status": 0})


@pytest.mark.slow
def test_what_ranks_print_is_bounded(capsys):
    assert launch("rank_tasks:prints", 2, {"lines": 20_000}) == [20_000, 20_000]
    printed = capsys.readouterr().out
    assert len(printed) < 2**16 + 100 and "bytes of output left out]" in printed.splitlines()[0]
    assert printed.endswith("line 19999\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_on_a_gpu_find_what_ranks_on_the_cpu_find():
    """One GPU is enough: NCCL refuses two ranks on one."""
    for target, args in TARGETS.items():
        on_cpu, on_gpu = (launch(target, 1, args, device=device)[0] for device in ("cpu", "cuda"))
        torch.testing.assert_close(comparable(on_gpu), comparable(on_cpu), atol=1e-3, rtol=0)


TARGETS = {
    "labutils.course.bench.ranks:hello": None,
    "labutils.course.bench.ranks:four_ranks": {"pace_s": 0.0, "counts": (1, 2)},
    "labutils.course.bench.ranks:two_ranks": {
        "name": "lablm",
        "token_ids": torch.arange(8).view(2, 4) + 5,
        "new_tokens": 2,
        "links": {"none": None},
        "repeats": 1,
    },
}


def comparable(found):
    """What must not differ between devices: tensors, tokens and counts, but neither times nor the kernel's bytes."""
    found = {name: value for name, value in found.items() if name not in ("times", "loopback", "skipped")}
    if "over" in found:
        found["over"] = {name: found["over"][name] for name in ("tokens", "sent")}
    return found


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
            found[number] = launch("rank_tasks:address_family", 2, nnodes=2, node_rank=number, device="cpu", rdzv=rdzv)

    threads = [threading.Thread(target=node, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everyone = sorted(rank for results in found.values() for _, rank, _ in results)
    assert everyone == [0, 1, 2, 3] and all(size == 4 for results in found.values() for *_, size in results)
    assert len({group for group, *_ in found[0]}) == 1 and found[0][0][0] != found[1][0][0]
