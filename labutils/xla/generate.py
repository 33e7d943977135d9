"""Generation in compiled pieces: prompts padded to buckets, one jitted step, or the whole loop as one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from labutils.lab.layers.architecture import require_token_ids
from labutils.xla import llama
from labutils.xla.lazy import Array, jax, jnp, lax

BUCKETS = (16, 64, 256, 1024)


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens: one compiled program serves all lengths of a bucket.

    >>> bucket_for(17, (16, 64)), bucket_for(16, (16, 64))
    (64, 16)

    Raises:
        ValueError: If `length` is below 1 or no bucket is large enough.
    """
    fitting = [bucket for bucket in buckets if bucket >= length]
    if length < 1 or not fitting:
        raise ValueError(f"length must lie in 1 to the largest bucket, {max(buckets)}; got {length}")
    return min(fitting)


def padding_share(lengths: Sequence[int], buckets: Sequence[int]) -> float:
    """Share of all positions computed that are padding.

    >>> padding_share([8, 16], (16,))
    0.25
    """
    computed = sum(bucket_for(length, buckets) for length in lengths)
    return 1 - sum(lengths) / computed


def prefill(
    params: dict, padded_ids: Int[Array, " bucket"], length, cache: llama.Cache, *, shape: llama.Shape
) -> tuple:
    """Reads a prompt padded on the right to its bucket: the logits (vocab,) after its last token, and the cache.

    The padding's keys and values lie behind the text: no earlier token sees them, and decoding overwrites them.
    """
    hidden, cache = llama.forward(params, padded_ids, cache, 0, shape=shape)
    return llama.logits_of(params, hidden[length - 1], shape), cache


def decode_one_token(params: dict, token, cache: llama.Cache, position, *, shape: llama.Shape) -> tuple:
    """Feeds one token at `position`; returns the logits (vocab,) of the next, and the cache."""
    hidden, cache = llama.forward(params, jnp.reshape(token, (1,)), cache, position, shape=shape)
    return llama.logits_of(params, hidden[0], shape), cache


def decode_scan(
    step: Callable[..., tuple], cache, token, position, *, new_tokens: int
) -> tuple[Int[Array, " new_tokens"], Any]:
    """Greedy decoding as one `lax.scan`: Python leaves after tracing, and the loop runs inside the compiled program.

    `step(token, cache, position)` returns (logits, cache). `token` is the first to be fed; the tokens returned are
    those that follow it.
    """

    def body(carry: tuple, _) -> tuple:
        token, cache, position = carry
        logits, cache = step(token, cache, position)
        token = jnp.argmax(logits).astype(jnp.int32)
        return (token, cache, position + 1), token

    (_, cache, _), tokens = lax.scan(body, (token, cache, position), length=new_tokens)
    return tokens, cache


class XlaLlama:
    """A Hugging Face Llama, decoded by compiled programs; each is compiled at its first call, and `jit` keeps it.

    Args:
        model: A `LlamaForCausalLM`.
        max_length: Positions that the cache has room for.
        dtype: Of the weights and the cache.
        buckets: Lengths that prompts are padded to, cut at `max_length`.
        donate: Whether a step may overwrite the cache that it gets, which then cannot be read any more.
        params: The weights that another decoder of the same model and `max_length` holds, to share them.

    Raises:
        ValueError: If the model differs from Llama in a way that this decoder does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int,
        dtype: str = "float32",
        buckets: Sequence[int] = BUCKETS,
        donate: bool = True,
        params: dict | None = None,
    ) -> None:
        self.shape = llama.shape_of(model.config, max_length=max_length)
        self.params, self.dtype = params or llama.params_of(model, self.shape, dtype=dtype), dtype
        self.buckets = tuple(sorted({min(bucket, max_length) for bucket in (*buckets, max_length)}))
        donated = {"donate_argnames": "cache"} if donate else {}
        self.prefill = jax.jit(_named("prefill", prefill, shape=self.shape), **donated)
        self.step = jax.jit(_named("decode_one_token", decode_one_token, shape=self.shape), **donated)
        self.scan = jax.jit(_named("decode_scan", self._scan), static_argnames="new_tokens", **donated)

    def _scan(self, params: dict, token, cache: llama.Cache, position, *, new_tokens: int) -> tuple:
        step = partial(decode_one_token, params, shape=self.shape)
        return decode_scan(step, cache, token, position, new_tokens=new_tokens)

    def read(self, token_ids: Sequence[int]) -> tuple[Float[Array, " vocab"], llama.Cache]:
        """Reads a prompt through its bucket into an empty cache: the logits after its last token, and the cache.

        Raises:
            IndexError: For an id that is no token's: XLA would read another token's row in silence.
            ValueError: For no token, or more than the largest bucket.
        """
        require_token_ids(token_ids, len(self.params["embedding"]))
        padded = np.zeros(bucket_for(len(token_ids), self.buckets), np.int32)
        padded[: len(token_ids)] = token_ids
        cache = llama.empty_cache(self.shape, dtype=self.dtype)
        return self.prefill(self.params, padded, len(token_ids), cache)

    def generate(self, token_ids: Sequence[int], new_tokens: int, *, in_one_program: bool = True) -> list[int]:
        """Greedy continuation of `new_tokens` tokens: step by step from Python, or all steps in one program.

        Raises:
            IndexError: For an id that is no token's.
            ValueError: If the text would not fit into `max_length`.
        """
        end = len(token_ids) + new_tokens
        if new_tokens < 1 or end > self.shape.max_length:
            raise ValueError(f"1 to max_length={self.shape.max_length} positions; got {len(token_ids)} + {new_tokens}")
        logits, cache = self.read(token_ids)
        tokens = [jnp.argmax(logits).astype(jnp.int32)]
        if in_one_program and new_tokens > 1:
            rest, _ = self.scan(self.params, tokens[0], cache, len(token_ids), new_tokens=new_tokens - 1)
            return [int(tokens[0]), *rest.tolist()]
        for position in range(len(token_ids), end - 1):
            logits, cache = self.step(self.params, tokens[-1], cache, position)
            tokens.append(jnp.argmax(logits).astype(jnp.int32))
        return [int(token) for token in tokens]


class AsTorch:
    """Wears the decoder as a Hugging Face model, so that the course's own measures of quality can use it."""

    device = torch.device("cpu")

    def __init__(self, decoder: XlaLlama) -> None:
        self.decoder = decoder
        rows = jax.vmap(partial(_all_logits, shape=decoder.shape), in_axes=(None, 0, None))
        self._logits = jax.jit(_named("all_logits", rows))

    def __call__(self, input_ids: Int[torch.Tensor, "batch positions"], **_) -> SimpleNamespace:
        """Returns an object whose `logits` are those of every position, through the same buckets.

        Raises:
            IndexError: For an id that is no token's.
        """
        require_token_ids(input_ids.flatten().tolist(), len(self.decoder.params["embedding"]))
        count = input_ids.shape[1]
        padded = np.zeros((len(input_ids), bucket_for(count, self.decoder.buckets)), np.int32)
        padded[:, :count] = input_ids.numpy()
        cache = llama.empty_cache(self.decoder.shape, dtype=self.decoder.dtype)
        logits = self._logits(self.decoder.params, padded, cache)
        return SimpleNamespace(logits=torch.from_numpy(np.array(logits[:, :count])))


def _all_logits(params: dict, ids: Array, cache: llama.Cache, *, shape: llama.Shape) -> Array:
    hidden, _ = llama.forward(params, ids, cache, 0, shape=shape)
    return llama.logits_of(params, hidden, shape)


def _named(name: str, function: Callable, **settings) -> Callable:
    """The function with some arguments filled in, under a name that compilations and profiles show."""
    filled = partial(function, **settings)
    filled.__name__ = name
    return filled
