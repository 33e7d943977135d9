"""Text that a method may look at before quality is measured: rows of training code and of training dialogues."""

import itertools
import random

import torch
from jaxtyping import Int
from torch import Tensor

from labutils.lab.data import corpus, service
from labutils.lab.models.mixture import chat_text
from labutils.lab.models.tokenizer import text_ids


def calibration_batches(
    tokenizer,
    *,
    code: int = 16,
    dialogues: int = 16,
    context: int = 512,
    batch: int = 8,
    seed: int = 0,
    language: str | None = None,
) -> list[Int[Tensor, "_ context"]]:
    """Rows of `context` tokens, without padding, from the training split alone.

    A row of code is the beginning of a module of the standard library; a row of dialogues is one service dialogue
    behind the other. Methods that count on calibration keep what the text contains: leave the dialogues out, and see.

    Args:
        tokenizer: of the model that will read the rows.
        code: rows of code.
        dialogues: rows of dialogues.
        context: tokens in a row.
        batch: rows in a batch.
        seed: of the choice of modules and dialogues.
        language: "en" or "zh" for rows of answers in this language alone, without translations.

    Raises:
        ValueError: when no row is asked for, the language is unknown, or the library has too few long modules.
    """
    if code < 0 or dialogues < 0 or code + dialogues == 0:
        raise ValueError(f"code and dialogues must be at least 0, and one of them above; got {code} and {dialogues}")
    if language not in (None, *service.LANGUAGES):
        raise ValueError(f"language must be one of {', '.join(service.LANGUAGES)}; got {language!r}")
    rows = [*_code_rows(tokenizer, code, context, seed), *_dialogue_rows(tokenizer, dialogues, context, seed, language)]
    if len(rows) < code + dialogues:
        raise ValueError(f"the training split must hold {code} modules of {context} tokens; got {len(rows)}")
    return list(torch.tensor(rows).split(batch))


def _code_rows(tokenizer, count: int, context: int, seed: int) -> list[list[int]]:
    documents = [d for d in corpus.stdlib_documents("train") if not corpus.is_test_file(d)] if count else []
    random.Random(seed).shuffle(documents)
    encoded = (
        [*_start(tokenizer), *text_ids(tokenizer, d.text[: context * 6])]
        for d in documents
        if len(d.text) > context * 2
    )
    return list(itertools.islice((ids[:context] for ids in encoded if len(ids) >= context), count))


def _dialogue_rows(tokenizer, count: int, context: int, seed: int, language: str | None) -> list[list[int]]:
    drawn = service.dialogues(seed=seed, split="train", count=count * context)
    texts = (chat_text(d.messages) for d in drawn if not language or (d.task, d.language) == (service.ANSWER, language))
    ids = itertools.chain.from_iterable(
        [*_start(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts
    )
    return [list(itertools.islice(ids, context)) for _ in range(count)]


def _start(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
