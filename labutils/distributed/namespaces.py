"""A real slow link on one Linux machine: two network namespaces, a virtual cable, and the kernel's traffic shaper.

Nothing is simulated here but the distance: bytes go through the kernel's network stack at the rate that `tc` allows.
Needs root. Everything it makes disappears with the block.
"""

import contextlib
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

INTERFACES = ("labutils0", "labutils1")
ADDRESSES, PORT = ("10.77.0.1", "10.77.0.2"), 29500
RUN = (
    "import pickle, sys; from labutils.distributed.launch import launch; "
    "arguments = pickle.load(open(sys.argv[1], 'rb')); pickle.dump(launch(**arguments), open(sys.argv[2], 'wb'))"
)


def why_not() -> str | None:
    """Returns what is missing for network namespaces here; None where they can be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "the programs ip and tc (package iproute2) are needed"
    try:
        with shaped_link(1e6):
            return None
    except subprocess.CalledProcessError as error:
        return f"the kernel refused: {error.stderr.decode(errors='replace').strip()}"


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextlib.contextmanager
def shaped_link(bytes_per_s: float) -> Iterator[tuple[str, str]]:
    """Joins two namespaces by a cable that carries `bytes_per_s` each way (token bucket filter, `man tc-tbf`).

    Yields the namespaces' names, which nobody else has. Only what was added is deleted at the end.

    Raises:
        ValueError: If `bytes_per_s` is below 1000.
        subprocess.CalledProcessError: If the kernel refuses.
    """
    if bytes_per_s < 1000:
        raise ValueError(f"bytes_per_s must be at least 1000; got {bytes_per_s}")
    suffix = secrets.token_hex(4)
    names, added = (f"labutils-{suffix}-0", f"labutils-{suffix}-1"), []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            added.append(name)
        ends = ("ip", "link", "add", INTERFACES[0], "netns", names[0], "type", "veth", "peer", "name", INTERFACES[1])
        _run(*ends, "netns", names[1])
        bucket = ("tbf", "rate", f"{round(8 * bytes_per_s)}bit", "burst", "64kb", "latency", "2s")
        for name, interface, address in zip(names, INTERFACES, ADDRESSES, strict=True):
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "address", "add", f"{address}/24", "dev", interface)
            _run(*inside, "ip", "link", "set", interface, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "tc", "qdisc", "add", "dev", interface, "root", *bucket)
        yield names
    finally:
        for name in added:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launch_over_link(target: str, args: dict | None = None, *, bytes_per_s: float, timeout_s: float = 120) -> list:
    """Runs `launch` with one rank in each of two namespaces joined by a slow link; returns both results.

    Raises:
        RuntimeError: When a side fails; its own message.
    """
    with shaped_link(bytes_per_s) as names, tempfile.TemporaryDirectory(prefix="link-") as folder:
        sides = [_start(Path(folder), names, node, target, args, timeout_s) for node in (0, 1)]
        try:
            complaints = [side.communicate(timeout=timeout_s + 60)[1] for side in sides]
        finally:
            for side in sides:  # the ranks end with them
                side.kill()
                side.wait()
        for side, words in zip(sides, complaints, strict=True):
            if side.returncode:
                raise RuntimeError(f"a rank behind the link failed:\n{words.decode(errors='replace')[-2000:]}")
        return [result for node in (0, 1) for result in pickle.loads((Path(folder) / f"{node}.out").read_bytes())]


def _start(
    folder: Path, names: tuple[str, str], node: int, target: str, args: dict | None, timeout_s: float
) -> subprocess.Popen:
    arguments = {"target": target, "nproc": 1, "args": args, "timeout_s": timeout_s, "device": "cpu"}
    arguments |= {"nnodes": 2, "node_rank": node, "rdzv": f"{ADDRESSES[0]}:{PORT}"}
    (folder / f"{node}.in").write_bytes(pickle.dumps(arguments))
    environ = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACES[node]}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = ["ip", "netns", "exec", names[node], sys.executable, "-c", RUN]
    files = [str(folder / f"{node}.{end}") for end in ("in", "out")]
    return subprocess.Popen([*command, *files], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
