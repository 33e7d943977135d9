"""Speculative decoding of several streams: one step of the target reads the last tokens and the guesses of all.

Chapter 10's proposers and verifier, over the paged memory of chapter 11. Each stream accepts as many guesses as stand
in it, so after the first step no two streams have the same length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from labutils.decoding.proposers import Proposer
from labutils.decoding.verify import up_to_stop, verify
from labutils.generation.sampling import greedy
from labutils.serving.blocks import BlockPool
from labutils.serving.paged import PagedLlama
from labutils.serving.scheduler import Chunk, Request, Step


@dataclass(frozen=True)
class BatchSpeculation:
    """Finished texts, and what came after the prompts: steps of the target, seconds with drafting, guesses, accepted.

    Attributes:
        new_ids: The new tokens of each stream; the first of them comes from its prompt's logits.
    """

    new_ids: list[list[int]]
    steps: int
    seconds: float
    drafted: int
    accepted: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens that the steps made, of all streams together, for each second."""
        return sum(len(ids) - 1 for ids in self.new_ids) / self.seconds if self.seconds else float("nan")


def generate_speculative_batch(
    model: PagedLlama,
    proposers: Sequence[Proposer],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    draft_tokens: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    stop: Collection[int] = (),
) -> BatchSpeculation:
    """Generates what the target alone would write behind each prompt, but for near-ties: see `PagedLlama`.

    A stream that has ended leaves the batch.

    Args:
        model: The target; what its memory holds is lost.
        proposers: One for each stream. Each has seen its prompt before the clock starts.
        prompts: Token ids, at least one each.
        max_new_tokens: At most this many for each stream.
        draft_tokens: γ: guesses a step and stream, at most; 0 is plain decoding.
        choose: `greedy` or a `Sampler`.
        stop: Ids that end a text; the stop token itself is kept.

    Raises:
        ValueError: If there is no prompt, an empty one, not one proposer for each, no new token, or too little memory
            for all streams.
    """
    if not prompts or len(prompts) != len(proposers) or not all(prompts) or max_new_tokens < 1 or draft_tokens < 0:
        shape = f"{[len(ids) for ids in prompts]}, {len(proposers)}, {max_new_tokens} and {draft_tokens}"
        rule = "each stream needs a prompt and a proposer, max_new_tokens at least 1 and draft_tokens at least 0"
        raise ValueError(f"{rule}; got lengths {shape}")
    streams = [Request(ids, max_new_tokens) for ids in prompts]
    pool = BlockPool(model.blocks, block_size=model.block_size)
    for stream, proposer in zip(streams, proposers, strict=True):
        stream.table = pool.allocate([], -(-(stream.prompt + max_new_tokens) // pool.block_size))
        logits = model(Step((Chunk(stream, 0, stream.prompt),), (), ()))
        proposer.propose(stream.token_ids, 1)
        stream.token_ids.append(int(choose(logits)))
    began, counts = time.perf_counter(), []
    pairs = list(zip(streams, proposers, strict=True))
    while alive := [
        pair for pair in pairs if len(pair[0].new_ids) < max_new_tokens and pair[0].token_ids[-1] not in stop
    ]:
        counts.append(_step(model, alive, draft_tokens, choose, stop))
    seconds = time.perf_counter() - began
    drafted, accepted = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return BatchSpeculation([stream.new_ids for stream in streams], len(counts), seconds, drafted, accepted)


def _step(model: PagedLlama, alive, draft_tokens: int, choose, stop: Collection[int]) -> tuple[int, int]:
    """Lengthens every stream; returns how many tokens were drafted and how many of them stood."""
    chunks, proposals = [], []
    for stream, proposer in alive:
        room = stream.max_new_tokens - len(stream.new_ids) - 1
        proposals.append(proposer.propose(list(stream.token_ids), min(draft_tokens, room)))
        start = len(stream.token_ids) - 1
        stream.token_ids += proposals[-1].token_ids
        chunks.append(Chunk(stream, start, len(stream.token_ids)))
    logits = model.logits(model.read(Step(tuple(chunks), (), ())))
    accepted = 0
    for chunk, proposal, rows in zip(chunks, proposals, logits.split([c.end - c.start for c in chunks]), strict=True):
        verdict = verify(rows, proposal.token_ids, proposal.probs, choose=choose)
        new = [*proposal.token_ids[: verdict.accepted], verdict.token]
        chunk.request.token_ids[chunk.start + 1 :] = up_to_stop(new, stop)
        accepted += verdict.accepted
    return sum(len(proposal.token_ids) for proposal in proposals), accepted
