"""OpenAI's HTTP forms in plain Python: requests read and refused field by field, answers and errors written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

# Fields that change nothing here; what else is unknown is refused, so that nobody believes it had an effect.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
MAX_STOPS = 4


class ApiError(Exception):
    """What a client is told in OpenAI's form, with the status of HTTP."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        """The JSON that OpenAI's clients turn into an exception."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wanted:
    """What a client asks for, verified.

    Attributes:
        prompt: Messages of a chat, a text, or token ids.
        max_tokens: None: as many as fit.
        usage: Whether a stream ends with a count of tokens.
    """

    chat: bool
    prompt: object
    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    priority: int
    salt: str


def parse(body: bytes, *, chat: bool) -> Wanted:
    """Reads a request to `/v1/chat/completions` or `/v1/completions`.

    >>> parse(b'{"model": "lablm", "prompt": "Hi", "max_tokens": 3}', chat=False).max_tokens
    3

    Raises:
        ApiError: With status 400 and the field that is wrong.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body must be JSON", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    fields = _Fields(data)
    prompt = fields.messages() if chat else fields.prompt()
    newer = fields.number("max_completion_tokens", None, 1, 2**31, whole=True)
    older = fields.number("max_tokens", None if chat else 16, 1, 2**31, whole=True)
    stream = fields.flag("stream")
    wanted = Wanted(
        chat=chat,
        prompt=prompt,
        model=fields.text("model", ""),
        max_tokens=newer or older,
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 1e-6, 1),
        seed=fields.number("seed", None, -(2**63), 2**63 - 1, whole=True),
        stop=fields.stops(),
        stream=stream,
        usage=fields.usage(stream),
        priority=fields.number("priority", 0, -1000, 1000, whole=True),
        salt=fields.text("cache_salt", ""),
    )
    fields.number("n", 1, 1, 1, whole=True)
    fields.refuse_others()
    return wanted


class _Fields:
    """A request's fields; each is taken once, and `null` counts as left out."""

    def __init__(self, data: Mapping) -> None:
        self.data = {name: value for name, value in data.items() if value is not None}

    def _take(self, name: str, default: object, rule: str, holds) -> object:
        value = self.data.pop(name, default)
        if value is not default and not holds(value):
            raise ApiError(400, f"{name} must be {rule}; got {str(value)[:80]}", param=name, code="invalid_value")
        return value

    def number(self, name: str, default, low: float, high: float, *, whole: bool = False):
        kinds = (int,) if whole else (int, float)
        rule = f"{'an integer' if whole else 'a number'} from {low} to {high}"
        return self._take(name, default, rule, lambda v: type(v) in kinds and math.isfinite(v) and low <= v <= high)

    def flag(self, name: str) -> bool:
        return self._take(name, False, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: str | None) -> str:
        return self._take(name, default, "a string", _is_text)

    def stops(self) -> tuple[str, ...]:
        rule = f"a string or up to {MAX_STOPS} strings, none of them empty"
        value = self._take("stop", (), rule, lambda v: all(map(_is_text, _listed(v))) and len(_listed(v)) <= MAX_STOPS)
        if "" in _listed(value):
            raise ApiError(400, f"stop must be {rule}", param="stop", code="invalid_value")
        return tuple(_listed(value))

    def usage(self, stream: bool) -> bool:
        rule = '{"include_usage": true or false}, with stream alone'
        options = self._take("stream_options", {}, rule, lambda v: isinstance(v, dict) and stream)
        if set(options) - {"include_usage", "include_obfuscation"}:
            raise ApiError(400, f"stream_options must be {rule}", param="stream_options", code="invalid_value")
        return options.get("include_usage") is True

    def messages(self) -> list[dict]:
        rule = 'a list of messages, each {"role": system, user or assistant, "content": a string or parts of text}'
        messages = self._take("messages", [], rule, lambda v: isinstance(v, list) and all(map(_is_message, v)))
        if not messages:
            raise ApiError(400, f"messages must be {rule}", param="messages", code="missing_required_parameter")
        return [{"role": m["role"].replace("developer", "system"), "content": _content(m["content"])} for m in messages]

    def prompt(self) -> str | list[int]:
        rule = "a string or a list of token ids, one prompt a request"
        value = self._take("prompt", None, rule, lambda v: _is_text(v) or (isinstance(v, list) and v != []))
        if isinstance(value, list) and len(value) == 1 and _is_text(value[0]):
            return value[0]
        if value is None or (isinstance(value, list) and not all(type(v) is int for v in value)):
            raise ApiError(400, f"prompt must be {rule}", param="prompt", code="invalid_value")
        return value

    def refuse_others(self) -> None:
        others = sorted(set(self.data) - WITHOUT_EFFECT)
        if others:
            message = f"{others[0][:80]} is not supported by this server"
            raise ApiError(400, message, param=others[0][:80], code="unsupported_parameter")


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _listed(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_message(value: object) -> bool:
    roles = ("system", "developer", "user", "assistant")
    return isinstance(value, dict) and value.get("role") in roles and _content(value.get("content")) is not None


def _content(value: object) -> str | None:
    """A message's text: a string, or the texts of its parts; None for anything else."""
    if not isinstance(value, list):
        return value if _is_text(value) else None
    texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(texts) if len(texts) == len(value) and all(map(_is_text, texts)) else None


@dataclass(frozen=True)
class Answer:
    """How one request's answers are written: its name, the time, the model, and whether it is a chat."""

    name: str
    created: int
    model: str
    chat: bool

    def whole(self, text: str, reason: str, usage: dict) -> dict:
        """The answer in one piece."""
        inner = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._form([inner], reason, "chat.completion") | {"usage": usage}

    def piece(self, text: str, reason: str | None, *, first: bool = False) -> dict:
        """One event of a stream."""
        role = {"role": "assistant"} if first else {}
        inner = {"delta": role | ({"content": text} if text or first else {})} if self.chat else {"text": text}
        return self._form([inner], reason, "chat.completion.chunk")

    def usage(self, usage: dict) -> dict:
        """The event that counts tokens, after all others."""
        return self._form([], None, "chat.completion.chunk") | {"usage": usage}

    def _form(self, inner: list[dict], reason: str | None, kind: str) -> dict:
        choices = [{"index": 0, "finish_reason": reason, "logprobs": None} | choice for choice in inner]
        kind = kind if self.chat else "text_completion"
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt: int, made: int, cached: int) -> dict:
    """The count of tokens, those found in the prefix cache among them."""
    counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


class StopText:
    """Cuts a stream of text at the first stop string, and holds back what may become one.

    >>> stop = StopText(("END",))
    >>> [stop.push(piece) for piece in ("a E", "N", "x EN", "D b")], stop.found
    (['a ', '', 'ENx ', ''], True)
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.held, self.found = stops, "", False

    def push(self, piece: str, *, last: bool = False) -> str:
        """Takes a piece of text and returns what is safe to send; the last one holds nothing back."""
        if self.found:
            return ""
        text = self.held + piece
        places = [text.find(stop) for stop in self.stops if stop in text]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        tails = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
        tail = "" if last else next((t for t in tails if any(stop.startswith(t) for stop in self.stops)), "")
        self.held = tail
        return text[: len(text) - len(tail)]
