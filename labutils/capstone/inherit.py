"""Students that inherit: a smaller LabLM takes its weights, and its tokens, from the large one (chapters 04 and 05).

Channels, neurons and head groups leave by the scores of `pruning.structured`, layers at equal distances. A vocabulary
shrinks from its end: byte-level BPE numbers its tokens in the order of its merges, so a prefix of the merges is a
smaller tokenizer of the same kind, whose embedding rows are the first rows of the large one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from labutils.distillation.student import spaced_layers
from labutils.lab.data import service
from labutils.lab.layers.calibration import InputStatistics, input_statistics
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.lablm import SHAPES
from labutils.lab.models.load import LanguageModel, load_model
from labutils.lab.models.mixture import padded
from labutils.lab.models.tokenizer import chat_ids, role_ids
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import counted, text_loss
from labutils.pruning.structured import (
    channel_scores,
    head_group_scores,
    keep_channels,
    keep_head_groups,
    keep_layers,
    keep_neurons,
    neuron_scores,
    rebuilt,
    strongest,
)


class Shape(NamedTuple):
    """The sizes that a search may choose; a head group is one key-value head with its two query heads."""

    layers: int
    channels: int
    neurons: int
    groups: int
    vocabulary: int

    def __str__(self) -> str:
        """A label for tables.

        >>> print(Shape(3, 256, 256, 2, 4096))
        layers 3, channels 256, neurons 256, groups 2, tokens 4096
        """
        names = (*self._fields[:-1], "tokens")
        return ", ".join(f"{name} {size}" for name, size in zip(names, self, strict=True))


def shape_of(name: str) -> Shape:
    """The shape of "lablm" or "lablm-small"."""
    known = SHAPES[name]
    return Shape(known.layers, known.hidden_size, known.intermediate_size, known.kv_heads, known.vocab_size)


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerFast:
    """The same byte-level BPE with only its first `size` tokens: the other merges are forgotten.

    Every text still round-trips, as all bytes stay; it becomes longer, in tokens. Ids keep their meaning.

    Raises:
        ValueError: When the tokenizer is no BPE whose tokens stand in the order of its merges, or `size` would cut off
            a byte or a special token, or exceeds the vocabulary.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = fields["model"].get("vocab"), fields["model"].get("merges")
    first = len(vocabulary) - len(merges or ())
    if not merges or any(vocabulary["".join(pair)] != first + i for i, pair in enumerate(merges)):
        raise ValueError("a smaller tokenizer needs a BPE whose tokens stand in the order of its merges; got another")
    if any(token["id"] >= first for token in fields["added_tokens"]):
        raise ValueError(f"special tokens must stand before the merges, below {first}; got one behind them")
    if not first <= size <= len(vocabulary):
        raise ValueError(f"size must lie in {first} (bytes and special tokens) to {len(vocabulary)}; got {size}")
    fields["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < size}
    fields["model"]["merges"] = merges[: size - first]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )


def keep_vocabulary(loaded: LanguageModel, size: int) -> LanguageModel:
    """Keeps the first `size` tokens: rows of the embedding and of the head that is tied to it, and the tokenizer's.

    Raises:
        ValueError: See `smaller_tokenizer`.
    """
    tokenizer, state = smaller_tokenizer(loaded.tokenizer, size), loaded.model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:size]
    return LanguageModel(rebuilt(loaded.model, state, vocab_size=size), tokenizer)


@cache
def _teacher() -> tuple[LanguageModel, dict[str, InputStatistics]]:
    loaded = load_model("lablm")
    text = calibration_batches(loaded.tokenizer, context=256)
    return loaded, input_statistics(loaded.model, text, with_gram=True)


def inherit(shape: Shape) -> LanguageModel:
    """A student of this shape with LabLM's own weights, not yet recovered.

    Raises:
        ValueError: When a size is none of LabLM's parts, or above what it has.
    """
    limits = shape_of("lablm")
    if not all(1 <= size <= most for size, most in zip(shape, limits, strict=True)):
        raise ValueError(f"a student's sizes must lie in 1 to LabLM's, {tuple(limits)}; got {tuple(shape)}")
    (teacher, tokenizer), seen = _teacher()
    neurons = [strongest(scores, shape.neurons) for scores in neuron_scores(teacher, seen)]
    groups = [strongest(scores, shape.groups) for scores in head_group_scores(teacher, seen)]
    channels = strongest(channel_scores(teacher, seen), shape.channels)
    grams = [seen[f"model.layers.{i}.mlp.down_proj"].gram for i in range(limits.layers)]
    model = keep_head_groups(keep_neurons(teacher, neurons, grams=grams), groups)
    model = keep_channels(keep_layers(model, spaced_layers(shape.layers, of=limits.layers)), channels)
    return keep_vocabulary(LanguageModel(model, tokenizer), shape.vocabulary)


def recover_(loaded: LanguageModel, *, steps: int, batch: int = 8, lr: float = 1e-3, seed: int = 0) -> None:
    """Trains a student on answers of the service desk: every shape reads the same text, in its own tokens."""
    items = service.evaluation_set(service.ANSWER, "train", steps * batch, seed)
    parts = [_padded(loaded.tokenizer, items[start : start + batch]) for start in range(0, len(items), batch)]
    plan = FitPlan(steps=steps, lr=lr, warmup_steps=3, final_lr_share=0.05, max_grad_norm=1.0)
    fit_(loaded.model, lambda step: [parts[step]], text_loss(loaded.model), plan)


@torch.no_grad()
def answer_bits(loaded: LanguageModel, items: Sequence[service.Dialogue]) -> list[tuple[float, int]]:
    """Bits that each item's answer costs, its end included, and the answer's bytes: the vocabulary cancels."""
    loss, found = text_loss(loaded.model), []
    for item in items:
        ids, labels = _padded(loaded.tokenizer, [item])
        nats = loss(ids, labels).item() * int(counted(labels).sum())
        found.append((nats / math.log(2), len(item.messages[-1]["content"].encode())))
    return found


def _padded(tokenizer, items: Sequence[service.Dialogue]) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(chat_ids(tokenizer, item.messages)) for item in items]
    return padded(rows, pad_id=tokenizer.pad_token_id, roles=role_ids(tokenizer))
