"""What LabLM reads: code and service dialogues as token streams, and a batch that depends on nothing but the step."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from labutils.lab.data import corpus, service
from labutils.lab.models.tokenizer import END_OF_TEXT, SPECIAL_TOKENS
from labutils.lab.paths import written_whole

# The source of each code sequence, again and again.
PATTERN = ("stdlib", "stdlib", "stdlib", "stdlib-tests", "stdlib", "stdlib", "stdlib", "packages")
SOURCES = (*dict.fromkeys(PATTERN), "service")
SERVICE_DIALOGUES = 120_000
LONGEST_DIALOGUE = 192  # tokens; a longer one is cut


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
    """One dialogue as the chat template writes it, for the program's own messages; others need `chat_ids`.

    Raises:
        ValueError: when a message holds the text of a control token: in one string it would become one.
    """
    if held := [mark for mark in SPECIAL_TOKENS for message in messages if mark in message["content"]]:
        raise ValueError(f"a message in a chat's text must hold no control token; got {held[0]}: use chat_ids")
    return "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def tokenizer_sample(texts: dict[str, list[str]]) -> Iterator[str]:
    """Text to train the tokenizer on: the library without its tests, and a quarter of the dialogues without markers."""
    yield from texts["stdlib"]
    for dialogue in texts["service"][::4]:
        yield from filter(None, re.split(r"<\|\w+\|>", dialogue))


@dataclass(frozen=True)
class Stream:
    """One source's token ids in a row, and where each document starts in it."""

    ids: Integer[np.ndarray, " n"]
    starts: Integer[np.ndarray, " documents"]


def has_streams(folder: Path) -> bool:
    """Whether `write_streams` has finished in this folder."""
    return all(path.is_file() for name in SOURCES for path in _stream_paths(folder, name))


def write_streams(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Encodes each source, its documents shuffled, into one row of uint16 token ids on disk."""
    order = np.random.default_rng(0)
    for name, documents in texts.items():
        shuffled = [documents[i] for i in order.permutation(len(documents))]
        stream = encode_stream(tokenizer, shuffled, is_chat=name == "service")
        for array, path in zip((stream.ids, stream.starts), _stream_paths(folder, name), strict=True):
            with written_whole(path) as new:
                np.save(new, array)


def read_streams(folder: Path) -> dict[str, Stream]:
    """The streams of all sources, mapped from disk."""
    return {name: Stream(*(np.load(path, mmap_mode="r") for path in _stream_paths(folder, name))) for name in SOURCES}


def _stream_paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.ids.npy", folder / f"{name}.starts.npy"


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], *, is_chat: bool) -> Stream:
    """Ids of all texts, one after the other; code begins with END_OF_TEXT and is text alone, dialogues carry marks."""
    prefix = [] if is_chat else [tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    rows: list[np.ndarray] = []
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=not is_chat)
        rows.extend(np.asarray([*prefix, *ids], dtype=np.uint16) for ids in encoded["input_ids"])
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    return Stream(np.concatenate(rows), starts)


def code_batch(
    streams: dict[str, Stream], *, step: int, sequences: int, length: int, seed: int, practise_copying: bool = False
) -> Int[Tensor, "sequences length"]:
    """A step's code: sources by PATTERN, every chunk of a source once an epoch, in an order drawn by `seed`.

    It depends on nothing but its arguments, so that a resumed run reads what an unbroken one would have read. With
    `practise_copying` every second chunk of the packages repeats its own beginning: a small model on a short budget
    learns from it to copy (Olsson et al. 2022, arXiv:2209.11895, call the heads that do it induction heads).
    """
    rows = []
    for position in range(step * sequences, (step + 1) * sequences):
        rounds, place = divmod(position, len(PATTERN))
        name = PATTERN[place]
        index = rounds * PATTERN.count(name) + PATTERN[:place].count(name)
        ids = streams[name].ids
        start = _drawn(index, len(ids) // length, (seed, length)) * length
        row = torch.from_numpy(ids[start : start + length].astype(np.int64))
        if practise_copying and name == "packages" and index % 2 == 0:
            row = repeated(row, period=int(np.random.default_rng((seed, index)).integers(length // 16, length // 2)))
        rows.append(row)
    return torch.stack(rows)


def dialogue_batch(stream: Stream, *, step: int, count: int, seed: int) -> list[Int[Tensor, " _"]]:
    """A step's dialogues, shortest first, each alone: packed in one row, they would blur which one is meant."""
    dialogues = []
    for index in range(step * count, (step + 1) * count):
        chosen = _drawn(index, len(stream.starts), (seed, 0))
        ids = stream.ids[stream.starts[chosen] :]
        end = stream.starts[chosen + 1] - stream.starts[chosen] if chosen + 1 < len(stream.starts) else len(ids)
        dialogues.append(torch.from_numpy(ids[: min(end, LONGEST_DIALOGUE)].astype(np.int64)))
    return sorted(dialogues, key=len)


def _drawn(index: int, population: int, seed: tuple[int, ...]) -> int:
    """The index-th draw: every member once an epoch."""
    epoch, place = divmod(index, population)
    return int(np.random.default_rng((*seed, epoch)).permutation(population)[place])


def reply_labels(ids: Int[Tensor, " n"], *, roles: dict[str, int]) -> Int[Tensor, " n"]:
    """Labels of one dialogue: the assistant's tokens, its `<|end|>` included; −100 (left out of the loss) elsewhere.

    Names and order numbers in a query cannot be foreseen; learning from them would drown what a reply teaches.

    >>> reply_labels(torch.tensor([7, 20, 2, 8, 30, 31, 2]), roles={"user": 7, "assistant": 8}).tolist()
    [-100, -100, -100, -100, 30, 31, 2]
    """
    is_marker = torch.isin(ids, torch.tensor(list(roles.values())))
    last_marker = torch.where(is_marker, torch.arange(len(ids)), 0).cummax(0).values
    return torch.where((ids[last_marker] == roles["assistant"]) & ~is_marker, ids, -100)


def padded(
    dialogues: list[Int[Tensor, " _"]], *, pad_id: int, roles: dict[str, int]
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Ids and `reply_labels` of dialogues, padded on the right.

    >>> ids, labels = padded([torch.tensor([8, 5]), torch.tensor([8, 6, 2])], pad_id=1, roles={"assistant": 8})
    >>> ids.tolist(), labels.tolist()
    ([[8, 5, 1], [8, 6, 2]], [[-100, 5, -100], [-100, 6, 2]])
    """
    labels = [reply_labels(ids, roles=roles) for ids in dialogues]
    ids = pad_sequence(dialogues, batch_first=True, padding_value=pad_id)
    return ids, pad_sequence(labels, batch_first=True, padding_value=-100)


def repeated(row: Int[Tensor, " n"], *, period: int) -> Int[Tensor, " n"]:
    """The first `period` ids again and again.

    >>> repeated(torch.tensor([5, 6, 7, 8, 9]), period=2).tolist()
    [5, 6, 5, 6, 5]
    """
    return row[:period].repeat(-(-len(row) // period))[: len(row)]
