"""What LabLM reads: code and service dialogues as token streams, and a batch that depends on nothing but the step."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from labutils.data import corpus, service
from labutils.models.tokenizer import END_OF_TEXT

# Sequences of each source in every 16; they are what makes a batch.
RECIPE = {"stdlib": 8, "stdlib-tests": 2, "packages": 2, "service": 4}
SERVICE_DIALOGUES = 120_000


def sources(*, packages: bool = True) -> dict[str, list[str]]:
    """Training documents by source; the held-out modules and phrasings are in none of them."""
    stdlib = corpus.stdlib_documents("train")
    texts = {
        "stdlib": [d.text for d in stdlib if not corpus.is_test_file(d)],
        "stdlib-tests": [d.text for d in stdlib if corpus.is_test_file(d)],
        "service": [chat_text(d.messages) for d in service.dialogues(seed=0, split="train", count=SERVICE_DIALOGUES)],
    }
    installed = corpus.package_documents() if packages else []
    texts["packages"] = [d.text for d in installed if not corpus.is_test_file(d)]
    if not texts["stdlib-tests"]:  # Debian and Colab ship no test package
        texts["stdlib-tests"] = texts["stdlib"]
    if not texts["packages"]:
        texts["packages"] = texts["stdlib"]
    return texts


def chat_text(messages: list[dict[str, str]]) -> str:
    """One dialogue as the chat template writes it."""
    return "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def tokenizer_sample(texts: dict[str, list[str]]) -> Iterator[str]:
    """Text to train the tokenizer on: the library without its tests, and a quarter of the dialogues without markers."""
    yield from texts["stdlib"]
    for dialogue in texts["service"][::4]:
        yield from filter(None, re.split(r"<\|\w+\|>", dialogue))


def has_streams(folder: Path) -> bool:
    """Whether `write_streams` has finished in this folder."""
    return all(_stream_path(folder, name).is_file() for name in RECIPE)


def write_streams(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Encodes each source, its documents shuffled, into one row of uint16 token ids on disk."""
    order = np.random.default_rng(0)
    for name, documents in texts.items():
        shuffled = [documents[i] for i in order.permutation(len(documents))]
        unfinished = folder / "unfinished.npy"
        np.save(unfinished, encode_stream(tokenizer, shuffled, is_chat=name == "service"))
        os.replace(unfinished, _stream_path(folder, name))


def read_streams(folder: Path) -> dict[str, Int[np.ndarray, " n"]]:
    """Token ids of each source, mapped from disk."""
    return {name: np.load(_stream_path(folder, name), mmap_mode="r") for name in RECIPE}


def _stream_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.uint16.npy"


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], *, is_chat: bool) -> Int[np.ndarray, " n"]:
    """Ids of all texts, one after the other; code documents begin with END_OF_TEXT, dialogues carry their own marks."""
    prefix = "" if is_chat else END_OF_TEXT
    rows = []
    for start in range(0, len(texts), 1000):
        encoded = tokenizer([prefix + text for text in texts[start : start + 1000]], add_special_tokens=False)
        rows.extend(np.asarray(ids, dtype=np.uint16) for ids in encoded["input_ids"])
    return np.concatenate(rows)


def batch_at(
    streams: dict[str, Int[np.ndarray, " n"]],
    *,
    step: int,
    sequences: int,
    length: int,
    seed: int,
    practise_copying: bool = False,
) -> Int[Tensor, "sequences length"]:
    """The batch of a step: the recipe's share of each source, every chunk once an epoch, in an order drawn by `seed`.

    It depends on nothing but its arguments, so that a resumed run reads what an unbroken one would have read. With
    `practise_copying` every second chunk of the packages repeats its own beginning: a small model on a short budget
    learns from it to copy (Olsson et al. 2022, arXiv:2209.11895, call the heads that do it induction heads).

    Raises:
        ValueError: when `sequences` is not a multiple of 8, the recipe's smallest whole.
    """
    if sequences % 8:
        raise ValueError(f"sequences must be a multiple of 8, so that the recipe comes out whole; got {sequences}")
    rows = []
    for name, share in RECIPE.items():
        stream, count = streams[name], share * sequences // 16
        chunks = len(stream) // length
        for index in range(step * count, (step + 1) * count):
            order = np.random.default_rng((seed, index // chunks, length)).permutation(chunks)
            start = int(order[index % chunks]) * length
            row = torch.from_numpy(stream[start : start + length].astype(np.int64))
            if practise_copying and name == "packages" and index % 2 == 0:
                row = repeated(row, period=int(np.random.default_rng((seed, index)).integers(32, length // 2)))
            rows.append(row)
    return torch.stack(rows)


def repeated(row: Int[Tensor, " n"], *, period: int) -> Int[Tensor, " n"]:
    """The first `period` ids again and again.

    >>> repeated(torch.tensor([5, 6, 7, 8, 9]), period=2).tolist()
    [5, 6, 5, 6, 5]
    """
    return row[:period].repeat(-(-len(row) // period))[: len(row)]
