"""Small classifiers that learn from a large model's opinion: n-grams with one matrix, and a tiny encoder.

A causal language model classifies by naming the class. `choice_log_probs` reads its opinion about *all* classes out of
one prompt; the small ones learn that distribution, not only the winner.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from labutils.distillation.divergences import at_temperature
from labutils.lab.training.loop import Part
from labutils.lab.training.losses import IGNORED, LossOf, forward_kl

Rows = Int[Tensor, "items n"]


def choice_log_probs(
    model: nn.Module, prompt: Int[Tensor, " prompt"], choices: Sequence[Sequence[int]]
) -> Float[Tensor, " choices"]:
    """Ln p(choice | prompt) of each choice, rescaled so that the choices together have probability 1.

    Args:
        model: a causal LM.
        prompt: token ids.
        choices: token ids of each answer, its end mark included, so that none is the beginning of another.

    Raises:
        ValueError: for an empty choice, or none.
    """
    steps = choice_step_log_probs(model, prompt, choices)
    whole = [sum(row[i, token] for i, token in enumerate(c)) for row, c in zip(steps, choices, strict=True)]
    return log_softmax(torch.stack(whole), dim=0)


@torch.no_grad()
def choice_step_log_probs(
    model: nn.Module, prompt: Int[Tensor, " prompt"], choices: Sequence[Sequence[int]]
) -> Float[Tensor, "choices longest vocab"]:
    """Ln p of every token before each token of each choice; what stands behind a choice's end means nothing.

    The prompt is read once; all choices then go on from its keys and values, padded on the right.

    Raises:
        ValueError: for an empty choice, or none.
    """
    if not choices or min(map(len, choices)) < 1:
        raise ValueError(f"every choice needs at least one token; got lengths {[len(c) for c in choices]}")
    read = model(input_ids=prompt[None], use_cache=True)
    cache = read.past_key_values
    cache.batch_repeat_interleave(len(choices))
    ids = nn.utils.rnn.pad_sequence([torch.tensor(c, device=prompt.device) for c in choices], True, 0)
    following = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, :-1]
    logits = torch.cat([read.logits[:, -1:].expand(len(choices), 1, -1), following], dim=1)
    return log_softmax(logits.float(), dim=-1)


def ngram_ids(text: str, *, buckets: int, sizes: Sequence[int] = (1, 2, 3, 4)) -> list[int]:
    """Numbers from 1 of a text's different character n-grams, hashed (Joulin et al. 2016, fastText, arXiv:1607.01759).

    Characters serve English and Chinese alike. 0 is kept for padding. Different n-grams may share a number.

    >>> len(ngram_ids("abab", buckets=1000, sizes=(1, 2)))
    4
    """
    grams = {text[i : i + n] for n in sizes for i in range(len(text) - n + 1)}
    return sorted({1 + zlib.crc32(gram.encode()) % (buckets - 1) for gram in grams})


def padded_rows(rows: Sequence[Sequence[int]]) -> Rows:
    """Rows of different length side by side, filled up with 0.

    >>> padded_rows([[3], [4, 5]]).tolist()
    [[3, 0], [4, 5]]
    """
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


class NgramLinear(nn.Module):
    """Mean of one vector a class and n-gram, plus a bias: the smallest classifier that reads text."""

    def __init__(self, *, buckets: int, classes: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(buckets, classes, mode="sum", padding_idx=0)
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.zeros_(self.table.weight)

    def forward(self, rows: Rows) -> Float[Tensor, "items classes"]:
        """Logits of the classes."""
        return self.table(rows) / (rows > 0).sum(dim=1, keepdim=True).clamp(min=1).sqrt() + self.bias


class TinyEncoder(nn.Module):
    """Embeddings of tokens and positions, Transformer encoder layers over all at once, their mean, one matrix."""

    def __init__(self, *, vocab: int, classes: int, width: int = 64, layers: int = 1, longest: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=0)
        self.places = nn.Embedding(longest, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.out = nn.Linear(width, classes)

    def forward(self, rows: Rows) -> Float[Tensor, "items classes"]:
        """Logits of the classes; 0 is padding."""
        is_padding = rows == 0
        x = self.tokens(rows) + self.places.weight[: rows.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=is_padding)
        kept = (~is_padding)[..., None]
        return self.out((x * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1))


def drawn_rows(rows: Rows, *, batch: int, seed: int = 0) -> Callable[[int], list[Part]]:
    """Parts for `fit_`: some rows drawn by the step's number; the "labels" tell which rows, for `classifier_loss`."""

    def parts(step: int) -> list[Part]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(rows), (batch,), generator=generator)
        return [(rows[chosen], torch.stack([torch.full_like(chosen, IGNORED), chosen], dim=1))]

    return parts


def classifier_loss(
    classifier: nn.Module,
    labels: Int[Tensor, " items"],
    teacher: Float[Tensor, "items classes"] | None = None,
    *,
    soft: float = 0.9,
    temperature: float = 2.0,
) -> LossOf:
    """Cross-entropy with the labels; with a teacher's log-probabilities soft · T² KL + (1 − soft) · CE.

    Args:
        classifier: rows to logits.
        labels: of all items.
        teacher: log-probabilities (or logits) of all items.
        soft: weight of the teacher.
        temperature: of both sides.
    """
    divergence = at_temperature(forward_kl, temperature)

    def loss(rows: Tensor, places: Tensor) -> Tensor:
        chosen, logits = places[:, 1], classifier(rows)
        hard = cross_entropy(logits, labels[chosen])
        if teacher is None:
            return hard
        return soft * divergence(logits, teacher[chosen]).mean() + (1 - soft) * hard

    return loss
