"""Streaming: one token at a time as text that is never torn inside a character, with honest times.

Two numbers, never mixed: the *time to first token* is prefill (it grows with the prompt), the *time per output
token* is decoding (it is what tokens/s means). One mean over both describes neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from labutils.generation.cache import KVCache
from labutils.generation.decode import decode_one_token, prefill
from labutils.generation.sampling import greedy

INCOMPLETE = "\ufffd"


@runtime_checkable
class Decoder(Protocol):
    """Anything that reads a prompt and then one token at a time; `FastLlama` is one as it stands."""

    def prefill(self, token_ids: Tensor) -> Tensor:
        """Returns the logits (1, vocab) after the prompt."""

    def decode_one_token(self, next_ids: Tensor) -> Tensor:
        """Returns the logits (1, vocab) after one more token."""


class CachedDecoder:
    """A Hugging Face causal LM with our growing cache, as a `Decoder`."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, KVCache()

    def prefill(self, token_ids: Int[Tensor, "1 positions"]) -> Tensor:
        """Reads the prompt into the cache."""
        return prefill(self.model, token_ids, self.cache)

    def decode_one_token(self, next_ids: Int[Tensor, "1"]) -> Tensor:
        """Feeds one token."""
        return decode_one_token(self.model, next_ids, self.cache)


@dataclass(frozen=True)
class StreamedToken:
    """One token as it arrives.

    Attributes:
        token_id: The token.
        text: What became readable with it: empty while a character is incomplete.
        seconds: Since the token before; for the first one since the prompt was handed in.
    """

    token_id: int
    text: str
    seconds: float


@dataclass(frozen=True)
class StreamTimes:
    """Times of a finished stream."""

    time_to_first_token_s: float
    seconds_per_token: tuple[float, ...]

    @classmethod
    def of(cls, tokens: Sequence[StreamedToken]) -> StreamTimes:
        """Splits the first token's time from the others'.

        >>> StreamTimes.of([StreamedToken(1, "a", 0.5), StreamedToken(2, "b", 0.1)]).tokens_per_s
        10.0

        Raises:
            ValueError: If there is no token.
        """
        if not tokens:
            raise ValueError("times need at least one token; got none")
        return cls(tokens[0].seconds, tuple(t.seconds for t in tokens[1:]))

    @property
    def time_per_output_token_s(self) -> float | None:
        """Median seconds per token after the first; None if there was only one."""
        return statistics.median(self.seconds_per_token) if self.seconds_per_token else None

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed: 1 / time per output token."""
        return 1 / self.time_per_output_token_s if self.seconds_per_token else None


class TextPieces:
    """Turns token ids into text pieces that join to the tokenizer's own decoding.

    A token may end in the middle of a UTF-8 character (an emoji has four bytes, a byte-level token may hold one),
    which decodes to U+FFFD: such text is held back until the next token completes it. Only the ids since the last
    released piece are decoded, plus those of that piece, because some tokenizers drop a leading space.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.context_start = self.released = 0

    def push(self, token_id: int) -> str:
        """Takes one id and returns the text that is complete now; perhaps none."""
        self.ids.append(token_id)
        text = self.decode(self.ids[self.context_start :])
        return "" if text.endswith(INCOMPLETE) else self._release(text)

    def flush(self) -> str:
        """Returns what was held back, as the tokenizer shows it."""
        return self._release(self.decode(self.ids[self.context_start :]))

    def _release(self, text: str) -> str:
        piece = text[len(self.decode(self.ids[self.context_start : self.released])) :]
        self.context_start, self.released = self.released, len(self.ids)
        return piece


def stream(
    decoder: Decoder,
    tokenizer,
    token_ids: Int[Tensor, "1 positions"],
    max_new_tokens: int,
    *,
    choose: Callable[[Tensor], Tensor] = greedy,
    stop: Collection[int] = (),
) -> Iterator[StreamedToken]:
    """Yields tokens as they are made; the clock runs only inside the decoder and the choice.

    Args:
        decoder: Fresh: nothing cached yet.
        tokenizer: A Hugging Face tokenizer; its `decode` is used.
        token_ids: One prompt.
        max_new_tokens: At most this many tokens.
        choose: Logits to ids: `greedy` or a `Sampler`.
        stop: Ids that end the stream; the stop token itself is yielded, with the text held back so far.

    Raises:
        ValueError: If `max_new_tokens` is below 1 or there is more than one prompt.
    """
    if max_new_tokens < 1 or token_ids.shape[0] != 1:
        got = f"{tuple(token_ids.shape)}, {max_new_tokens}"
        raise ValueError(f"streaming needs one prompt and at least 1 new token; got {got}")
    return _stream(decoder, tokenizer, token_ids, max_new_tokens, choose, stop)


def _stream(decoder, tokenizer, token_ids, max_new_tokens, choose, stop) -> Iterator[StreamedToken]:
    pieces = TextPieces(lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    next_ids = None
    for made in range(1, max_new_tokens + 1):
        began = time.perf_counter()
        logits = decoder.prefill(token_ids) if next_ids is None else decoder.decode_one_token(next_ids)
        next_ids = choose(logits)
        token_id = int(next_ids)  # waits for the device, so the time below is the token's
        seconds = time.perf_counter() - began
        last = made == max_new_tokens or token_id in stop
        yield StreamedToken(token_id, pieces.push(token_id) + (pieces.flush() if last else ""), seconds)
        if last:
            return
