"""From a notebook to ranks, and back: start a function once per rank, return its results, leave no process behind.

`python -m torch.distributed.run` starts the ranks as processes of their own. Forking would be shorter and wrong: a fork
of a kernel whose torch has used threads hangs. Each rank watches its stdin and ends when that closes, so a killed
kernel, an interrupt, a timeout and a restart of the kernel leave nothing running.
"""

import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

import psutil

from labutils.lab.hosts import is_loopback

TARGET = re.compile(r"[\w.]+:\w+")
FAILED = re.compile(r"rank +: (\d+) .*\n\s+exitcode +: (-?\d+)")  # in torchrun's closing table
GRACE_S = 5.0
TAIL_BYTES = 2**16  # of what all ranks print
SIGNALS = {int(number): number.name for number in signal.Signals}  # real-time signals have no name


class RankError(RuntimeError):
    """A rank failed; `rank` is the first one that did, and the message holds its own traceback."""

    def __init__(self, rank: int | None, problem: str) -> None:
        super().__init__(problem)
        self.rank = rank


def launch(
    target: str,
    nproc: int,
    args: dict | None = None,
    *,
    timeout_s: float = 120,
    device: str = "auto",
    restarts: int = 0,
    nnodes: int = 1,
    node_rank: int = 0,
    rdzv: str | None = None,
) -> list:
    """Runs `module:function` in `nproc` processes that form one group, and returns their results in rank order.

    Args:
        target: Where the ranks find the function, such as "labutils.distributed.tasks:ranks_and_sum". It must be
            importable: a function that lives in a notebook cell is not.
        nproc: Ranks on this machine.
        args: Keyword arguments, the same for every rank; pickled.
        timeout_s: Seconds after which all ranks are ended.
        device: "cpu" (gloo), "cuda" (NCCL, one GPU a rank, and gloo for tensors on the CPU) or "auto": cuda where
            there are GPUs enough. Several machines must name it, for each would choose by its own GPUs.
        restarts: How often a failed group starts again from the beginning.
        nnodes: Machines. Each runs `launch` with the same `rdzv`, and gets the results of its own ranks.
        node_rank: This machine's number; number 0 holds the meeting point.
        rdzv: "host:port" of the meeting point, for several machines. This port and those that the ranks choose are
            open to whoever reaches the host: only for a private network, whose interface the variables
            GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name. On one machine ranks meet through a file and talk over
            the loopback alone.

    The end of what the ranks print, 64 kB of it, is printed when they have ended.

    Raises:
        ValueError: For a target, count or device that cannot be, or a busy port.
        RankError: When a rank raised, was killed, or ended without a result; the first one's traceback.
        TimeoutError: With the place where each unfinished rank stood.
    """
    backend = check_launch(target, nproc, device, nnodes, node_rank, rdzv)
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "args").write_bytes(pickle.dumps(args or {}))
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", f"--nnodes={nnodes}"]
        command += ["--monitor-interval=0.1", f"--max-restarts={restarts}", *meeting(folder, nnodes, node_rank, rdzv)]
        command += ["-m", "labutils.distributed.rank", target, name, backend]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        agent = subprocess.Popen(command, **pipes, env=environment(rdzv), start_new_session=True)
        printed, log = Tail(agent.stdout), Tail(agent.stderr)
        try:
            agent.wait(timeout_s)
        except subprocess.TimeoutExpired:
            end(agent, folder)
            raise TimeoutError(timeout_report(folder, nproc, timeout_s)) from None
        finally:  # also at KeyboardInterrupt
            end(agent, folder)
            print(printed.text(), end="")
        return results(folder, agent.returncode, log.text())


class Tail:
    """Reads a stream to its end in a thread of its own, and keeps the last `TAIL_BYTES` of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.kept, self.left_out = stream, b"", 0
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with self.stream:
            while block := self.stream.read1(TAIL_BYTES):
                self.kept += block
                self.left_out += max(0, len(self.kept) - TAIL_BYTES)
                self.kept = self.kept[-TAIL_BYTES:]

    def text(self) -> str:
        """Returns what was kept, after a line that says how much was not."""
        self.thread.join(GRACE_S)
        note = f"[{self.left_out} bytes of output left out]\n" if self.left_out else ""
        return note + self.kept.decode("utf-8", errors="replace")


def check_launch(target: str, nproc: int, device: str, nnodes: int, node_rank: int, rdzv: str | None) -> str:
    """Returns the backend, or says in one sentence what cannot be.

    Raises:
        ValueError: See `launch`.
    """
    import torch

    gpus = torch.cuda.device_count()
    if not TARGET.fullmatch(target):
        raise ValueError(f"target must read 'module:function'; got {target!r}")
    if nproc < 1 or nnodes < 1 or not 0 <= node_rank < nnodes:
        raise ValueError(f"nproc and nnodes must be at least 1 and 0 <= node_rank < nnodes; got {nproc}, {nnodes}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda" and gpus < nproc:
        raise ValueError(f"device='cuda' needs a GPU for each of nproc={nproc} ranks; got {gpus} GPUs: use 'cpu'")
    if (nnodes > 1) != (rdzv is not None):
        raise ValueError(f"rdzv='host:port' goes with nnodes > 1, and only with it; got nnodes={nnodes}, rdzv={rdzv!r}")
    if nnodes > 1 and device == "auto":
        raise ValueError("with nnodes > 1 all machines must name the same device, cpu or cuda; got 'auto'")
    if rdzv:
        require_address(rdzv, free=node_rank == 0)
    return "gloo" if device == "cpu" or gpus < nproc else "cpu:gloo,cuda:nccl"


def require_address(address: str, *, free: bool) -> None:
    """Refuses what is no "host:port" and, if it must be `free`, a port that somebody listens on already.

    Raises:
        ValueError: For another form, a busy port, or an address that must be free and is none of this machine's.
    """
    host, _, port = address.rpartition(":")
    if not (host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise ValueError(f"rdzv must read 'host:port', such as '10.0.0.1:29500'; got {address!r}")
    if not free:
        return
    try:
        with socket.create_server((host, int(port))):
            pass
    except OSError as error:
        raise ValueError(f"rdzv must name a free port of this machine; got {address!r} ({error.strerror})") from None


def meeting(folder: Path, nnodes: int, node_rank: int, rdzv: str | None) -> list[str]:
    """Returns torchrun's options for how its agents meet: through a file, or at an address."""
    if rdzv is None:
        return ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder / 'rdzv'}", "--rdzv-conf=store_type=file"]
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv}", "--rdzv-id=labutils"]
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if is_loopback(rdzv.rpartition(":")[0]):
        options.append("--local-addr=127.0.0.1")
    elif interface:  # otherwise torchrun tells the others this machine's name, which they may not know
        found = psutil.net_if_addrs()
        addresses = [a.address for a in found.get(interface, ()) if a.family == socket.AF_INET]
        if not addresses:
            raise ValueError(f"GLOO_SOCKET_IFNAME must name one of {', '.join(found)}; got {interface!r}")
        options.append(f"--local-addr={addresses[0]}")
    return [*options, f"--rdzv-conf=is_host={int(node_rank == 0)}"]


def environment(rdzv: str | None) -> dict[str, str]:
    """Returns what the ranks must find in their environment, each line against a trap."""
    environ = dict(os.environ)
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # a rank imports what its caller can
    environ["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS", "1")  # ranks share the cores
    environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # restarts over gloo hang on the shared one
    environ["PYTHONFAULTHANDLER"] = "1"
    if sys.platform == "win32":
        environ["USE_LIBUV"] = "0"
    elif rdzv is None or is_loopback(rdzv.rpartition(":")[0]):
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return environ


def end(agent: subprocess.Popen, folder: Path) -> None:
    """Ends the agent and every rank: asks by closing stdin, then kills what is stopped or stuck.

    It runs while other errors are on their way, so what cannot be ended hides none of them.
    """
    family = {}
    with contextlib.suppress(OSError):
        (folder / "ended").touch()  # ranks whose stdin closes without it have lost their caller
    with contextlib.suppress(psutil.Error):
        family[agent.pid] = psutil.Process(agent.pid)
        family |= {child.pid: child for child in family[agent.pid].children(recursive=True)}
    for file in folder.glob("*.pid"):  # ranks whose agent is dead have another parent now
        with contextlib.suppress(psutil.Error):
            rank = psutil.Process(int(file.read_text()))
            if str(folder) in rank.cmdline():
                family.setdefault(rank.pid, rank)
    agent.stdin.close()
    _, alive = psutil.wait_procs(family.values(), timeout=GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)
    with contextlib.suppress(subprocess.TimeoutExpired):
        agent.wait(GRACE_S)


def text(path: Path) -> str:
    """Returns a file's text, or none where there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def rank_of(path: Path) -> int:
    """Returns the rank that a file such as "3.result" belongs to."""
    return int(path.stem)


def results(folder: Path, returncode: int | None, log: str) -> list:
    """Returns what the ranks returned.

    Args:
        folder: Where they left it.
        returncode: The agent's.
        log: What the agent wrote to stderr.

    Raises:
        RankError: If one of them did not.
    """
    if returncode == 0:
        found = {rank_of(path): pickle.loads(path.read_bytes()) for path in folder.glob("*.result")}
        for rank in sorted({rank_of(path) for path in folder.glob("*.pid")} - set(found)):
            raise RankError(rank, f"rank {rank} ended with exit code 0 before it sent a result")
        return [found[rank] for rank in sorted(found)]
    for rank, code in [(int(rank), int(code)) for rank, code in FAILED.findall(log)]:
        if code < 0 and -code != signal.SIGTERM:  # SIGTERM is how the agent ends the others
            raise RankError(
                rank, f"rank {rank} was killed by {SIGNALS.get(-code, f'signal {-code}')}; it left no traceback"
            )
    errors = [(*pickle.loads(path.read_bytes()), rank_of(path)) for path in folder.glob("*.error")]
    if errors:
        *_, trace, rank = min(errors)
        raise RankError(rank, f"rank {rank} failed first:\n{trace}")
    raise RankError(None, f"torch.distributed.run ended with exit code {returncode}:\n{log[-2000:]}")


def timeout_report(folder: Path, nproc: int, timeout_s: float) -> str:
    """Says which ranks had not finished, and where they stood."""
    done = {rank_of(path) for path in folder.glob("*.result")}
    lines = [f"{nproc - len(done)} of {nproc} ranks had not finished after timeout_s={timeout_s} and were ended"]
    for path in sorted(folder.glob("*.stack"), key=rank_of):
        if rank_of(path) not in done:
            lines.append(f"rank {rank_of(path)} stood here:\n{text(path)[-1500:]}")
    return "\n".join(lines)
