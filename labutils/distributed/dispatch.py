"""Requests over nodes that are slow, die, stop or raise: one answer or one named error per request, in order.

Execution is *at least once*: when a node is lost, nobody can know whether it had finished, so its requests run again.
Two things stay single points of failure: the process that dispatches, and the engine's scheduler where it has one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from labutils.distributed.run import Run
from labutils.distributed.settings import Answer, Report, Settings
from labutils.distributed.source import LiveSource
from labutils.distributed.work import AnswerBatch, Outcome, describe, dumps


class Session(Protocol):
    """One run's batches on an engine: a run sees its own results and no other's."""

    def submit(self, node: str, address: str, function: AnswerBatch, payloads: list[bytes]) -> object:
        """Queues a batch of pickled requests on a node and returns a handle at once.

        Raises:
            NodeGone: If the node at this address has ended: the batch is sent elsewhere, and nobody is blamed.
        """

    def finished(self, timeout_s: float) -> list[tuple[object, Sequence[Outcome] | Exception | None]]:
        """Waits for something to finish; returns handles with what `answer_batch` returned, or what went wrong.

        `NodeGone` among them says that a batch is lost through no fault of its own.
        """

    def forget(self, handles: Iterable[object]) -> None:
        """Cancels what need not run any more."""


class Engine(Protocol):
    """What `dispatch` needs of an engine; see `dask_engine` and `ray_engine`."""

    def nodes(self) -> Mapping[str, str]:
        """Returns the nodes that are there now: name to address. A restarted node has a new address.

        Raises:
            Exception: Where nobody can tell, such as when the scheduler does not answer.
        """

    def session(self) -> Session:
        """Opens a session for one run."""


def dispatch(
    requests: Iterable,
    function: AnswerBatch,
    engine: Engine,
    settings: Settings | None = None,
    *,
    report: Report | None = None,
    on_progress: Callable[[Report], object] | None = None,
) -> Iterator[Answer]:
    """Yields one `Answer` per request, in the order of the requests, as they become complete.

    Args:
        requests: Any iterable; it is read only as far ahead as `settings` says. A request's id is its place. If it
            raises, the requests read before are answered first, and then its error is raised.
        function: Answers a list of requests with a list of as many values. It runs on the nodes, so it must not
            depend on which requests share its batch.
        engine: Where the nodes are. Several runs may share it.
        settings: How; see `Settings`.
        report: Filled while it runs.
        on_progress: Called with the report after every step, for the last time when all requests have ended.

    Raises:
        ValueError: If the function cannot be pickled; nothing is read then.
    """
    try:
        dumps(function)
    except Exception as error:
        raise ValueError(f"a function must be picklable to reach the nodes; got {describe(error)}") from None
    settings = settings or Settings()
    source = LiveSource(requests) if settings.live else iter(requests)
    run = Run(source, function, engine, settings, report or Report())
    began = time.monotonic()
    try:
        while not run.finished:
            run.step()
            run.report.seconds = time.monotonic() - began
            if on_progress:
                on_progress(run.report)
            yield from run.deliver()
    finally:
        run.session.forget([*run.running, *run.abandoned])
        if isinstance(source, LiveSource):
            source.close()
    if run.source_error:
        raise run.source_error
