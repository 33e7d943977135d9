"""Prefill on one rank, decode on another (DistServe, Zhong et al. 2024, arXiv:2401.09670).

A long prompt then interrupts nobody's decoding. The price is the way of its keys and values from one rank to the other.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from labutils.distributed.collectives import Comm
from labutils.lab.layers.architecture import require_llama

PREFILL, DECODE = 0, 1


def break_even_bytes_per_s(nbytes: float, recompute_s: float, *, latency_s: float = 0.0) -> float:
    """The bandwidth of a link over which a cache takes as long as computing it again; infinite if none is enough.

    >>> break_even_bytes_per_s(3e6, 0.25, latency_s=0.05)
    15000000.0

    Args:
        nbytes: Size of the keys and values.
        recompute_s: Seconds of the prefill on the rank that decodes.
        latency_s: Seconds that the link adds to any message.
    """
    return nbytes / (recompute_s - latency_s) if recompute_s > latency_s else float("inf")


@torch.no_grad()
def greedy(
    model: nn.Module, text: Int[Tensor, "batch positions"], new_tokens: int, cache=None
) -> Int[Tensor, "batch longer"]:
    """Decodes greedily; on every rank of a tensor-parallel model alike.

    Args:
        model: A causal LM of `transformers`.
        text: What to continue.
        new_tokens: How many tokens to write.
        cache: Keys and values of the text's beginning, which need not be read again; by default of nothing.
    """
    from transformers import DynamicCache

    cache = DynamicCache() if cache is None else cache
    for _ in range(new_tokens):
        unread = text[:, cache.get_seq_length() :]
        logits = model(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)
    return text


@torch.no_grad()
def generate_disaggregated(
    model: nn.Module, token_ids: Int[Tensor, "1 positions"], max_new_tokens: int, comm: Comm
) -> Int[Tensor, "1 longer"] | None:
    """Greedy decoding by two ranks: rank 0 reads the prompt, rank 1 writes the answer.

    The keys and values of all layers travel as one message, the first new token as another.

    Args:
        model: A Llama-like model, the same on both ranks.
        token_ids: The prompt, known to both.
        max_new_tokens: Tokens to write, at least one.
        comm: A group of two ranks.

    Returns:
        Prompt and answer on rank 1; None on rank 0.

    Raises:
        ValueError: For another number of ranks or of tokens, or an architecture whose cache is another.
    """
    from transformers import DynamicCache

    if comm.size != 2 or max_new_tokens < 1:
        raise ValueError(f"2 ranks and at least 1 new token are needed; got {comm.size} and {max_new_tokens}")
    known, positions = require_llama(model.config), token_ids.shape[1]
    cache = DynamicCache()
    if comm.rank == PREFILL:
        logits = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        comm.send(torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers]), DECODE)
        comm.send(logits[:, -1].argmax(dim=-1, keepdim=True), DECODE)
        comm.flush()
        return None
    shape = (known.layers, 2, 1, known.kv_heads, positions, known.head_dim)
    for index, (keys, values) in enumerate(comm.receive(shape, model.dtype, PREFILL)):
        cache.update(keys, values, index)
    text = torch.cat([token_ids, comm.receive((1, 1), torch.long, PREFILL)], dim=1)
    return greedy(model, text, max_new_tokens - 1, cache)
