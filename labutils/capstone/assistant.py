"""The assistant in a browser: one page, and OpenAI's chat API in which the model's name chooses the technique.

Each technique is a design with an engine and a thread of its own, built when it is first asked for. Everything stays on
this machine: the server listens on the loopback, and the page may load from nowhere else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from random import Random

from labutils.capstone.designs import Design
from labutils.lab.data import service as corpus
from labutils.lab.models.served import paged_llama, served_model
from labutils.quantization.kernels import find_kernels
from labutils.serving.engine import Engine
from labutils.serving.lookahead import Lookahead
from labutils.serving.protocol import ApiError, Wanted
from labutils.serving.routing import PrefixRouter
from labutils.serving.scheduler import Limits, Request
from labutils.serving.server import MISSING, Api, Bounds, Served, app_of
from labutils.serving.service import Piece, Service

PAGE = Path(__file__).with_name("page.html")
DRAFT_TOKENS = 6
LIMITS = Limits(max_running=8, max_waiting=64)
POSITIONS = 4096  # in memory, of all requests of a technique together
BOUNDS = Bounds(answer_s=60.0)


@dataclass(frozen=True)
class Technique:
    """How an answer is made.

    Attributes:
        design: What is done to the model.
        replicas: Engines that share the requests.
    """

    design: Design
    replicas: int = 1


def techniques() -> dict[str, Technique]:
    """All techniques of the page by the name that a client gives as its model.

    >>> str(techniques()["lablm-small-int8"].design), techniques()["lablm-int4-speculative-x2"].replicas
    ('LabLM-small int8', 2)
    """
    weights, drafts, replicas = (("float32", None), ("int8", 8), ("int4", 4)), (0, DRAFT_TOKENS), (1, 2)
    return {
        f"{model}-{word}{'-speculative' * bool(draft)}{'-x2' * (count > 1)}": Technique(
            Design(model=model, bits=bits, draft_tokens=draft), count
        )
        for model, (word, bits), draft, count in product(("lablm", "lablm-small"), weights, drafts, replicas)
    }


class Replicas:
    """Several services as one: each request goes to the engine that knows most of its beginning."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = {str(index): service for index, service in enumerate(services)}
        self.engine = services[0].engine  # whose clock and limits are those of all
        self.route = PrefixRouter(block_size=self.engine.model.block_size, slack=1)

    def stream(self, request: Request) -> AsyncIterator[Piece]:
        """As `Service.stream`."""
        waiting = {name: len(service.streams) for name, service in self.services.items()}
        return self.services[self.route(request.token_ids, waiting)].stream(request)


@dataclass(frozen=True)
class Built:
    """A technique that can answer: its services, not yet started, how prompts are read, the bytes of its weights."""

    services: tuple[Service, ...]
    served: Served
    weight_bytes: int

    def counts(self) -> dict[str, int]:
        """What it holds and has done, for the page's table."""
        models = [service.engine.model for service in self.services]
        pools = [service.engine.scheduler.pool for service in self.services]
        return {
            "weight_bytes": self.weight_bytes,
            "cached_tokens": sum(len(pool.cached) * pool.block_size for pool in pools),
            **{name: sum(getattr(model, name, 0) for model in models) for name in ("drafted", "accepted")},
        }


def build(name: str, technique: Technique) -> Built:
    """Loads and compresses a technique's model, as often as it has replicas.

    Raises:
        KernelError: For packed weights without a C compiler.
    """
    services, weight_bytes = [], 0
    for _ in range(technique.replicas):
        loaded = technique.design.build()
        model = paged_llama(loaded.model, positions=POSITIONS)
        weight_bytes += model.decoder.weight_bytes
        if technique.design.draft_tokens:
            model = Lookahead(model, draft_tokens=technique.design.draft_tokens)
        decode = partial(loaded.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        services.append(Service(Engine(model, LIMITS), decode))
    return Built(tuple(services), served_model(loaded, name), weight_bytes)


def examples(count: int = 6) -> list[dict[str, str]]:
    """Questions of customers in phrasings that training never showed, each in both languages."""
    rng = Random(13)
    queries = [corpus.sample_query(rng, "test") for _ in range(count)]
    return [{language: query.text(language) for language in corpus.LANGUAGES} for query in queries]


class Assistant:
    """The server's endpoints: each technique is an `Api` of its own behind the same addresses.

    Args:
        known: Techniques by name.
        make: Builds one; where it fails (no compiler, a damaged file), the technique is unavailable, and says why.
        bounds: What one client may cost.
    """

    def __init__(
        self,
        known: Mapping[str, Technique] | None = None,
        *,
        make: Callable[[str, Technique], Built] = build,
        bounds: Bounds = BOUNDS,
    ) -> None:
        self.known, self.make, self.bounds = techniques() if known is None else known, make, bounds
        self.loading: dict[str, asyncio.Future] = {}
        self.built: dict[str, Built] = {}
        self.apis: dict[str, Api] = {}
        self.running = contextlib.ExitStack()
        self.door = Api(None, None, None, bounds)  # reads requests before it is known whose they are

    def app(self):
        """The application; its engines end with it."""
        pages = {"/": self.page, "/examples": self.examples}
        return app_of(self, pages, lifespan=self._lifespan)

    async def page(self, http):
        """The page, which may load and ask nothing but this server."""
        from fastapi.responses import HTMLResponse

        self.door.authorize(http)
        text, headers = page()
        return HTMLResponse(text, headers=headers)

    async def examples(self, http):
        """Questions to begin with."""
        from fastapi.responses import JSONResponse

        self.door.authorize(http)
        return JSONResponse(examples())

    async def models(self, http):
        """All techniques: `state` is "unavailable" (with the `reason`), "not loaded", "loading" or "ready"."""
        from fastapi.responses import JSONResponse

        self.door.authorize(http)
        await asyncio.to_thread(find_kernels)  # which may compile, once
        common = {"object": "model", "created": 0, "owned_by": "labutils"}
        return JSONResponse(
            {"object": "list", "data": [{"id": name} | common | self._state(name) for name in self.known]}
        )

    async def chat(self, http):
        """An answer to messages."""
        return await self._answer(http, chat=True)

    async def completions(self, http):
        """A continuation of a text."""
        return await self._answer(http, chat=False)

    async def _answer(self, http, *, chat: bool):
        wanted = await self.door.read(http, chat=chat)
        return await (await self._api(wanted)).respond(http, wanted)

    async def _api(self, wanted: Wanted) -> Api:
        """The technique's own endpoints; builds it at the first request, once for all who ask meanwhile."""
        name = wanted.model
        if name not in self.known:
            message = f"the model must be one of {', '.join(self.known)}; got {name[:80]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if self._lack(name) is None and name not in self.apis:
            if name not in self.loading:
                self.loading[name] = asyncio.ensure_future(asyncio.to_thread(self.make, name, self.known[name]))
            with contextlib.suppress(Exception):  # whatever it was, `_lack` says it
                self._start(name, await asyncio.shield(self.loading[name]))
        if lack := self._lack(name):
            raise ApiError(503, f"{name} is unavailable: {lack}", param="model", code="model_unavailable")
        return self.apis[name]

    def _start(self, name: str, built: Built) -> None:
        if name not in self.apis:
            for service in built.services:
                self.running.enter_context(service)
            service = built.services[0] if len(built.services) == 1 else Replicas(built.services)
            self.built[name], self.apis[name] = built, Api(service, built.served, None, self.bounds)

    def _lack(self, name: str) -> str | None:
        """Why a technique cannot be had here, as far as is known."""
        task = self.loading.get(name)
        if task is not None and task.done() and task.exception():
            return str(task.exception()) or type(task.exception()).__name__
        library, reason = find_kernels()
        return reason if library is None and self.known[name].design.bits else None

    def _state(self, name: str) -> dict[str, object]:
        label = {"label": str(self.known[name].design) + ", two replicas" * (self.known[name].replicas > 1)}
        if lack := self._lack(name):
            return label | {"state": "unavailable", "reason": lack}
        if name in self.built:
            return label | {"state": "ready"} | self.built[name].counts()
        return label | {"state": "loading" if name in self.loading else "not loaded"}

    @contextlib.asynccontextmanager
    async def _lifespan(self, _):
        with self.running:
            yield


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page, and headers under which a browser runs its own script and style, by their hashes, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    own = {tag: _hashes(re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)) for tag in ("script", "style")}
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    rules += ["frame-ancestors 'none'", *(f"{tag}-src {hashes}" for tag, hashes in own.items())]
    headers = {"Content-Security-Policy": "; ".join(rules), "X-Content-Type-Options": "nosniff"}
    return text, headers | {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def _hashes(parts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


@contextlib.contextmanager
def running_assistant(assistant: Assistant | None = None, *, port: int = 0) -> Iterator[str]:
    """The assistant in a thread, at the address that is given; 0 takes a free port.

    Raises:
        RuntimeError: Where FastAPI or uvicorn is not installed.
        OSError: If the port is taken.
    """
    try:
        import uvicorn

        from labutils.serving.connections import bounded_http
    except ModuleNotFoundError as error:
        raise RuntimeError(MISSING) from error
    assistant = assistant or Assistant()
    options = {"http": bounded_http(assistant.bounds), "ws": "none", "log_level": "warning"}
    config = uvicorn.Config(assistant.app(), **options, limit_concurrency=256, timeout_graceful_shutdown=1)
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="assistant", daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise RuntimeError("the server did not start; its log says why")
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # an answer that is cut off now is no error
            server.should_exit = True
            thread.join()
