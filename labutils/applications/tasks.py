"""One service loop for every task: read the prompt, write the answer, parse it, score what was parsed.

A score looks at parsed structure, never for a substring: "incorrect" holds "correct".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from labutils.decoding.target import Target
from labutils.generation.sampling import greedy


@dataclass(frozen=True)
class Task:
    """What a service is asked to do, and how its answers are judged.

    Attributes:
        name: For tables.
        prompts: Token ids of each request.
        expected: What `parse` should make of each answer.
        score: From (parsed, expected) to 0 … 1; an answer that cannot be parsed scores 0 without it.
        parse: From the text to what it says, or None where it says nothing of the right form.
        new_tokens: At most so many tokens an answer.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    expected: Sequence[object]
    score: Callable[[object, object], float] = lambda parsed, expected: float(parsed == expected)
    parse: Callable[[str], object | None] = str.strip
    new_tokens: int = 64

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.expected):
            sizes = f"{len(self.prompts)} and {len(self.expected)}"
            raise ValueError(f"a task needs one expected answer for each prompt; got {sizes}")

    def judge(self, text: str, index: int) -> float:
        """The score of an answer to request `index`."""
        parsed = self.parse(text)
        return 0.0 if parsed is None else float(self.score(parsed, self.expected[index]))


@dataclass(frozen=True)
class Reply:
    """One answer: its tokens without the stop token, and the seconds from the request to each token made."""

    token_ids: tuple[int, ...]
    token_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.token_s[0]

    @property
    def latency_s(self) -> float:
        """Seconds to the last token, the stop token included."""
        return self.token_s[-1]


@dataclass(frozen=True)
class Outcome:
    """What one variant of a model made of a task."""

    scores: tuple[float, ...]
    texts: tuple[str, ...]
    replies: tuple[Reply, ...]

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)


def answer(
    target: Target, token_ids: Sequence[int], new_tokens: int, *, stop: Collection[int], cached: int = 0
) -> Reply:
    """One greedy answer, timed token by token.

    Args:
        target: The model, perhaps behind a grammar.
        token_ids: The whole prompt.
        new_tokens: At most so many.
        stop: Ids that end the answer.
        cached: The first so many tokens of the prompt lie in the target's cache already; the rest is forgotten.

    Raises:
        ValueError: If `cached` is more than the cache or leaves nothing to read, or no token is asked for.
    """
    if new_tokens < 1 or not 0 <= cached <= min(target.length, len(token_ids) - 1):
        rule = f"new_tokens must be at least 1 and cached in 0 to {min(target.length, len(token_ids) - 1)}"
        raise ValueError(f"{rule}; got {new_tokens} and {cached}")
    target.rewind(target.length - cached)
    began = time.perf_counter()
    token = int(greedy(target.prefill(torch.tensor([list(token_ids[cached:])]))))
    made, seconds = [token], [time.perf_counter() - began]
    while token not in stop and len(made) < new_tokens:
        token = int(greedy(target.extend([token])))
        made.append(token)
        seconds.append(time.perf_counter() - began)
    return Reply(tuple(made[:-1] if token in stop else made), tuple(seconds))


def run_task(
    targets: Mapping[str, Target], task: Task, *, decode: Callable[[list[int]], str], stop: Collection[int]
) -> dict[str, Outcome]:
    """Serves each request once with every variant before the next one, beginning with another variant each time.

    So a slow moment of the machine hits all of them, and scores pair by request.

    Raises:
        ValueError: If there is no variant or no request.
    """
    if not targets or not task.prompts:
        raise ValueError(f"a task needs a variant and a request; got {len(targets)} and {len(task.prompts)}")
    names = list(targets)
    rows: dict[str, list[tuple[float, str, Reply]]] = {name: [] for name in names}
    for index, prompt in enumerate(task.prompts):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            reply = answer(targets[name], prompt, task.new_tokens, stop=stop)
            text = decode(list(reply.token_ids))
            rows[name].append((task.judge(text, index), text, reply))
    return {name: Outcome(*map(tuple, zip(*some, strict=True))) for name, some in rows.items()}


def batches_by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices of requests in batches of about equal length: sorted, stable, then cut.

    >>> batches_by_length([5, 1, 4, 2], 2)
    [[1, 3], [2, 0]]

    Raises:
        ValueError: If a batch would hold no request.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of a padded batch's positions that hold no text: 1 − Σ lengths ÷ Σ (rows · longest).

    >>> padding_share([1, 3], [[0, 1]])
    0.33333333333333337

    Raises:
        ValueError: If there is no request in any batch.
    """
    computed = sum(len(rows) * max(lengths[i] for i in rows) for rows in batches if rows)
    if not computed:
        raise ValueError("padding needs at least one request with text; got none")
    return 1 - sum(lengths[i] for rows in batches for i in rows) / computed
