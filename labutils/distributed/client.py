"""A client for servers that speak OpenAI's protocol (`transformers serve`, vLLM, llama.cpp), standard library only."""

import json
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

Message = dict[str, str]  # {"role": "user", "content": "…"}


class ServerError(RuntimeError):
    """The server could not be reached, refused, or broke off; one sentence."""


class ChatClient:
    """Asks one server, such as "http://127.0.0.1:8000", for chat completions of one model.

    Usable as the function of `dispatch`: a batch of message lists in, a list of texts out. A server that batches
    continuously needs several requests at a time: `in_flight` of a batch are asked at once.

    Args:
        base_url: the server.
        model: one of its models.
        key: sent as a bearer token.
        timeout_s: of each request.
        control_tokens: texts such as "<|end|>" that no message may hold. Servers join messages and marks into one
            string, in which such a text forges a turn, and a client cannot tell them otherwise. With the tokenizer at
            hand: `labutils.lab.models.tokenizer.control_tokens(tokenizer)`. Empty for a server that keeps users' text
            apart itself, as `labutils serve` does.
        in_flight: requests of a batch that wait for their answers at the same time.

    Raises:
        ValueError: If `in_flight` is below 1.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        control_tokens: Collection[str],
        key: str | None = None,
        timeout_s: float = 120,
        in_flight: int = 8,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1; got {in_flight}")
        self.base_url, self.model, self.key, self.timeout_s = base_url.rstrip("/"), model, key, timeout_s
        self.control_tokens, self.in_flight = tuple(control_tokens), in_flight

    def __call__(self, batch: Sequence[Sequence[Message]]) -> list[str]:
        """Answers a batch of conversations, `in_flight` at a time, in their order.

        Raises:
            ServerError: See `stream`; the first in the batch's order, after all were asked.
            ValueError: If a message of the batch holds one of `control_tokens`; nothing is sent then.
        """
        for messages in batch:
            self._refuse_control_tokens(messages)
        with ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(lambda messages: "".join(self.stream(messages)), batch))

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 64) -> Iterator[str]:
        """Yields the answer's pieces as they arrive (server-sent events), chosen greedily.

        Raises:
            ServerError: If the server cannot be reached, refuses, or ends before its answer does.
            ValueError: If a message holds one of `control_tokens`; nothing is sent then.
        """
        self._refuse_control_tokens(messages)
        asked = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0}
        with self._open("/v1/chat/completions", asked | {"stream": True}) as response:
            finished = False
            for line in response:
                data = line.decode("utf-8").strip().removeprefix("data:").strip()
                if not data.startswith("{"):
                    finished |= data == "[DONE]"
                    continue
                for choice in json.loads(data).get("choices", ()):
                    finished |= choice.get("finish_reason") is not None
                    yield choice.get("delta", {}).get("content") or ""
        if not finished:
            raise ServerError(f"{self.base_url} ended before its answer did")

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if held := [mark for mark in self.control_tokens if mark in str(message["content"])]:
                raise ValueError(f"a message must hold no control token; got {held[0]}")

    def models(self) -> list[str]:
        """Returns the names of the models that the server offers.

        Raises:
            ServerError: See `stream`.
        """
        with self._open("/v1/models") as response:
            return [model["id"] for model in json.load(response)["data"]]

    def _open(self, path: str, body: dict | None = None):
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(self.base_url + path, data=data, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            words = error.read(500).decode("utf-8", errors="replace")
            raise ServerError(f"{self.base_url}{path} refused with status {error.code}: {words}") from None
        except OSError as error:
            raise ServerError(f"{self.base_url} cannot be reached: {error}") from None
