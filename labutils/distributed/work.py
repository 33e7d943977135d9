"""What runs on a node: a batch of requests, each answered or failing on its own."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

AnswerBatch = Callable[[list], list]
_current = {"node": ""}


@dataclass(frozen=True)
class Outcome:
    """One request's pickled answer, or the error that it raised."""

    value: bytes | None
    error: str | None


def current_node() -> str:
    """Returns the name of the node that this code runs on; empty outside of `dispatch`."""
    return _current["node"]


def answer_batch(function: AnswerBatch, payloads: list, node: str) -> list[Outcome]:
    """Answers a batch at once; if that raises, one by one, so that a bad request spoils no other.

    >>> outcomes = answer_batch(lambda batch: [1 / x for x in batch], [1, 0], "here")
    >>> [outcome.error for outcome in outcomes]
    [None, 'ZeroDivisionError: division by zero']
    """
    _current["node"] = node
    try:
        values = function(payloads)
        if len(values) != len(payloads):
            raise ValueError(f"the function must answer each request of a batch; {len(values)} for {len(payloads)}")
        return [Outcome(pickle.dumps(value), None) for value in values]
    except Exception as error:
        if len(payloads) == 1:
            return [Outcome(None, f"{type(error).__name__}: {error}")]
    return [answer_batch(function, [payload], node)[0] for payload in payloads]
