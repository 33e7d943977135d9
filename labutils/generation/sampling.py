"""From logits to a token: greedy, or temperature, top-k and top-p with an explicit generator.

The order is that of `transformers`: temperature, then top-k, then top-p, each on the logits the one
before left. A filtered token's logit becomes -inf, so its probability is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

FILTERED = -torch.inf


def greedy(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    """Returns the most likely token of each row; the first of them on a tie.

    >>> greedy(torch.tensor([[0.1, 0.7, 0.2]])).tolist()
    [1]

    Raises:
        ValueError: On a CPU, if a logit is NaN, which PyTorch takes for the largest. A GPU would have to be waited for.
    """
    if not logits.is_cpu:
        return logits.argmax(dim=-1)
    numbers = logits.detach().float().numpy()  # whose argmax takes a fraction of PyTorch's time
    if np.isnan(numbers.max(axis=-1)).any():
        raise ValueError("a token is chosen among numbers; got NaN among the logits")
    return torch.as_tensor(numbers.argmax(axis=-1))


def apply_temperature(logits: Float[Tensor, "batch vocab"], temperature: float) -> Float[Tensor, "batch vocab"]:
    """Returns logits / temperature: below 1 sharpens the distribution, above 1 flattens it.

    >>> apply_temperature(torch.tensor([[2.0, 4.0]]), 2.0).tolist()
    [[1.0, 2.0]]

    Raises:
        ValueError: If `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive (use greedy for 0); got {temperature}")
    return logits / temperature


def keep_top_k(logits: Float[Tensor, "batch vocab"], top_k: int) -> Float[Tensor, "batch vocab"]:
    """Filters out all but the k largest logits of each row; ties with the k-th stay.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]

    Raises:
        ValueError: If `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth_largest, FILTERED)


def keep_top_p(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Filters out the unlikely tail: keeps the smallest set of tokens whose probability reaches `top_p`.

    Sorted from the least likely, a token goes while the probability summed up to it is at most 1 - top_p
    (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751). The most likely token always stays.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).exp().round(decimals=1).tolist()
    [[0.5, 0.30000001192092896, 0.0]]

    Raises:
        ValueError: If `top_p` is outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    ascending, order = logits.sort(dim=-1, descending=False)
    in_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    in_tail[..., -1] = False
    return logits.masked_fill(in_tail.scatter(-1, order, in_tail), FILTERED)


def draw(probs: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, "batch 1"]) -> Int[Tensor, " batch"]:
    """The first token up to which the probabilities add up to more than `uniforms` (of [0, 1)) of their sum.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5]] * 2), torch.tensor([[0.4], [0.6]])).tolist()
    [0, 2]

    Raises:
        ValueError: If probabilities are NaN, as they are where a logit is NaN or infinite, or all are -inf.
    """
    reached = probs.double().cumsum(dim=-1)
    if not reached[..., -1].isfinite().all():
        raise ValueError("a token is drawn from finite logits; got NaN or infinity among them")
    return (reached <= uniforms * reached[..., -1:]).sum(dim=-1)


@dataclass(frozen=True)
class Sampler:
    """Draws tokens from filtered logits; call it like `greedy`.

    Attributes:
        temperature: Positive.
        top_k: Keep this many tokens; None keeps all.
        top_p: Keep this much probability; None keeps all.
        generator: Where the randomness comes from; the same seed gives the same text.
    """

    generator: torch.Generator
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """Returns one token id per row, drawn with the generator."""
        return draw(self.probs(logits), self.uniforms(len(logits)))

    def uniforms(self, count: int) -> Float[Tensor, "count 1"]:
        """The next numbers of [0, 1), one for each token to draw."""
        return torch.rand(count, 1, generator=self.generator, dtype=torch.float64, device=self.generator.device)

    def probs(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Returns the distribution that tokens are drawn from; speculative decoding needs it too."""
        logits = apply_temperature(logits.float(), self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return logits.softmax(dim=-1)
