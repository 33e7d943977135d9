"""Expert parallelism: experts over ranks, tokens travel there and back (Lepikhin et al. 2020, arXiv:2006.16668)."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from labutils.distributed.collectives import Comm


def expert_parallel(
    x: Float[Tensor, "tokens hidden"],
    expert_ids: Int[Tensor, " tokens"],
    experts: Sequence[Callable[[Tensor], Tensor]],
    comm: Comm,
) -> Float[Tensor, "tokens hidden"]:
    """Sends each token to the rank of its expert and brings the result back: two all-to-alls.

    Args:
        x: This rank's tokens.
        expert_ids: Each token's expert, out of comm.size * len(experts).
        experts: The experts of this rank: rank r holds number r * len(experts) and those after it.
        comm: The experts' group.
    """
    order = expert_ids.argsort(stable=True)
    destination = expert_ids // len(experts)
    outgoing = torch.bincount(destination, minlength=comm.size)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=comm.group)
    there, back = outgoing.tolist(), incoming.tolist()
    arrived = _exchange(x[order], back, there, comm)
    wanted = _exchange(expert_ids[order], back, there, comm) - comm.rank * len(experts)
    results = torch.empty_like(arrived)
    for local, expert in enumerate(experts):
        results[wanted == local] = expert(arrived[wanted == local])
    returned = torch.empty_like(x)
    returned[order] = _exchange(results, there, back, comm)
    return returned


def _exchange(rows: Tensor, received: list[int], sent: list[int], comm: Comm) -> Tensor:
    """Sends `sent[r]` rows to each rank r and returns `received[r]` rows from each."""
    start = sum(sent[: comm.rank])
    comm.count("all_to_all", rows.nbytes - rows[start : start + sent[comm.rank]].nbytes)
    output = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=comm.group)
    return output
