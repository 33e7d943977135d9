"""Plain processes of this machine as an engine for `dispatch`: no library, no port, and nodes that really die."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

from labutils.distributed.work import AnswerBatch, Outcome, answer_batch, describe, dumps, take_all


def serve(connection, node: str) -> None:
    """What runs in a node: answers batches until the pipe closes, and ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook keeps its nodes
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        connection.send("ready")
        while True:
            try:
                reply = answer_batch(*pickle.loads(connection.recv_bytes()), node)
            except (EOFError, OSError):
                raise
            except Exception as error:  # the function cannot be read here
                reply = RuntimeError(describe(error))
            connection.send(reply)


class Node:
    """One process, and a thread that hands it one batch at a time: only that thread waits for a stopped process."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name), daemon=True)
        self.process.start()
        theirs.close()
        self.batches: queue.SimpleQueue = queue.SimpleQueue()
        self.ready = threading.Event()
        threading.Thread(target=self._hand_over, daemon=True).start()

    def _hand_over(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # the process ended: `dispatch` sees that by its address
            self.connection.recv()
            self.ready.set()
            while (batch := self.batches.get()) is not None:
                handle, function, payloads, session = batch
                if handle in session.open:
                    session.done.put((handle, self._answer(function, payloads)))

    def _answer(self, function: AnswerBatch, payloads: list[bytes]) -> object:
        try:
            batch = dumps((function, payloads))
        except Exception as error:
            return error
        self.connection.send_bytes(batch)
        return self.connection.recv()

    def end(self) -> None:
        """Ends the process, a stopped one too, and its thread."""
        self.process.kill()
        self.process.join()
        self.batches.put(None)


class ProcessEngine:
    """Processes as `dispatch` sees them; one that ended is started again, and its address is its process id."""

    def __init__(self, nodes: int) -> None:
        self.processes = {f"node-{i}": Node(f"node-{i}") for i in range(nodes)}

    def nodes(self) -> Mapping[str, str]:
        """Returns the ids of the processes that have started, by name."""
        for name, node in self.processes.items():
            if not node.process.is_alive():
                node.end()
                self.processes[name] = Node(name)
        return {name: str(node.process.pid) for name, node in self.processes.items() if node.ready.is_set()}

    def session(self) -> "ProcessSession":
        """Opens a session for one run."""
        return ProcessSession(self)


class ProcessSession:
    """The batches of one run."""

    def __init__(self, engine: ProcessEngine) -> None:
        self.engine = engine
        self.done: queue.SimpleQueue = queue.SimpleQueue()
        self.open: set[object] = set()

    def submit(self, node: str, address: str, function: AnswerBatch, payloads: list[bytes]) -> object:
        """Queues a batch for a process; one that is gone by now loses it, as `dispatch` will see."""
        handle = object()
        self.open.add(handle)
        self.engine.processes[node].batches.put((handle, function, payloads, self))
        return handle

    def finished(self, timeout_s: float) -> list[tuple[object, Sequence[Outcome] | Exception | None]]:
        """Waits for the first finished batch and takes all others that are there."""
        return take_all(self.done, timeout_s)

    def forget(self, handles: Iterable[object]) -> None:
        """Drops batches that no process has begun."""
        self.open.difference_update(handles)


@contextlib.contextmanager
def local_processes(nodes: int) -> Iterator[ProcessEngine]:
    """Starts `nodes` processes, "node-0" and up, that end with the block.

    Raises:
        ValueError: If `nodes` is below 1.
    """
    if nodes < 1:
        raise ValueError(f"an engine needs at least 1 node; got {nodes}")
    engine = ProcessEngine(nodes)
    try:
        for node in engine.processes.values():
            node.ready.wait(60)
        yield engine
    finally:
        for node in engine.processes.values():
            node.end()
