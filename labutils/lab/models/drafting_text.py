"""Prompts of four kinds for every table of chapter 10: what a proposer gains depends on the text.

No prompt was trained on: modules of the test split, and phrasings of the service's test split.
"""

import itertools

import torch
from jaxtyping import Int
from torch import Tensor

from labutils.lab.data import corpus, service
from labutils.lab.models.tokenizer import chat_ids

KINDS = ("code", "chat", "translation", "qa")
CODE_TOKENS, CODE_STRIDE, FAQ_TURNS, SEED = 256, 512, 5, 10
MOST = 64  # prompts of one kind


def text_prompts(kind: str, tokenizer, count: int) -> list[Int[Tensor, "1 _"]]:
    """`count` prompts of one kind, the same at every call; a longer list begins with the shorter one.

    * code: 256 tokens from within a held-out module;
    * chat: a customer's first question;
    * translation: a sentence to put into Chinese or English, in turn;
    * qa: five questions with their answers stand in the conversation, and the customer asks one of them again.

    Raises:
        ValueError: For another kind, or a count outside 1 to `MOST`.
    """
    if kind not in KINDS or not 1 <= count <= MOST:
        raise ValueError(f"prompts are of kind {', '.join(KINDS)}, and 1 to {MOST}; got {kind!r} and {count}")
    if kind == "code":
        return _code(tokenizer, count)
    chats = {"chat": _chats, "translation": _translations, "qa": _faqs}[kind](count)
    return [torch.tensor([chat_ids(tokenizer, chat, add_generation_prompt=True)]) for chat in chats]


def _code(tokenizer, count: int) -> list[Tensor]:
    """The first window of each module, then the second of each, and so on."""
    modules = [
        tokenizer(d.text, add_special_tokens=False, verbose=False).input_ids for d in corpus.stdlib_documents("test")
    ]
    starts = range(CODE_STRIDE, max(map(len, modules)), CODE_STRIDE)
    windows = (ids[start : start + CODE_TOKENS] for start in starts for ids in modules)
    whole = (window for window in windows if len(window) == CODE_TOKENS)
    return [torch.tensor([[tokenizer.bos_token_id, *window]]) for window in itertools.islice(whole, count)]


def _items(task: str, count: int) -> list[service.Dialogue]:
    """The first of a set of one size, for an item's language depends on the set's size."""
    return service.evaluation_set(task, "test", MOST * FAQ_TURNS, SEED)[:count]


def _chats(count: int) -> list[list[dict[str, str]]]:
    return [list(d.messages[:-1]) for d in _items(service.ANSWER, count)]


def _translations(count: int) -> list[list[dict[str, str]]]:
    both = [_items(task, count) for task in (service.TO_CHINESE, service.TO_ENGLISH)]
    return [list(d.messages[:-1]) for pair in zip(*both, strict=True) for d in pair][:count]


def _faqs(count: int) -> list[list[dict[str, str]]]:
    items = _items(service.ANSWER, count * FAQ_TURNS)
    chats = []
    for first in range(0, len(items), FAQ_TURNS):
        turns = [list(item.messages[-2:]) for item in items[first : first + FAQ_TURNS]]
        asked = turns[len(chats) % FAQ_TURNS][0]
        system = items[first].messages[:1]
        chats.append([*system, *itertools.chain.from_iterable(turns), asked])
    return chats
