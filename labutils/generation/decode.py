"""The verbs of generation: prefill, decode one token, and the loops from naive to compiled.

Every `generate_*` takes and returns token ids (batch, positions), prompt included, and gives the same greedy
tokens; they differ in what they compute twice. `choose` maps logits (batch, vocab) to ids (batch,): `greedy` or
a `Sampler`. A row that produced a stop token is padded on, as in `transformers`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.generation.cache import Cache, CompiledKVCache, KVCache, StaticKVCache
from labutils.generation.sampling import greedy
from labutils.lab.layers.architecture import layer_caches
from labutils.lab.layers.compile import KernelError, compile_apart, torch_compile_lack

Choose = Callable[[Tensor], Tensor]
TokenIds = Int[Tensor, "batch positions"]
LongerIds = Int[Tensor, "batch longer"]  # the prompt and its continuation
Logits = Float[Tensor, "batch vocab"]
_compiled_steps: weakref.WeakKeyDictionary[nn.Module, dict[str, Callable]] = weakref.WeakKeyDictionary()


def forward_logits(model: nn.Module, token_ids: TokenIds) -> Float[Tensor, "batch positions vocab"]:
    """Returns the logits at every position, without any cache: the naive twin of everything below."""
    with torch.inference_mode():
        return model(input_ids=token_ids, use_cache=False).logits


def prefill(
    model: nn.Module,
    token_ids: TokenIds,
    cache: Cache,
    *,
    chunk_size: int | None = None,
    attention_mask: Int[Tensor, "batch positions"] | None = None,
) -> Logits:
    """Reads the prompt into the cache and returns the logits after its last token.

    Args:
        model: A Hugging Face causal LM.
        token_ids: The part of the text that the cache does not hold yet.
        cache: Empty or already holding what comes before.
        chunk_size: Read this many positions at a time, to bound memory; None reads all at once.
        attention_mask: 1 for text and 0 for padding, over the cached positions and the new ones.

    Raises:
        ValueError: If there is no token, the chunk size is below 1, or the model keeps other states than keys and
            values, which this cache could not hold.
    """
    if token_ids.shape[1] < 1:
        raise ValueError(f"prefill needs at least one token; got shape {tuple(token_ids.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    layer_caches(model.config)
    seen = int(cache.get_seq_length())
    for chunk in token_ids.split(chunk_size or token_ids.shape[1], dim=1):
        mask = None if attention_mask is None else attention_mask[:, : seen + chunk.shape[1]]
        logits = _forward(model, chunk, cache, mask)
        seen += chunk.shape[1]
    return logits


def decode_one_token(
    model: nn.Module, next_ids: Int[Tensor, " batch"], cache: Cache, attention_mask: Tensor | None = None
) -> Logits:
    """Feeds one token per row and returns the logits of the next; the cache grows by one position."""
    return _forward(model, next_ids[:, None], cache, attention_mask)


def generate_naive(
    model: nn.Module, token_ids: TokenIds, max_new_tokens: int, *, choose: Choose = greedy, stop: Collection[int] = ()
) -> LongerIds:
    """Generates without a cache: every token reads the whole text again, so n tokens cost O(n^2) positions."""
    text = _Text(token_ids, max_new_tokens, stop)
    while not text.finished:
        text.append(choose(forward_logits(model, text.token_ids)[:, -1]))
    return text.token_ids


def generate_cached(
    model: nn.Module, token_ids: TokenIds, max_new_tokens: int, *, choose: Choose = greedy, stop: Collection[int] = ()
) -> LongerIds:
    """Generates with our growing KV cache: every token is read once."""
    return _generate(model, token_ids, max_new_tokens, KVCache(), choose, stop)


def generate_static(
    model: nn.Module, token_ids: TokenIds, max_new_tokens: int, *, choose: Choose = greedy, stop: Collection[int] = ()
) -> LongerIds:
    """Generates with preallocated cache buffers: no step copies what came before."""
    cache = static_cache(model, token_ids, max_new_tokens)
    return _generate(model, token_ids, max_new_tokens, cache, choose, stop)


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    pad_token_id: int,
    choose: Choose = greedy,
    stop: Collection[int] = (),
) -> LongerIds:
    """Generates for prompts of different lengths at once, padded on the left so that all end together.

    The mask hides the padding, and positions count text only, so a row's tokens are those it would get alone.
    """
    token_ids, mask = pad_left(prompts, pad_token_id=pad_token_id)
    token_ids, mask = token_ids.to(model.device), mask.to(model.device)
    cache = static_cache(model, token_ids, max_new_tokens)
    return _generate(model, token_ids, max_new_tokens, cache, choose, stop, mask, pad_token_id)


def generate_compiled(
    model: nn.Module,
    token_ids: TokenIds,
    max_new_tokens: int,
    *,
    choose: Choose = greedy,
    stop: Collection[int] = (),
    backend: str = "inductor",
) -> LongerIds:
    """Generates with `decode_one_token` compiled into one graph over a static cache; prefill stays eager.

    The first call compiles for some seconds; the graph is kept with the model, for each cache length.

    Raises:
        KernelError: Where inductor cannot compile for this CPU: no compiler, or a space in PyTorch's path.
    """
    if backend == "inductor" and model.device.type == "cpu" and (lack := torch_compile_lack()):
        raise KernelError(lack)
    cache = static_cache(model, token_ids, max_new_tokens, kind=CompiledKVCache)
    steps = _compiled_steps.setdefault(model, {})
    if backend not in steps:
        steps[backend] = compile_apart(decode_one_token, backend=backend, fullgraph=True)
    return _generate(model, token_ids, max_new_tokens, cache, choose, stop, step=steps[backend])


def static_cache(
    model: nn.Module, token_ids: TokenIds, max_new_tokens: int, *, kind: type[StaticKVCache] = StaticKVCache
) -> StaticKVCache:
    """Returns a static cache just long enough for the prompt and its continuation."""
    batch, length = token_ids.shape
    return kind(model.config, max_length=length + max_new_tokens, batch=batch, dtype=model.dtype, device=model.device)


def pad_left(prompts: Sequence[Sequence[int]], *, pad_token_id: int) -> tuple[TokenIds, TokenIds]:
    """Returns the prompts padded on the left to one length, and the mask: 1 for text, 0 for padding.

    >>> ids, mask = pad_left([[5], [6, 7]], pad_token_id=0)
    >>> ids.tolist(), mask.tolist()
    ([[0, 5], [6, 7]], [[0, 1], [1, 1]])

    Raises:
        ValueError: If there is no prompt or one is empty.
    """
    if not prompts or min(len(p) for p in prompts) < 1:
        raise ValueError(f"every prompt needs at least one token; got lengths {[len(p) for p in prompts]}")
    width = max(len(p) for p in prompts)
    ids = [[pad_token_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _forward(model: nn.Module, token_ids: TokenIds, cache: Cache, attention_mask: Tensor | None) -> Logits:
    """One forward pass over new tokens; positions count text, not padding."""
    extra = {}
    if attention_mask is not None:
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        extra = {"attention_mask": attention_mask, "position_ids": positions[:, -token_ids.shape[1] :]}
    with torch.no_grad():  # not inference_mode: inductor refuses to write into its tensors, as a cache has to
        output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return output.logits[:, -1]


def _generate(
    model, token_ids, max_new_tokens, cache, choose, stop, mask=None, pad_token_id=None, step=decode_one_token
) -> LongerIds:
    text = _Text(token_ids, max_new_tokens, stop, mask, pad_token_id)
    text.append(choose(prefill(model, token_ids, cache, attention_mask=mask)))
    while not text.finished:
        text.append(choose(step(model, text.last_ids, cache, text.mask)))
    return text.token_ids


class _Text:
    """Token ids that grow, a mask that grows with them, and which rows are finished."""

    last_ids: Int[Tensor, " batch"]

    def __init__(
        self, token_ids: TokenIds, max_new_tokens: int, stop: Collection[int], mask=None, pad_token_id=None
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        if token_ids.ndim != 2 or token_ids.shape[1] < 1:
            raise ValueError(f"token_ids must have shape (batch, positions) and a token; got {tuple(token_ids.shape)}")
        self.token_ids, self.mask = token_ids, mask
        self.stop = torch.tensor(sorted(stop), dtype=torch.long, device=token_ids.device)
        self.pad_token_id = pad_token_id if pad_token_id is not None else min(stop, default=0)
        self.done = torch.zeros(token_ids.shape[0], dtype=torch.bool, device=token_ids.device)
        self.left = max_new_tokens

    @property
    def finished(self) -> bool:
        return self.left == 0 or bool(self.done.all())

    def append(self, next_ids: Int[Tensor, " batch"]) -> None:
        next_ids = torch.where(self.done, self.pad_token_id, next_ids)
        self.last_ids = next_ids  # contiguous, unlike a slice of the text, whose strides would recompile the graph
        self.token_ids = torch.cat([self.token_ids, next_ids[:, None]], dim=1)
        self.done = self.done | torch.isin(next_ids, self.stop)
        self.left -= 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
