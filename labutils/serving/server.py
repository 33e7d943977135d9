"""The server: `/v1/models`, `/v1/chat/completions` and `/v1/completions` as OpenAI's clients know them.

Everything that a client sends is bounded: the bytes of its body, the time it may take to send them, the tokens and the
time of its answer, and the number of requests that wait. One that vanishes ends its own request and no other. No header
allows other origins (CORS), so a browser shows the answers only to pages that this server's own address served.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import torch

from labutils.generation.sampling import Sampler
from labutils.lab.hosts import is_loopback
from labutils.serving.protocol import Answer, ApiError, StopText, Wanted, parse, usage
from labutils.serving.queueing import latency_badge
from labutils.serving.scheduler import End, Refusal, Request
from labutils.serving.service import Piece, Service

MISSING = "FastAPI and uvicorn are needed here: pip install fastapi uvicorn"
POLL_S = 0.2
STATUS = {"queue_full": 429, "context_length_exceeded": 400, "empty": 400}


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass(frozen=True)
class Served:
    """A model as the server knows it.

    Attributes:
        encode_chat: Messages to token ids, up to where the answer begins.
        encode_text: A text to token ids.
        stop: Tokens that end an answer.
    """

    name: str
    vocab_size: int
    encode_chat: Callable[[list[dict]], list[int]]
    encode_text: Callable[[str], list[int]]
    stop: frozenset[int]


@dataclass(frozen=True)
class Bounds:
    """What one client may cost.

    Attributes:
        body_bytes: Of a request.
        head_s: Seconds to send a request's head.
        read_s: Seconds to send its body.
        answer_s: Seconds to answer it.
        write_s: Seconds to take what was written.
    """

    body_bytes: int = 2**18
    head_s: float = 10.0
    read_s: float = 10.0
    answer_s: float = 120.0
    write_s: float = 30.0


def make_app(service: Service, served: Served, *, key: str | None = None, bounds: Bounds | None = None):
    """The FastAPI application; without a key it answers only those who call it by a loopback name.

    Raises:
        RuntimeError: Where FastAPI is not installed.
    """
    return app_of(Api(service, served, key, bounds or Bounds()))


def app_of(api, pages: Mapping[str, Callable] | None = None, *, lifespan: Callable | None = None):
    """The application of an `Api` or of what stands for one; `pages` are further addresses, and who answers there.

    Raises:
        RuntimeError: Where FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI
        from fastapi.responses import JSONResponse
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise RuntimeError(MISSING) from error

    async def refused(_, error: ApiError):
        return JSONResponse(error.body(), error.status, {"Connection": "close"} if error.status in (408, 413) else None)

    async def unknown(_, error: HTTPException):
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code)

    async def broken(_, __: Exception):
        return JSONResponse(ApiError(500, "the server has failed; its log says why").body(), 500)

    routes = [
        Route("/v1/models", api.models),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        *(Route(path, answer) for path, answer in (pages or {}).items()),
    ]
    handlers = {ApiError: refused, HTTPException: unknown, Exception: broken}
    return FastAPI(openapi_url=None, routes=routes, exception_handlers=handlers, lifespan=lifespan)


class Api:
    """The endpoints."""

    def __init__(self, service: Service, served: Served, key: str | None, bounds: Bounds) -> None:
        self.service, self.served, self.key, self.bounds = service, served, key, bounds
        self.encoding = asyncio.Lock()  # tokenizers are not made for several threads at once

    async def models(self, http):
        """The one model."""
        from fastapi.responses import JSONResponse

        self.authorize(http)
        model = {"id": self.served.name, "object": "model", "created": 0, "owned_by": "labutils"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, http):
        """An answer to messages."""
        return await self._answer(http, chat=True)

    async def completions(self, http):
        """A continuation of a text."""
        return await self._answer(http, chat=False)

    async def _answer(self, http, *, chat: bool):
        return await self.respond(http, await self.read(http, chat=chat))

    async def read(self, http, *, chat: bool) -> Wanted:
        """What a client wants, if it may ask at all."""
        self.authorize(http)
        return parse(await self._body(http), chat=chat)

    async def respond(self, http, wanted: Wanted):
        """The answer of this server's model."""
        from fastapi.responses import JSONResponse, Response, StreamingResponse

        if wanted.model != self.served.name:
            message = f"the model must be {self.served.name}; got {wanted.model[:80]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        request = self._request(wanted, await self._encode(wanted))
        pieces = self._pieces(request, wanted.stop)
        name = ("chatcmpl-" if wanted.chat else "cmpl-") + uuid.uuid4().hex
        answer = Answer(name, int(time.time()), wanted.model, wanted.chat)
        try:
            if wanted.stream:
                first = await unless_gone(http, anext(pieces))
                events = self._events(request, answer, first, pieces, wanted.usage)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            found = await unless_gone(http, _all(pieces))
        except Refusal as refusal:
            raise ApiError(STATUS[refusal.code], str(refusal), code=refusal.code) from refusal
        except ClientGone:
            return Response(status_code=499)
        _require_success(found[-1].end)
        text = "".join(piece.text for piece in found)
        return JSONResponse(answer.whole(text, found[-1].end.value, _usage(request)) | _latency(request))

    def authorize(self, http) -> None:
        """The key, where there is one; else only loopback names, so that no web page can call under its own."""
        if self.key is None:
            if not is_loopback(http.url.hostname or ""):
                raise ApiError(403, "without a key this server must be called as localhost", code="wrong_host")
            return
        given = http.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise ApiError(401, "the key in 'Authorization: Bearer KEY' is missing or wrong", code="invalid_api_key")

    async def _body(self, http) -> bytes:
        if not http.headers.get("content-type", "").startswith("application/json"):
            raise ApiError(415, "the content type must be application/json", code="wrong_content_type")
        body = b""
        try:
            async with asyncio.timeout(self.bounds.read_s):
                async for part in http.stream():
                    body += part
                    if len(body) > self.bounds.body_bytes:
                        raise ApiError(413, f"a body may have {self.bounds.body_bytes} bytes", code="body_too_large")
        except TimeoutError as error:
            raise ApiError(408, f"a body must be sent in {self.bounds.read_s} s", code="body_too_slow") from error
        return body

    async def _encode(self, wanted: Wanted) -> list[int]:
        if isinstance(wanted.prompt, list) and not wanted.chat:
            if not all(0 <= token < self.served.vocab_size for token in wanted.prompt):
                message = f"token ids must be 0 to {self.served.vocab_size - 1}"
                raise ApiError(400, message, param="prompt", code="invalid_value")
            return wanted.prompt
        encode = self.served.encode_chat if wanted.chat else self.served.encode_text
        async with self.encoding:
            return await asyncio.to_thread(encode, wanted.prompt)

    def _request(self, wanted: Wanted, token_ids: list[int]) -> Request:
        room = self.service.engine.scheduler.limits.max_positions - len(token_ids)
        choose = None
        if wanted.temperature > 0:
            generator = torch.Generator()
            generator.seed() if wanted.seed is None else generator.manual_seed(wanted.seed)
            top_p = wanted.top_p if wanted.top_p < 1 else None
            choose = Sampler(generator, temperature=max(wanted.temperature, 1e-3), top_p=top_p)
        return Request(
            token_ids,
            max_new_tokens=wanted.max_tokens or max(room, 1),
            stop=self.served.stop,
            priority=wanted.priority,
            deadline_s=time.monotonic() + self.bounds.answer_s,
            salt=wanted.salt,
            choose=choose,
        )

    async def _pieces(self, request: Request, stops: tuple[str, ...]) -> AsyncIterator[Piece]:
        """The answer's text up to a stop string."""
        stop = StopText(stops)
        async with contextlib.aclosing(self.service.stream(request)) as stream:
            async for piece in stream:
                text = stop.push(piece.text, last=piece.end is not None)
                yield Piece(text, End.STOP if stop.found else piece.end)
                if stop.found:
                    return

    async def _events(self, request: Request, answer: Answer, first: Piece, rest, with_usage: bool):
        """The answer as server-sent events."""
        async with contextlib.aclosing(rest):
            piece, is_first = first, True
            while True:
                try:
                    reason = piece.end.value if piece.end and not _failure(piece.end) else None
                    if piece.text or reason or is_first:
                        yield _event(answer.piece(piece.text, reason, first=is_first))
                    _require_success(piece.end)
                except ApiError as error:
                    yield _event(error.body())
                    break
                if piece.end:
                    break
                piece, is_first = await anext(rest), False
        if with_usage:
            yield _event(answer.usage(_usage(request)) | _latency(request))
        yield "data: [DONE]\n\n"


async def unless_gone(http, work: Awaitable):
    """Waits for some work, and cancels it when the client closes its connection.

    Raises:
        ClientGone: If it does.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=POLL_S))[0]:
            if await http.is_disconnected():
                raise ClientGone
        return task.result()
    finally:
        if task.cancel():
            await asyncio.wait([task])


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    async with contextlib.aclosing(pieces):
        return [piece async for piece in pieces]


def _failure(end: End) -> bool:
    return end in (End.DEADLINE, End.ERROR, End.CANCELLED)


def _require_success(end: End | None) -> None:
    if end is End.DEADLINE:
        raise ApiError(504, "the answer took too long", code="deadline")
    if end is not None and _failure(end):
        raise ApiError(500, "the request has failed; the server's log says why", code="engine_error")


def _usage(request: Request) -> dict:
    return usage(request.prompt, len(request.new_ids), request.cached)


def _latency(request: Request) -> dict:
    """A field of ours, which OpenAI's clients pass over: what the client felt, by the engine's clock."""
    badge = latency_badge(request.arrival_s, request.admitted_s, request.token_s) if request.token_s else None
    return {"latency": badge}


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
