"""Fairness: who pays for a compression? The loss of quality of each group of requests, paired, and a repair.

A request stands in two languages with one meaning, so that the languages differ in nothing else.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from labutils.applications.scores import Difference, paired_difference
from labutils.applications.tasks import Outcome, Task, run_task
from labutils.capstone.designs import Design, pack_designed_
from labutils.decoding.target import Target
from labutils.generation.fast_llama import FastLlama
from labutils.lab.data import service
from labutils.lab.data.service_labels import read_answer
from labutils.lab.layers.calibration import InputStatistics, input_statistics
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.load import load_model
from labutils.lab.models.quantized import fast_llama
from labutils.lab.models.tokenizer import chat_ids
from labutils.lab.paths import DATA
from labutils.measurement.timing import quantile

RESULTS = DATA / "results" / "fairness.jsonl"
KNOWN, NEW_FRAME, NEW_ACT = PHRASINGS = ("known phrasing", "new frame", "new act")
MEANINGS, BLOCK, SEED = 600, 50, 13  # of the stored run
COMPRESSED = {
    "float32": Design(),
    "int8": Design(bits=8),
    "int4": Design(bits=4),
    "int3": Design(bits=3),
    "30% pruned": Design(pruned=0.3),
    "50% pruned": Design(pruned=0.5),
    "LabLM-small": Design(model="lablm-small"),
}
# Shares of the tokens that GPTQ reads before it chooses codes of 3 bits. "more" English is other text than English.
MIXES = {
    "GPTQ, default": {"code": 0.5, "en": 0.25, "zh": 0.25},
    "GPTQ, English": {"en": 1.0},
    "GPTQ, English, more English": {"en": 0.5, "more en": 0.5},
    "GPTQ, English, Chinese": {"en": 0.5, "zh": 0.5},
    "GPTQ, Chinese": {"zh": 1.0},
}


@dataclass(frozen=True)
class Request:
    """A customer's sentence in one language, and what its answer should say."""

    query: service.Query
    language: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat, without its answer."""
        system = {"role": "system", "content": service.SYSTEM_MESSAGES[service.ANSWER]}
        return [system, {"role": "user", "content": self.query.text(self.language)}]

    @property
    def answer(self) -> str:
        """The one right answer."""
        place = service.LANGUAGES.index(self.language)
        values = {name: pair[place] for name, pair in self.query.slots.items()}
        return service.intents()[self.query.intent].answer[place].format_map(values)

    @property
    def phrasing(self) -> str:
        """Whether training showed the phrasing, or its act in other frames, or not even its act."""
        phrasing = self.query.phrasing
        if service.split_of(phrasing) == "train":
            return KNOWN
        return NEW_ACT if service.is_novel_act(phrasing) else NEW_FRAME


def drawn_requests(meanings: int, *, split: str = "test", seed: int = SEED) -> list[Request]:
    """So many meanings, each in English and then in Chinese; phrasings known, new frames and new acts in turn.

    Raises:
        ValueError: For no meaning, or the training split, which has no new phrasing.
    """
    if meanings < 1 or split == "train":
        raise ValueError(f"meanings must be at least 1, of the validation or test split; got {meanings} of {split}")
    rng, requests = Random(f"fairness-{split}-{seed}"), []
    for index in range(meanings):
        wanted, request = PHRASINGS[index % 3], None
        while request is None or request.phrasing != wanted:
            request = Request(service.sample_query(rng, "train" if wanted == KNOWN else split), "en")
        requests += [request, replace(request, language="zh")]
    return requests


def answer_task(tokenizer, requests: Sequence[Request]) -> Task:
    """The requests as a task: an answer is right if it says the right sentence with the right values."""
    prompts = [chat_ids(tokenizer, request.messages, add_generation_prompt=True) for request in requests]
    return Task("answer", prompts, [read_answer(r.answer) for r in requests], parse=read_answer)


def answered(targets: Mapping[str, Target], tokenizer, requests: Sequence[Request]) -> dict[str, Outcome]:
    """Each variant's answers to the requests, in turns (`run_task`)."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return run_task(targets, answer_task(tokenizer, requests), decode=decode, stop={tokenizer.eos_token_id})


def intent_counts(dialogues: int = 20_000) -> Counter[str]:
    """How often each intent was asked for in the first so many dialogues that LabLM was trained on."""
    drawn = service.dialogues(seed=0, split="train", count=dialogues)
    return Counter(phrasing.intent for dialogue in drawn for phrasing in dialogue.phrasings)


def groups_of(requests: Sequence[Request], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Which requests belong to each group: languages, phrasings, and the most and least frequent third of intents."""
    ranked = sorted(service.intents(), key=lambda intent: -counts.get(intent, 0))
    third = len(ranked) // 3
    frequency = dict.fromkeys(ranked[:third], "frequent intent") | dict.fromkeys(ranked[-third:], "rare intent")
    groups: dict[str, list[int]] = {name: [] for name in ("en", "zh", "frequent intent", "rare intent", *PHRASINGS)}
    for index, request in enumerate(requests):
        for name in (request.language, request.phrasing, frequency.get(request.query.intent)):
            if name:
                groups[name].append(index)
    return groups


def by_meaning(scores: Sequence[float], members: Sequence[int]) -> list[float]:
    """The mean score of each meaning among the members: its two languages are one observation, not two."""
    rows: dict[int, list[float]] = {}
    for index in members:
        rows.setdefault(index // 2, []).append(scores[index])
    return [statistics.fmean(row) for row in rows.values()]


def group_differences(
    changed: Sequence[float], baseline: Sequence[float], groups: Mapping[str, Sequence[int]]
) -> dict[str, Difference]:
    """Of each group, the mean difference of the scores with its interval, paired by meaning."""
    return {
        name: paired_difference(by_meaning(changed, members), by_meaning(baseline, members))
        for name, members in groups.items()
    }


def language_difference(changed: Sequence[float], baseline: Sequence[float]) -> Difference:
    """How much more Chinese loses than English (negative: more), meaning by meaning.

    >>> str(language_difference([1.0, 0.0] * 10, [1.0, 1.0] * 10))  # every Chinese answer was lost, no English one
    '-1.000 [-1.300, -0.700]'
    """
    gaps = [new - old for new, old in zip(changed, baseline, strict=True)]
    return paired_difference(gaps[1::2], gaps[::2])


@dataclass(frozen=True)
class Gap:
    """Loss of the worst-off group minus loss of the best-off one, with its 95% interval."""

    worst: str
    best: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.worst} loses {self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}] more than {self.best}"


def loss_gap(
    changed: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], *, resamples: int = 1000
) -> Gap:
    """The gap between groups of different requests, by a bootstrap of the paired losses within each group.

    Which groups are worst and best is decided once. Decided anew in each resample, the gap could not be negative; and
    even so the worst of many groups looks worse than it is: shuffle the groups' names to see what chance gives.

    Raises:
        ValueError: For fewer than two groups, or a group with fewer than five requests.
    """
    losses = {n: [old - new for new, old in zip(changed[n], baseline[n], strict=True)] for n in changed}
    if len(losses) < 2:
        raise ValueError(f"a gap lies between at least two groups; got {len(losses)}")
    means = {name: statistics.fmean(loss) for name, loss in losses.items()}
    worst = max(means, key=means.get)
    best = min((name for name in means if name != worst), key=means.get)
    rng, gaps = Random(0), []
    for _ in range(resamples):
        drawn = [statistics.fmean(rng.choices(losses[name], k=len(losses[name]))) for name in (worst, best)]
        gaps.append(drawn[0] - drawn[1])
    return Gap(worst, best, means[worst] - means[best], quantile(gaps, 0.025), quantile(gaps, 0.975))


Statistics = Mapping[str, InputStatistics]


def calibration_statistics(*texts: str, rows: int = 16, context: int = 256) -> dict[str, Statistics]:
    """What LabLM's layers see of so many rows of each text: "code", "en", "zh", and "more en", other English rows."""
    loaded, found = load_model(), {}
    for text in texts:
        more, language = text.startswith("more "), text.removeprefix("more ")
        chosen = {"dialogues": 0, "code": rows} if text == "code" else {"dialogues": rows, "code": 0}
        chosen |= {"language": None if text == "code" else language, "seed": int(more)}
        batches = calibration_batches(loaded.tokenizer, context=context, **chosen)
        found[text] = input_statistics(loaded.model, batches, with_gram=True, with_head=True)
    return found


def mixed(seen: Mapping[str, Statistics], shares: Mapping[str, float]) -> dict[str, InputStatistics]:
    """The statistics of a mixture: XᵀX is a sum over tokens, so tokens are reweighted by adding shares of it.

    Raises:
        ValueError: For shares that do not add up to 1, which would stand for another number of tokens.
    """
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise ValueError(f"shares must be at least 0 and add up to 1; got {dict(shares)}")
    first = next(iter(seen.values()))
    return {
        name: replace(stats, gram=sum(share * seen[text][name].gram for text, share in shares.items()))
        for name, stats in first.items()
    }


def calibrated_decoder(design: Design, seen: Mapping[str, Statistics], shares: Mapping[str, float]) -> FastLlama:
    """The decoder of a quantized design whose codes GPTQ chose on a mixture of texts."""
    loaded = load_model(design.model)
    pack_designed_(loaded.model, design.scheme, mixed(seen, shares))
    return fast_llama(loaded.model, max_length=512)


def _stored_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stored_scores(path: Path = RESULTS) -> dict[str, list[float]]:
    """Scores of the stored run by variant, in the order of `drawn_requests(MEANINGS)`; variants that are complete."""
    rows: dict[str, dict[int, str]] = {}
    for row in _stored_rows(path):
        rows.setdefault(row["variant"], {})[row["first"]] = row["right"]
    whole = {name: "".join(right for _, right in sorted(blocks.items())) for name, blocks in rows.items()}
    return {name: [float(c) for c in right] for name, right in whole.items() if len(right) == 2 * MEANINGS}


def store_run(path: Path = RESULTS, *, minutes: float = 3.5) -> bool:
    """Runs what the file lacks, block by block, until done (True) or the minutes are over (False): call it again.

    Every variant answers every request once; greedy answers do not depend on how busy the machine is.
    """
    began, tokenizer, seen = time.monotonic(), load_model().tokenizer, {}
    requests = drawn_requests(MEANINGS)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["variant"], row["first"]) for row in _stored_rows(path)}
    for name in [*COMPRESSED, *MIXES]:
        missing = [first for first in range(0, 2 * MEANINGS, BLOCK) if (name, first) not in done]
        if missing and name in MIXES:
            seen = seen or calibration_statistics("code", "en", "zh", "more en")
            decoder = calibrated_decoder(COMPRESSED["int3"], seen, MIXES[name])
        elif missing:
            decoder = COMPRESSED[name].decoder()
        for first in missing:
            if time.monotonic() - began > 60 * minutes:
                return False
            outcome = answered({name: decoder}, tokenizer, requests[first : first + BLOCK])[name]
            right = "".join(str(int(score)) for score in outcome.scores)
            with path.open("a") as file:
                file.write(json.dumps({"variant": name, "first": first, "right": right}) + "\n")
    return True


if __name__ == "__main__":
    print("complete" if store_run() else "not yet complete: run it again")
