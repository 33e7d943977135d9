"""Context parallelism: a text longer than one device holds (ring attention, Liu et al. 2023, arXiv:2310.01889).

Each rank keeps the queries of its slice; the keys and values go round the ring. What a rank has seen so far is merged
with what arrives, exactly, because a softmax over two parts is a weighted mean of both (Milakov and Gimelshein 2018,
arXiv:1805.02867).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from labutils.distributed.collectives import Comm

Heads = Float[Tensor, "heads queries head_dim"]


def partial_attention(
    query: Heads, key: Float[Tensor, "heads keys head_dim"], value: Float[Tensor, "heads keys head_dim"], offset: int
) -> tuple[Heads, Float[Tensor, "heads queries"]]:
    """Attends to one slice of the keys: softmax(QK^T/sqrt(d))V over it, and the log of the softmax's denominator.

    Args:
        query: Rotated queries.
        key: One slice's rotated keys.
        value: The slice's values.
        offset: Position of the first query minus position of the first key; keys after a query are hidden from it.
            A query that sees no key gets output 0 and log denominator -inf.
    """
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    positions = [torch.arange(length, device=query.device) for length in (key.shape[1], query.shape[1])]
    ahead = positions[0] > positions[1][:, None] + offset
    scores = scores.masked_fill(ahead, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0) @ value, scores.logsumexp(dim=-1)


def merge_attention(
    output: Heads, log_sum: Float[Tensor, "heads queries"], other: Heads, other_log_sum: Float[Tensor, "heads queries"]
) -> tuple[Heads, Float[Tensor, "heads queries"]]:
    """Joins attention over two disjoint sets of keys: L = log(e^a + e^b), o = o_a e^(a-L) + o_b e^(b-L)."""
    total = torch.logaddexp(log_sum, other_log_sum)
    weight = (log_sum - total).exp().nan_to_num(0.0)[..., None]
    return output * weight + other * (other_log_sum - total).exp().nan_to_num(0.0)[..., None], total


def ring_attention(query: Heads, key: Heads, value: Heads, comm: Comm) -> Heads:
    """Causal attention of a text of which every rank holds an equal slice, in order.

    After step s, rank r holds the keys of rank r - s. Later slices are hidden from earlier queries, so they are passed
    on without being used.
    """
    length = query.shape[1]
    output, log_sum = partial_attention(query, key, value, offset=0)
    travelling = torch.stack([key, value])
    for step in range(1, comm.size):
        comm.send(travelling, (comm.rank + 1) % comm.size)
        travelling = comm.receive(tuple(travelling.shape), travelling.dtype, (comm.rank - 1) % comm.size)
        source = comm.rank - step
        if source >= 0:
            part = partial_attention(query, *travelling, offset=(comm.rank - source) * length)
            output, log_sum = merge_attention(output, log_sum, *part)
    comm.flush()
    return output
