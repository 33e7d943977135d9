"""How well a model serves customers: intent, answer and translation on phrasings that training never showed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from labutils.applications import scores
from labutils.lab.data import service
from labutils.lab.models.tokenizer import chat_ids

SEED = 2026


@dataclass(frozen=True)
class TaskScore:
    """Replies of one task beside what was expected."""

    task: str
    predictions: tuple[str, ...]
    references: tuple[str, ...]
    is_novel: tuple[bool, ...]  # whether the item's act never occurs in training

    @property
    def is_right(self) -> list[bool]:
        """Exact match, item by item."""
        return service.exact_match(list(self.predictions), list(self.references))

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return sum(self.is_right) / len(self.is_right)


@torch.no_grad()
def reply(model, tokenizer, chats: Sequence[Sequence[dict[str, str]]], *, max_new_tokens: int = 80) -> list[str]:
    """Greedy replies to chats that end with the user's turn, as one left-padded batch; what users write stays text."""
    prompts = [torch.tensor(chat_ids(tokenizer, chat, add_generation_prompt=True)) for chat in chats]
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left").to(model.device)
        for rows, value in ((prompts, pad_id), ([torch.ones_like(p) for p in prompts], 0))
    )
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def score_task(
    model, tokenizer, task: str, *, count: int, split: str = "test", seed: int = SEED, batch: int = 50
) -> TaskScore:
    """Replies to `count` held-out queries of one task.

    Raises:
        ValueError: when count is not positive, or for an unknown task or split.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    items = service.evaluation_set(task, split, count, seed)
    items.sort(key=lambda item: len(item.messages[-2]["content"]))  # equal lengths pad least
    predictions: list[str] = []
    for start in range(0, count, batch):
        chats = [item.messages[:-1] for item in items[start : start + batch]]
        predictions.extend(reply(model, tokenizer, chats))
    references = tuple(item.messages[-1]["content"] for item in items)
    novel = tuple(service.is_novel_act(item.phrasings[0]) for item in items)
    return TaskScore(task, tuple(predictions), references, novel)


def chrf(score: TaskScore) -> float:
    """Character n-gram F-score, chrF (Popović 2015), of a translation task in percent."""
    return 100 * scores.chrf(score.predictions, score.references)
