"""Dask distributed as the engine: a cluster of processes on this machine, loopback only, or any cluster by address."""

import asyncio
import contextlib
import logging
import queue
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from labutils.distributed.work import AnswerBatch, NodeGone, Outcome, answer_batch, take_all
from labutils.lab.hosts import is_loopback

LOOK_S = 2.0
MISSING = 'Dask distributed is needed here: pip install "distributed>=2025.7"'


class DaskEngine:
    """A Dask client as `dispatch` sees it."""

    def __init__(self, client) -> None:
        self.client = client

    def nodes(self) -> Mapping[str, str]:
        """Returns the workers' names and addresses.

        Raises:
            ConnectionError: Where the scheduler does not answer within `LOOK_S`.
        """
        try:
            seen = self.client.sync(self.client.scheduler.identity, n_workers=-1, callback_timeout=LOOK_S)["workers"]
        except Exception:  # a broken connection has a dozen names, some without a word
            raise ConnectionError("the scheduler does not answer") from None
        return {str(worker["name"]): address for address, worker in seen.items()}

    def session(self) -> "DaskSession":
        """Opens a session for one run."""
        return DaskSession(self.client)


class DaskSession:
    """Batches pinned to named nodes; outcomes are fetched in Dask's own thread and come in a queue."""

    def __init__(self, client) -> None:
        self.client = client
        self.done: queue.SimpleQueue = queue.SimpleQueue()

    def submit(self, node: str, address: str, function: AnswerBatch, payloads: list[bytes]) -> object:
        """Pins a batch to one worker: Dask's own stealing and retrying would blur whose fault a loss is."""
        future = self.client.submit(
            answer_batch, function, payloads, node, workers=[address], allow_other_workers=False, pure=False
        )
        self.client.loop.add_callback(self._fetch, future)
        return future

    async def _fetch(self, future) -> None:
        """Waits for an outcome. It lives on its node: if that dies first, this waits until the batch is forgotten."""
        try:
            outcome = await self.client.gather(future, asynchronous=True)
        except asyncio.CancelledError:  # Dask's own as well: by `forget`, or with the connection to the scheduler
            outcome = NodeGone("the batch was cancelled")
        except Exception as error:
            outcome = error
        self.done.put((future, outcome))

    def finished(self, timeout_s: float) -> list[tuple[object, Sequence[Outcome] | Exception | None]]:
        """Waits for the first finished batch and takes all others that are there."""
        return take_all(self.done, timeout_s)

    def forget(self, handles: Iterable[object]) -> None:
        """Cancels batches; a broken connection has none left to cancel."""
        with contextlib.suppress(Exception):
            self.client.cancel(list(handles), force=True)


@contextlib.contextmanager
def local_cluster(nodes: int, *, certificates: Path | None = None) -> Iterator[DaskEngine]:
    """A cluster of `nodes` processes, "node-0" and up, that listens on the loopback only and ends with the block.

    Each node has a nanny that starts it again after a death. On a machine that others use too, give certificates.

    Raises:
        ValueError: If `nodes` is below 1.
        ModuleNotFoundError: Without Dask distributed.
    """
    if nodes < 1:
        raise ValueError(f"a cluster needs at least 1 node; got {nodes}")
    dask = _dask()
    security = tls_security(certificates) if certificates else None
    common = {"host": "127.0.0.1", "security": security, "protocol": "tls://" if certificates else "tcp://"}
    with tempfile.TemporaryDirectory(prefix="nodes-") as folder:
        worker = common | {"nthreads": 1, "dashboard": False, "memory_limit": 0, "local_directory": folder}
        worker["silence_logs"] = logging.CRITICAL  # a death is reported by `dispatch`
        workers = {f"node-{i}": {"cls": dask.Nanny, "options": worker | {"name": f"node-{i}"}} for i in range(nodes)}
        options = common | {"port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        scheduler = {"cls": dask.Scheduler, "options": options}
        with (
            _patience(),
            dask.SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL) as cluster,
            dask.Client(cluster, security=security, set_as_default=False) as client,
        ):
            client.wait_for_workers(nodes, timeout=120)
            yield DaskEngine(client)


@contextlib.contextmanager
def connect(address: str, *, certificates: Path | None = None) -> Iterator[DaskEngine]:
    """Joins a running cluster at "tls://host:port", or at "tcp://127.0.0.1:port" on this machine.

    Whoever reaches a Dask scheduler can run any code on its nodes. Without certificates only the loopback is allowed.

    Args:
        address: The scheduler's.
        certificates: Folder with ca.pem, cert.pem and key.pem; see `make_certificates`.

    Raises:
        ValueError: For an unencrypted address beyond this machine.
    """
    host = address.partition("://")[2].rpartition(":")[0]
    if certificates is None and not is_loopback(host):
        raise ValueError(f"beyond this machine a cluster needs TLS: give its certificates; got {address!r} without")
    dask = _dask()
    security = None if certificates is None else tls_security(certificates)
    with dask.Client(address, security=security, set_as_default=False, timeout=30) as client:
        yield DaskEngine(client)


def tls_security(certificates: Path):
    """Returns Dask's security settings: encrypted, and only for those who hold a certificate of this authority."""
    files = {role: str(certificates / f"{role}.pem") for role in ("ca", "cert", "key")}
    roles = {f"tls_{who}_{part}": files[part] for who in ("client", "scheduler", "worker") for part in ("cert", "key")}
    return _dask().Security(require_encryption=True, tls_ca_file=files["ca"], **roles)


def make_certificates(folder: Path) -> Path:
    """Writes an authority of its own and one certificate for all nodes, with the `openssl` program; returns the folder.

    The folder is made where it is missing. Anyone who holds key.pem is a member of the cluster: copy the folder to the
    nodes over a secure connection, and to nobody else.

    Raises:
        ValueError: Where the `openssl` program is missing.
    """
    if shutil.which("openssl") is None:
        raise ValueError("the program openssl is needed to make certificates; got none on this machine")
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=labutils"]
    folder.mkdir(parents=True, exist_ok=True)
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*new, *files], cwd=folder, check=True, capture_output=True)
    (folder / "key.pem").chmod(0o600)
    shutil.copy(folder / "cert.pem", folder / "ca.pem")  # self-signed: it is its own authority
    return folder


def _patience():
    """Tells Dask not to give up a node: it would, for good, if the node is down 15 s after an earlier death."""
    from dask import config

    return config.set({"distributed.deploy.lost-worker-timeout": "1 day"})


def _dask():
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING, name=error.name) from None
    return distributed
