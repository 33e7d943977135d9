"""A source of requests that may pause: a thread reads it, so that nobody has to wait for the next request."""

import queue
import threading
from collections.abc import Iterable

NOTHING_YET = object()
READ_AHEAD = 16


class LiveSource:
    """Its `next` returns `NOTHING_YET` instead of waiting. The thread holds at most `READ_AHEAD` + 1 requests.

    >>> source = LiveSource([7])
    >>> while (request := next(source)) is NOTHING_YET:
    ...     pass
    >>> request
    7
    """

    def __init__(self, requests: Iterable) -> None:
        self.ready: queue.Queue = queue.Queue(READ_AHEAD)
        self.closed = False
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()

    def _read(self, requests: Iterable) -> None:
        ending: BaseException = StopIteration()
        try:
            for request in requests:
                self.ready.put((request, None))
                if self.closed:
                    return
        except BaseException as error:
            ending = error
        self.ready.put((None, ending))

    def __next__(self) -> object:
        try:
            request, ending = self.ready.get_nowait()
        except queue.Empty:
            return NOTHING_YET
        if ending is not None:
            raise ending
        return request

    def close(self) -> None:
        """Ends the thread at its next request."""
        self.closed = True
        while not self.ready.empty():
            self.ready.get_nowait()
