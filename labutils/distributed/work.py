"""Batches of requests, and what runs on a node: each request answered or failing on its own."""

import contextlib
import pickle
import queue
from collections.abc import Callable
from dataclasses import dataclass

AnswerBatch = Callable[[list], list]
MOST_WORDS = 2000
_current = {"node": ""}


class NodeGone(Exception):
    """An engine's word that a batch was never sent, or is lost, for a reason that lies outside of it."""


@dataclass(frozen=True)
class Outcome:
    """One request's pickled answer, or the error that it raised."""

    value: bytes | None
    error: str | None


@dataclass
class Batch:
    """Requests that go to a node together; a suspect, which may have cost a node, has its next node to itself."""

    ids: list[int]
    suspect: bool = False


@dataclass
class Placed:
    """A batch on a node."""

    batch: Batch
    node: str
    address: str


def current_node() -> str:
    """Returns the name of the node that this code runs on; empty outside of `dispatch`."""
    return _current["node"]


def describe(error: BaseException) -> str:
    """Returns an error's name and its message, cut to a length that fits into a report.

    >>> describe(KeyError("bad"))
    "KeyError: 'bad'"
    """
    try:
        return f"{type(error).__name__}: {error}"[:MOST_WORDS]
    except Exception:  # its own __str__ raises
        return type(error).__name__


def dumps(value: object) -> bytes:
    """Pickles a value; what only this program's own cells define goes by value, if cloudpickle is installed.

    Raises:
        Exception: Whatever `pickle` raises for a value that cannot be pickled.
    """
    with contextlib.suppress(Exception):
        data = pickle.dumps(value)
        if b"__main__" not in data:
            return data
    try:
        from cloudpickle import dumps as by_value
    except ModuleNotFoundError:
        by_value = pickle.dumps
    return by_value(value)


def take_all(done: queue.SimpleQueue, timeout_s: float) -> list:
    """Waits for the first entry of a queue and takes all others that are there; none after the timeout."""
    found = []
    with contextlib.suppress(queue.Empty):
        found.append(done.get(timeout=timeout_s))
        while True:
            found.append(done.get_nowait())
    return found


def answer_batch(function: AnswerBatch, payloads: list[bytes], node: str) -> list[Outcome] | None:
    """Answers a batch of pickled requests. None says that the batch failed and its requests have to run one by one.

    >>> outcomes = answer_batch(lambda batch: [1 / x for x in batch], [pickle.dumps(0)], "here")
    >>> [outcome.error for outcome in outcomes]
    ['ZeroDivisionError: division by zero']
    """
    _current["node"] = node
    try:
        values = function([pickle.loads(payload) for payload in payloads])
        if len(values) != len(payloads):
            raise ValueError(f"the function must answer each request of a batch; {len(values)} for {len(payloads)}")
        return [_outcome(value) for value in values]
    except BaseException as error:  # a function that calls sys.exit must not take the node along
        return [Outcome(None, describe(error))] if len(payloads) == 1 else None


def _outcome(value: object) -> Outcome:
    try:
        return Outcome(pickle.dumps(value), None)
    except Exception as error:
        return Outcome(None, f"Unsendable answer: {describe(error)}")
