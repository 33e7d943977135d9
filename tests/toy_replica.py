"""A replica whose model is arithmetic on what lies in its blocks: quick to start, and wrong where a block is."""

import functools
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from labutils.serving.engine import Engine, run
from labutils.serving.scheduler import Limits, Request

BLOCKS, BLOCK, VOCAB = 64, 8, 97


class Toy:
    """The next token is Σ position · token, read back from memory."""

    blocks, block_size = BLOCKS, BLOCK

    def __init__(self):
        self.memory = np.zeros((BLOCKS, BLOCK), np.int64)

    def __call__(self, step):
        rows = []
        for source, target in step.copies:
            self.memory[target] = self.memory[source]
        for chunk in step.chunks:
            ids, table = chunk.request.token_ids, chunk.request.table
            for position in range(chunk.start, chunk.end):
                self.memory[table[position // BLOCK], position % BLOCK] = ids[position]
            if chunk.samples:
                read = self.memory[table].ravel()[: chunk.end]
                rows.append(torch.eye(VOCAB)[int(read @ np.arange(1, chunk.end + 1)) % VOCAB])
        time.sleep(0.002)
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)


def toy_engine():
    return Engine(Toy(), Limits(token_budget=64, max_running=2, max_waiting=8, max_positions=128))


def toy_text(prompt, count):
    """What the model writes behind a prompt."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum(n * token for n, token in enumerate(ids, start=1)) % VOCAB)
    return ids[len(prompt) :]


@dataclass(frozen=True)
class Served:
    """A replica's answer: its tokens, and how many of the prompt's were in its cache."""

    new_ids: list[int]
    cached: int


@dataclass(frozen=True)
class Replica:
    """Answers batches of prompts with an engine that each process makes once.

    Attributes:
        make: Makes the engine; a function that can be pickled.
        max_new_tokens: Of every answer.
    """

    make: Callable[[], Engine]
    max_new_tokens: int

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Served]:
        """Answers a batch, all at once; see `Engine.submit` for what is refused."""
        requests = run(_engine(pickle.dumps(self.make)), [Request(ids, self.max_new_tokens) for ids in prompts])
        return [Served(request.new_ids, request.cached) for request in requests]


@functools.cache
def _engine(make: bytes) -> Engine:
    """By what was pickled: each batch brings a new copy of the function."""
    return pickle.loads(make)()
