"""What one connection may cost: uvicorn's protocol for HTTP, with time limits where uvicorn waits without end."""

from __future__ import annotations

from labutils.serving.server import MISSING, Bounds


def bounded_http(bounds: Bounds):
    """A class for uvicorn's option `http`: a connection ends when its client is slower than the bounds allow.

    uvicorn closes a connection that is idle after an answer, but waits for ever for the rest of a request's head, and
    for a client to take what was written. A few hundred such clients would use up all connections.

    * head: from the opening, or from the first byte of a further request, `head_s` until the head is there;
    * answer: `write_s` until the client's system has taken what was written. Nothing is kept for one that does not.

    Raises:
        RuntimeError: Where uvicorn is not installed.
    """
    try:
        import h11
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ModuleNotFoundError as error:
        raise RuntimeError(MISSING) from error

    class BoundedHttp(H11Protocol):
        head_timer = write_timer = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so that uvicorn hears of every byte that is not taken
            self.head_timer = self.loop.call_later(bounds.head_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self.head_timer = _cancelled(self.head_timer)
            elif self.head_timer is None:
                self.head_timer = self.loop.call_later(bounds.head_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.write_timer = self.loop.call_later(bounds.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.write_timer = _cancelled(self.write_timer)

        def connection_lost(self, exc: Exception | None) -> None:
            self.head_timer, self.write_timer = _cancelled(self.head_timer), _cancelled(self.write_timer)
            super().connection_lost(exc)

    return BoundedHttp


def _cancelled(timer) -> None:
    if timer is not None:
        timer.cancel()
