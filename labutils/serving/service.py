"""An engine in a thread of its own, and streams of text for the event loop of a server."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from labutils.generation.stream import TextPieces
from labutils.serving.engine import Engine, Output
from labutils.serving.scheduler import End, Refusal, Request


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, perhaps none, and why it ended, if it did."""

    text: str
    end: End | None


class Service:
    """Runs an engine while requests come and go from an asyncio loop.

    The engine belongs to its thread alone: submissions and cancellations are handed over and done between steps. What a
    slow client has not read waits in its own queue, which holds no more than its answer; nobody waits for it.

    Args:
        engine: Its clock must be `time.monotonic`.
        decode: Token ids to text.
    """

    def __init__(self, engine: Engine, decode: Callable[[list[int]], str]) -> None:
        self.engine, self.decode = engine, decode
        self.orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.streams: dict[Request, Callable[[Output], None]] = {}
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Service:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.orders.put(None)
        self.thread.join()

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """The text of a request as it is made; leaving the iteration early cancels the request.

        Raises:
            Refusal: If the engine turns it away.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def hand_over(event: Output | Refusal) -> None:
            with contextlib.suppress(RuntimeError):  # the loop of its client has closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        asked_s = self.engine.clock()
        self.orders.put(lambda: self._submit(request, asked_s, hand_over))
        pieces, ended = TextPieces(self.decode), False
        try:
            while not ended:
                event = await events.get()
                if isinstance(event, Refusal):
                    ended = True
                    raise event
                ended = event.end is not None
                # the token that stops a text is no part of it
                show = event.token_id is not None and event.end is not End.STOP
                text = pieces.push(event.token_id) if show else ""
                yield Piece(text + (pieces.flush() if ended else ""), event.end)
        finally:
            if not ended:
                self.orders.put(lambda: self._cancel(request))

    def _submit(self, request: Request, asked_s: float, hand_over: Callable[[Output | Refusal], None]) -> None:
        try:
            self.engine.submit(request)
        except Refusal as refusal:
            hand_over(refusal)
        else:
            request.arrival_s = asked_s  # the wait for a step to end is a wait too
            self.streams[request] = hand_over

    def _cancel(self, request: Request) -> None:
        if self.streams.pop(request, None):
            self.engine.cancel(request)

    def _run(self) -> None:
        while True:
            while not self.engine.busy or not self.orders.empty():
                order = self.orders.get()
                if order is None:
                    return
                order()
            for output in self.engine.step():
                hand_over = self.streams[output.request] if output.end is None else self.streams.pop(output.request)
                hand_over(output)
