"""Pipeline parallelism by hand (GPipe, Huang et al. 2018, arXiv:1811.06965): layers over ranks, batches in flight.

A stage works on one piece while the next stage works on the one before. Works for models built like Llama.
"""

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from labutils.distributed.collectives import Comm


def stage_layers(layers: int, stages: int) -> list[range]:
    """Splits layers 0..layers-1 into contiguous stages; the first stages get one more where it does not divide.

    >>> stage_layers(5, 2)
    [range(0, 3), range(3, 5)]

    Raises:
        ValueError: If there are more stages than layers.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"a pipeline needs between 1 and num_hidden_layers={layers} stages; got {stages}")
    quotient, rest = divmod(layers, stages)
    starts = [stage * quotient + min(stage, rest) for stage in range(stages + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def bubble(stages: int, micro_batches: int) -> float:
    """Returns the share of time that stages stand idle in a GPipe forward pass: (p-1)/(m+p-1).

    >>> bubble(4, 1), bubble(2, 3)
    (0.75, 0.25)
    """
    return (stages - 1) / (micro_batches + stages - 1)


def pipeline_s(stage_s: Sequence[float], micro_batches: int) -> float:
    """Returns when the last micro-batch leaves the last stage: the first passes all stages, the slowest sets the pace.

    sum(t) + (m-1) max(t), for stages that take the same time for every micro-batch.

    >>> pipeline_s([1.0, 3.0], 2)
    7.0
    """
    return sum(stage_s) + (micro_batches - 1) * max(stage_s)


class Stage:
    """One rank's layers of a Llama-like causal LM; the first stage embeds, the last one has the head."""

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        """Takes the layers of this rank out of `model`, in place.

        Raises:
            ValueError: If there are more ranks than layers.
        """
        mine = stage_layers(model.config.num_hidden_layers, comm.size)[comm.rank]
        self.model, self.comm = model, comm
        self.first, self.last = comm.rank == 0, comm.rank == comm.size - 1
        body = model.model
        body.layers = nn.ModuleList(body.layers[mine.start : mine.stop])
        for index, layer in enumerate(body.layers):
            layer.self_attn.layer_idx = index  # its place in this stage's own cache
        if not self.first:
            body.embed_tokens = nn.Identity()
        if not self.last:
            body.norm = model.lm_head = nn.Identity()

    @torch.no_grad()
    def __call__(self, x: Tensor, cache=None) -> Tensor:
        """Runs the layers: token ids or hidden states in, hidden states or the last position's logits out."""
        inputs = {"input_ids": x} if self.first else {"inputs_embeds": x}
        hidden = self.model.model(**inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        return self.model.lm_head(hidden) if self.last else hidden


def gpipe_forward(
    forward: Callable[[Tensor], Tensor],
    comm: Comm,
    micro_batches: Sequence[Tensor],
    *,
    shape: Callable[[Tensor], tuple[int, ...]],
) -> tuple[list[Tensor], list[tuple[float, float]]]:
    """Passes micro-batches through the stages, each as soon as it arrives.

    Args:
        forward: This rank's part.
        comm: The stages' group.
        micro_batches: What goes into the first stage; the others look only at their shapes.
        shape: Shape of what one stage hands to the next, from the micro-batch.

    Returns:
        The last stage's outputs (empty elsewhere), and when this rank began and ended each piece of work.
    """
    outputs, times = [], []
    for ids in micro_batches:
        x = ids if comm.rank == 0 else comm.receive(shape(ids), torch.float32, comm.rank - 1)
        began = time.monotonic()
        y = forward(x)
        times.append((began, time.monotonic()))
        if comm.rank < comm.size - 1:
            comm.send(y, comm.rank + 1)
        else:
            outputs.append(y)
    comm.flush()
    return outputs, times


def measured_bubble(times_by_rank: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Returns the idle share of all ranks between the first beginning and the last end.

    >>> measured_bubble([[(0.0, 1.0)], [(1.0, 2.0)]])
    0.5
    """
    intervals = [interval for times in times_by_rank for interval in times]
    total = max(end for _, end in intervals) - min(begin for begin, _ in intervals)
    return 1 - sum(end - begin for begin, end in intervals) / (total * len(times_by_rank))


def pipeline_generate(
    stage: Stage, groups: Sequence[Int[Tensor, "batch positions"]], new_tokens: int
) -> list[Int[Tensor, "batch longer"]]:
    """Decodes greedily with every group of prompts in flight at once; each stage keeps a cache for each group.

    A single group uses one stage at a time. With as many groups as stages, all can be busy: while stage 1 works on
    group 0, stage 0 works on group 1. The last stage sends the chosen tokens back to the first.

    Returns:
        Prompts and continuations, on the last stage; empty elsewhere.
    """
    from transformers import DynamicCache

    comm, last = stage.comm, stage.comm.size - 1
    caches, texts = [DynamicCache() for _ in groups], list(groups)
    chosen: dict[int, Tensor] = {}
    for step in range(new_tokens):
        for g, prompt in enumerate(groups):
            batch, length = prompt.shape[0], prompt.shape[1] if step == 0 else 1
            if not stage.first:
                x = comm.receive((batch, length, stage.model.config.hidden_size), torch.float32, comm.rank - 1)
            elif step == 0:
                x = prompt
            else:
                x = chosen.pop(g) if stage.last else comm.receive((batch, 1), torch.long, last)
            y = stage(x, caches[g])
            if not stage.last:
                comm.send(y, comm.rank + 1)
                continue
            next_ids = y[:, -1:].argmax(dim=-1)
            texts[g] = torch.cat([texts[g], next_ids], dim=1)
            if stage.first:
                chosen[g] = next_ids
            elif step < new_tokens - 1:
                comm.send(next_ids, 0)
    comm.flush()
    return texts if stage.last else []
