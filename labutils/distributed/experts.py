"""Expert parallelism: experts over ranks, tokens travel there and back (Lepikhin et al. 2020, arXiv:2006.16668)."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from labutils.distributed.collectives import Comm


def expert_parallel(
    x: Float[Tensor, "tokens hidden"],
    expert_ids: Int[Tensor, "tokens k"],
    gates: Float[Tensor, "tokens k"],
    experts: Sequence[Callable[[Tensor], Tensor]],
    comm: Comm,
) -> Float[Tensor, "tokens hidden"]:
    """Sends each token to the ranks of its k experts, brings the results back and adds them up by their gates.

    Four all-to-alls: how many rows come, the rows, their experts' numbers, and the results. The meter counts the rows
    of the second and the fourth as "dispatch" and "combine", the small ones by name.

    Args:
        x: This rank's tokens.
        expert_ids: Each token's experts, out of comm.size * len(experts).
        gates: The weights of their results.
        experts: The experts of this rank: rank r holds number r * len(experts) and those after it.
        comm: The experts' group.
    """
    choices = expert_ids.flatten()
    order = choices.argsort(stable=True)
    outgoing = torch.bincount(choices // len(experts), minlength=comm.size)
    there = outgoing.tolist()
    back = _exchange("counts", outgoing, [1] * comm.size, [1] * comm.size, comm).tolist()
    arrived = _exchange("dispatch", x[order // expert_ids.shape[1]], back, there, comm)
    wanted = _exchange("expert ids", choices[order], back, there, comm) - comm.rank * len(experts)
    results = torch.empty_like(arrived)
    for local, expert in enumerate(experts):
        results[wanted == local] = expert(arrived[wanted == local])
    returned = x.new_empty(len(choices), x.shape[1])
    returned[order] = _exchange("combine", results, there, back, comm)
    return torch.einsum("tk,tkh->th", gates, returned.view(*expert_ids.shape, -1))


def _exchange(kind: str, rows: Tensor, received: list[int], sent: list[int], comm: Comm) -> Tensor:
    """Sends `sent[r]` rows to each rank r and returns `received[r]` rows from each."""
    start = sum(sent[: comm.rank])
    comm.count(kind, rows.nbytes - rows[start : start + sent[comm.rank]].nbytes)
    output = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=comm.group)
    return output
