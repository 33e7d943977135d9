"""A draft that costs less: its output layer knows only the frequent tokens.

A small model with a large vocabulary is mostly output layer. A draft may leave rare tokens out (FR-Spec, Zhao et al.
2025, arXiv:2502.14856): where the text needs one, the draft is wrong and the target corrects it. The output stays
exactly the target's, because the draft's probability of a token it cannot draw is 0.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.decoding.target import Target


def frequent_tokens(rows: Iterable[Sequence[int]], *, vocab_size: int, count: int) -> Int[Tensor, " count"]:
    """The `count` most frequent tokens of some texts, ascending; among equally frequent ones the smaller id.

    >>> frequent_tokens([[5, 5, 2], [2, 5, 7]], vocab_size=10, count=2).tolist()
    [2, 5]

    Raises:
        ValueError: If `count` is not in 1 to `vocab_size`.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"a trimmed head keeps 1 to vocab_size={vocab_size} tokens; got {count}")
    times = sum((torch.bincount(torch.as_tensor(row), minlength=vocab_size) for row in rows), torch.zeros(vocab_size))
    return times.sort(descending=True, stable=True).indices[:count].sort().values


def trim_head(model: nn.Module, kept_ids: Int[Tensor, " kept"]) -> nn.Module:
    """Returns a copy whose output layer has only the rows of some tokens; logit k is that of `kept_ids[k]`.

    The copy reads every token: its embedding is whole, and no longer tied to the output layer.
    """
    trimmed = copy.deepcopy(model)
    whole = model.get_output_embeddings()
    head = nn.Linear(whole.in_features, len(kept_ids), bias=False)
    head.weight = nn.Parameter(whole.weight.detach()[kept_ids].clone(), requires_grad=False)
    trimmed.config.tie_word_embeddings = False
    trimmed.set_output_embeddings(head)
    return trimmed


def full_vocabulary(logits: Float[Tensor, "rows kept"], kept_ids: Int[Tensor, " kept"], vocab_size: int) -> Tensor:
    """Logits over all tokens, (rows, vocab_size): minus infinity, probability 0, where the trimmed head has none.

    >>> full_vocabulary(torch.tensor([[1.0, 2.0]]), torch.tensor([0, 3]), 4)
    tensor([[1., -inf, -inf, 2.]])
    """
    return logits.new_full((len(logits), vocab_size), -torch.inf).index_copy(1, kept_ids, logits)


class TrimmedTarget:
    """A decoder of a trimmed model, answering over the whole vocabulary, so that it can draft for a whole model."""

    def __init__(self, decoder: Target, kept_ids: Int[Tensor, " kept"], *, vocab_size: int) -> None:
        self.decoder, self.kept_ids, self.vocab_size = decoder, kept_ids, vocab_size
        self.max_length = decoder.max_length

    @property
    def length(self) -> int:
        """Positions cached."""
        return self.decoder.length

    def prefill(self, token_ids: Int[Tensor, "1 positions"]) -> Float[Tensor, "1 vocab"]:
        """Reads tokens behind what is cached and returns the logits after the last."""
        return full_vocabulary(self.decoder.prefill(token_ids), self.kept_ids, self.vocab_size)

    def extend(self, token_ids: list[int]) -> Float[Tensor, "new vocab"]:
        """Reads tokens behind what is cached and returns the logits after each."""
        return full_vocabulary(self.decoder.extend(token_ids), self.kept_ids, self.vocab_size)

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions."""
        self.decoder.rewind(count)
