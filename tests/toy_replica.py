"""A replica whose model is arithmetic on what lies in its blocks: quick to start, and wrong where a block is."""

import time

import numpy as np
import torch

from labutils.serving.engine import Engine
from labutils.serving.scheduler import Limits

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
