"""Tensor parallelism by hand (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3).

Every rank holds a slice of every matrix. The first matrix of a pair is cut by output (column parallel), the second by
input (row parallel), so that only the second's results are added up: two all-reduces a layer. Works for models built
like Llama, in place.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.distributed.collectives import Comm
from labutils.lab.layers.architecture import require_token_ids


def span(size: int, rank: int, ranks: int) -> range:
    """Returns the part of 0..size-1 that a rank holds; the first ranks hold one more where it does not divide.

    >>> [list(span(5, rank, 2)) for rank in (0, 1)]
    [[0, 1, 2], [3, 4]]
    """
    quotient, rest = divmod(size, ranks)
    start = rank * quotient + min(rank, rest)
    return range(start, start + quotient + (rank < rest))


def heads_of(rank: int, ranks: int, *, heads: int, kv_heads: int) -> tuple[range, range]:
    """Returns a rank's query heads and its key/value heads; heads are never cut.

    With grouped queries, query head q reads key/value head q // (heads // kv_heads). With more ranks than key/value
    heads, several ranks hold a copy of the same one.

    >>> heads_of(1, 2, heads=4, kv_heads=2), heads_of(1, 4, heads=4, kv_heads=2)
    ((range(2, 4), range(1, 2)), (range(1, 2), range(0, 1)))

    Raises:
        ValueError: If the heads cannot be shared out whole.
    """
    if heads % ranks:
        raise ValueError(f"the number of ranks must divide num_attention_heads={heads}; got {ranks}")
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"the number of ranks must divide num_key_value_heads={kv_heads} or be its multiple; got {ranks}"
        )
    queries = span(heads, rank, ranks)
    group = heads // kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_r W_r^T, + b: each rank multiplies its inputs, one all-reduce adds up."""

    def __init__(self, linear: nn.Linear, columns: Int[Tensor, " mine"], comm: Comm) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[:, columns].clone(), requires_grad=False)
        self.bias, self.comm = linear.bias, comm

    def forward(self, x: Float[Tensor, "... mine"]) -> Float[Tensor, "... out"]:
        """Multiplies, adds up over the ranks, and adds the bias once."""
        y = self.comm.all_reduce_(nn.functional.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens whose rows it holds and gives zeros for the others; one all-reduce adds up."""

    def __init__(self, weight: Float[Tensor, "mine hidden"], mine: range, vocab: int, comm: Comm) -> None:
        super().__init__()
        self.weight, self.mine, self.vocab, self.comm = nn.Parameter(weight, requires_grad=False), mine, vocab, comm

    def forward(self, token_ids: Int[Tensor, "batch positions"]) -> Float[Tensor, "batch positions hidden"]:
        """Looks up what is here.

        Raises:
            IndexError: On a CPU, for an id that is no token's, on every rank: each would give zeros for it.
        """
        if token_ids.is_cpu:  # a GPU would have to be waited for
            require_token_ids(token_ids.flatten().tolist(), self.vocab)
        absent = (token_ids < self.mine.start) | (token_ids >= self.mine.stop)
        rows = nn.functional.embedding((token_ids - self.mine.start).masked_fill(absent, 0), self.weight)
        return self.comm.all_reduce_(rows.masked_fill(absent[..., None], 0.0))


class VocabParallelHead(nn.Module):
    """Each rank computes the logits of the tokens whose rows it holds; one all-gather puts them side by side."""

    def __init__(self, weight: Float[Tensor, "mine hidden"], sizes: list[int], comm: Comm) -> None:
        super().__init__()
        self.weight, self.sizes, self.comm = nn.Parameter(weight, requires_grad=False), sizes, comm

    def forward(self, hidden: Float[Tensor, "batch positions hidden"]) -> Float[Tensor, "batch positions vocab"]:
        """Returns all logits on every rank."""
        return self.comm.all_gather(nn.functional.linear(hidden, self.weight), self.sizes)


def keep_outputs_(linear: nn.Linear, rows: Int[Tensor, " mine"]) -> None:
    """Cuts a linear layer by its outputs, in place (column parallel: Megatron writes y = x A)."""
    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].clone(), requires_grad=False)
    linear.out_features = len(rows)


def rows_of_heads(heads: range, head_dim: int) -> Int[Tensor, " mine"]:
    """Returns the rows of a projection that belong to some heads.

    >>> rows_of_heads(range(1, 2), 3).tolist()
    [3, 4, 5]
    """
    return torch.arange(heads.start * head_dim, heads.stop * head_dim)


def tensor_parallel_(model: nn.Module, comm: Comm) -> nn.Module:
    """Cuts a Llama-like causal LM into this rank's slices, in place, and returns it.

    Its all-reduces: one for the embedding and two a layer; one all-gather for the logits.

    Raises:
        ValueError: If the heads cannot be shared out whole.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = heads_of(
        comm.rank, comm.size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads
    )
    neurons = torch.tensor(span(config.intermediate_size, comm.rank, comm.size))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        keep_outputs_(attention.q_proj, rows_of_heads(query, head_dim))
        keep_outputs_(attention.k_proj, rows_of_heads(key_value, head_dim))
        keep_outputs_(attention.v_proj, rows_of_heads(key_value, head_dim))
        attention.num_key_value_groups = len(query) // len(key_value)
        attention.o_proj = RowParallelLinear(attention.o_proj, rows_of_heads(query, head_dim), comm)
        keep_outputs_(mlp.gate_proj, neurons)
        keep_outputs_(mlp.up_proj, neurons)
        mlp.down_proj = RowParallelLinear(mlp.down_proj, neurons, comm)
    return vocabulary_parallel_(model, comm)


def vocabulary_parallel_(model: nn.Module, comm: Comm) -> nn.Module:
    """Cuts the embedding and the head by tokens, in place; where they are one matrix they share the slice."""
    vocab = model.config.vocab_size
    mine = span(vocab, comm.rank, comm.size)
    table, head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    rows = table[mine.start : mine.stop].clone()
    head_rows = rows if head.data_ptr() == table.data_ptr() else head[mine.start : mine.stop].clone()
    model.model.embed_tokens = VocabParallelEmbedding(rows, mine, vocab, comm)
    sizes = [len(span(vocab, rank, comm.size)) for rank in range(comm.size)]
    model.lm_head = VocabParallelHead(head_rows, sizes, comm)
    model.lm_head.weight = model.model.embed_tokens.weight if head_rows is rows else model.lm_head.weight
    return model
