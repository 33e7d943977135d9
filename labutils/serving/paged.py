"""A Llama decoder for many requests at once: `FastLlama`'s layers over a cache that is cut into blocks.

The matrices see the tokens of all requests as rows of one input, so a step reads the weights once; attention is
computed request by request, over the blocks of its table (Orca's selective batching). All layers run in C
where the kernels are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from labutils.generation.fast_llama import FastLlama
from labutils.generation.llama_steps import attend, rms_norm, swiglu
from labutils.serving.scheduler import Chunk, Step


def slots(table: Sequence[int], count: int, block_size: int) -> Int[np.ndarray, " count"]:
    """Where the first `count` positions of a block table lie in the cache.

    >>> slots([5, 0], 3, 2).tolist()
    [10, 11, 0]
    """
    return (np.array(table)[:, None] * block_size + np.arange(block_size)).ravel()[:count]


class PagedLlama:
    """Computes a scheduler's steps with a `FastLlama`, whose cache becomes the memory of the blocks.

    All layers run in one call into C, which gives a token the same bits alone and among others, in chunks of any
    length. Without the kernels, and with packed layers of several schemes, NumPy computes attention and may differ in
    the last bits, since it chooses the order of sums by the number of rows. Such a difference becomes another token
    only where two logits nearly tie; activations that are rounded to int8 make it larger.

    Args:
        decoder: Its `max_length` is the number of positions in all blocks together.
        block_size: Positions of a block.

    Raises:
        ValueError: If not even one block fits.
    """

    def __init__(self, decoder: FastLlama, *, block_size: int) -> None:
        self.blocks = decoder.max_length // block_size
        if self.blocks < 1:
            raise ValueError(f"max_length must hold a block of {block_size} positions; got {decoder.max_length}")
        self.decoder, self.block_size = decoder, block_size

    def __call__(self, step: Step) -> Float[Tensor, "sampled vocab"]:
        """The logits after each chunk that samples, in the step's order."""
        hidden = self.read(step)
        ends = np.cumsum([c.end - c.start for c in step.chunks]) - 1
        last = [end for end, chunk in zip(ends, step.chunks, strict=True) if chunk.samples]
        return self.logits(hidden[last]) if last else torch.zeros(0, 0)

    def read(self, step: Step) -> Float[np.ndarray, "tokens hidden"]:
        """Copies the step's blocks, takes in the tokens of its chunks and returns the last layer's output for each."""
        decoder, few, chunks = self.decoder, self.decoder.few_tokens, step.chunks
        for source, target in step.copies:
            old, new = (slice(b * self.block_size, (b + 1) * self.block_size) for b in (source, target))
            decoder.keys[:, :, new], decoder.values[:, :, new] = decoder.keys[:, :, old], decoder.values[:, :, old]
        token_ids = [token for c in chunks for token in c.request.token_ids[c.start : c.end]]
        with np.errstate(over="ignore"), torch.inference_mode():
            hidden = few.embed(token_ids) if few else decoder.embedding(torch.tensor(token_ids)).float().numpy()
            self._through_layers(hidden, chunks)
        return hidden

    def logits(self, hidden: Float[np.ndarray, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """What the head makes of the last layer's output."""
        decoder = self.decoder
        if decoder.few_tokens:
            return decoder.few_tokens.head(hidden)
        return torch.from_numpy(decoder.head(rms_norm(hidden, decoder.final_gain, decoder.eps), decoder.matvec))

    def _through_layers(self, hidden: np.ndarray, chunks: Sequence[Chunk]) -> None:
        decoder = self.decoder
        if decoder.few_tokens:
            tables = [np.array(c.request.table, np.int64) for c in chunks]
            spans = [np.arange(c.start, c.end) for c in chunks]
            each = [table for table, span in zip(tables, spans, strict=True) for _ in span]
            decoder.few_tokens.paged(hidden, np.concatenate(spans), each, self.block_size)
            return
        places = [slots(c.request.table, c.end, self.block_size) for c in chunks]
        for index, layer in enumerate(decoder.layers):
            qkv = layer.qkv(rms_norm(hidden, layer.attention_gain, decoder.eps), decoder.matvec)
            hidden += layer.output(self._attend(qkv, index, chunks, places), decoder.matvec)
            gate_up = layer.gate_up(rms_norm(hidden, layer.mlp_gain, decoder.eps), decoder.matvec)
            hidden += layer.down(swiglu(gate_up), decoder.matvec)

    def _attend(self, qkv: np.ndarray, index: int, chunks: Sequence[Chunk], places: list[np.ndarray]) -> np.ndarray:
        """Gathers each request's keys and values, attends, and puts the new ones back."""
        decoder, mixed, row = self.decoder, [], 0
        keys, values = decoder.keys[index], decoder.values[index]
        for chunk, place in zip(chunks, places, strict=True):
            start, rows = chunk.start, slice(row, row + chunk.end - chunk.start)
            near_keys, near_values = keys[:, place], values[:, place]
            cos, sin = decoder.cos[start : chunk.end], decoder.sin[start : chunk.end]
            mixed.append(attend(qkv[rows], near_keys, near_values, cos, sin, start))
            keys[:, place[start:]], values[:, place[start:]] = near_keys[:, start:], near_values[:, start:]
            row = rows.stop
        return np.concatenate(mixed)
