"""Architecture search: which smaller LabLM answers best within a measured time (evolution against random search).

The searches are generic: a candidate is a tuple with one value of each axis. Both begin with the same random
candidates, neither tries one twice, and both pay for every candidate that they train. A candidate's time is measured
before it is trained, so one that is too slow costs no training in either.

    python -m labutils.capstone.search --minutes 4       # goes on where the last call stopped
    python -m labutils.capstone.search --compare 384     # what was found, recovered longer, on test data
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random

import torch

from labutils.capstone.inherit import Shape, answer_bits, inherit, recover_, shape_of
from labutils.generation.fast_llama import FastLlama
from labutils.lab.data import service
from labutils.lab.models.evaluate_service import score_task
from labutils.lab.models.load import LanguageModel, load_model
from labutils.lab.models.tokenizer import chat_ids, text_ids
from labutils.lab.paths import DATA, written_whole
from labutils.measurement.timing import measure_interleaved, paired_ratio

RESULTS = DATA / "results" / "architecture_search.jsonl"
COMPARED = DATA / "results" / "architecture_compared.jsonl"
SPACE = Shape(
    layers=(1, 2, 3, 4),
    channels=(128, 192, 256),
    neurons=(128, 256, 768),
    groups=(1, 2),
    vocabulary=(2048, 4096),
)
TIME_BUDGET = 1.05  # times LabLM-small's: as fast, within what a ratio of two equal models may be off
SEEDS, EVALUATIONS, STEPS = 3, 12, 48

Candidate = tuple[int, ...]
Space = Sequence[Sequence[int]]
Found = dict[Candidate, float]  # what was trained, in this order, and its loss


def one_step_away(candidate: Candidate, space: Space) -> list[Candidate]:
    """The candidates that differ in one axis, by one place.

    >>> one_step_away((1, 8), [(1, 2, 3), (4, 8)])
    [(2, 8), (1, 4)]
    """
    near = []
    for axis, values in enumerate(space):
        place = values.index(candidate[axis])
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                near.append((*candidate[:axis], values[other], *candidate[axis + 1 :]))
    return near


def crossover(mother: Candidate, father: Candidate, rng: Random) -> Candidate:
    """Each axis from one parent or the other."""
    return tuple(rng.choice(pair) for pair in zip(mother, father, strict=True))


def evolve_step(found: Found, space: Space, rng: Random, *, survivors: int = 4) -> Candidate:
    """A child of the best so far: the winner of a tournament of two, half the time crossed, then mutated in one axis.

    Args:
        found: At least one candidate, with its loss (less is better).
        space: The values of each axis.
        rng: Randomness.
        survivors: So many of the best may have children.
    """
    alive = sorted(found, key=found.get)[:survivors]
    mother = min(rng.choices(alive, k=2), key=found.get)
    child = crossover(mother, rng.choice(alive), rng) if rng.random() < 0.5 else mother
    return rng.choice(one_step_away(child, space))


def _unseen(space: Space, rng: Random) -> Iterator[Candidate]:
    """All candidates in a random order."""
    everything = list(itertools.product(*space))
    return iter(rng.sample(everything, len(everything)))


def random_search(
    space: Space,
    *,
    fits: Callable[[Candidate], bool],
    loss_of: Callable[[Candidate], float],
    evaluations: int,
    seed: int,
) -> Found:
    """Trains the first `evaluations` candidates of a random order that fit."""
    fitting = filter(fits, _unseen(space, Random(seed)))
    return {each: loss_of(each) for each in itertools.islice(fitting, evaluations)}


def evolutionary_search(
    space: Space,
    *,
    fits: Callable[[Candidate], bool],
    loss_of: Callable[[Candidate], float],
    evaluations: int,
    seed: int,
    start: int = 4,
    tries: int = 50,
) -> Found:
    """As `random_search` for the first `start` candidates, the same ones; then `evolve_step`.

    Where `tries` children in a row were known already or too slow, the next random candidate takes their place.
    """
    rng, order = Random(seed), _unseen(space, Random(seed))
    found: Found = {}
    for _ in range(evaluations):
        fresh = (each for each in order if each not in found and fits(each))
        children = (evolve_step(found, space, rng) for _ in range(tries if len(found) >= start else 0))
        new = (each for each in children if each not in found and fits(each))
        child = next(itertools.chain(new, fresh), None)
        if child is None:
            break
        found[child] = loss_of(child)
    return found


METHODS = {"random": random_search, "evolution": evolutionary_search}


class Reader:
    """A model's time for an answer in each language, whatever it would say: the prompt's, and the expected tokens'.

    So every shape does the same work, in its own tokens, and a vocabulary cannot flatter itself. The parts are short,
    so that a median over rounds leaves out what another program took.
    """

    def __init__(self, loaded: LanguageModel) -> None:
        self.decoder = FastLlama(loaded.model, max_length=512, matvec="numpy")
        items = [_items("validation", 40, language)[0] for language in service.LANGUAGES]
        chats = [chat_ids(loaded.tokenizer, item.messages[:-1], add_generation_prompt=True) for item in items]
        self.prompts = [torch.tensor([ids]) for ids in chats]
        self.tokens = sum(len(text_ids(loaded.tokenizer, item.messages[-1]["content"])) for item in items)

    def parts(self) -> dict[str, Callable[[], object]]:
        """What is timed: each prompt, and one token behind a prompt."""
        return {"en": partial(self._prefill, 0), "zh": partial(self._prefill, 1), "token": self._token}

    def answer_s(self, samples: dict[str, Sequence[float]]) -> list[float]:
        """Seconds of the mean answer, round by round."""
        rounds = zip(samples["en"], samples["zh"], samples["token"], strict=True)
        return [(en + zh + self.tokens * token) / 2 for en, zh, token in rounds]

    def _prefill(self, index: int) -> None:
        self.decoder.truncate(0)
        self.decoder.prefill(self.prompts[index])

    def _token(self) -> None:
        self.decoder.extend([0])
        self.decoder.rewind(1)


def _items(split: str, count: int, *languages: str) -> list[service.Dialogue]:
    items = service.evaluation_set(service.ANSWER, split, count, seed=13)
    return [item for item in items if item.language in (languages or service.LANGUAGES)]


@cache
def _hand_made() -> Reader:
    return Reader(load_model("lablm-small"))


def measure_time(loaded: LanguageModel, *, rounds: int = 61) -> dict:
    """Times the answers of a model and of LabLM-small in turn: the ratio with its interval, and milliseconds each."""
    readers = {"own": Reader(loaded), "small": _hand_made()}
    parts = {(name, part): call for name, reader in readers.items() for part, call in reader.parts().items()}
    timings = measure_interleaved(parts, repeats=rounds)
    own, small = (
        reader.answer_s({part: timings[name, part].samples_s for part in reader.parts()})
        for name, reader in readers.items()
    )
    ratio = paired_ratio(own, small)
    return {
        "ratio": [round(x, 4) for x in (ratio.value, ratio.low, ratio.high)],
        "answer_ms": [round(1e3 * statistics.median(s), 3) for s in (own, small)],
    }


def evaluate(shape: Shape, *, steps: int = STEPS) -> dict:
    """A row of the table: the time first; if that is within the budget, a recovery and bits per byte of answers."""
    loaded = inherit(shape)
    row = {"shape": list(shape), "parameters": loaded.model.num_parameters(), **measure_time(loaded)}
    if row["ratio"][0] <= TIME_BUDGET:
        recover_(loaded, steps=steps)
        measured = answer_bits(loaded, _items("validation", 48))
        row["bits_per_byte"] = round(sum(bits for bits, _ in measured) / sum(size for _, size in measured), 4)
    return row | {"load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None}


def compare(shapes: dict[str, Shape], *, steps: int, items: int = 100) -> list[dict]:
    """Recovers each shape for so many steps and asks it test requests, as it asks LabLM-small, made by hand.

    Returns:
        A row each: bits and bytes of every answer, and which answers are right.
    """
    made = {name: inherit(shape) for name, shape in shapes.items()}
    for loaded in made.values():
        recover_(loaded, steps=steps)
    made["LabLM-small, made by hand"] = load_model("lablm-small")
    return [
        {
            "name": name,
            "shape": list(shapes.get(name, shape_of("lablm-small"))),
            "steps": steps if name in shapes else None,
            "bits": [(round(bits, 3), size) for bits, size in answer_bits(loaded, _items("test", items))],
            "right": score_task(loaded.model, loaded.tokenizer, service.ANSWER, count=items).is_right,
        }
        for name, loaded in made.items()
    ]


class Table:
    """Rows of measured shapes, one a line of a file; a shape that is missing is measured and added."""

    def __init__(self, path: Path = RESULTS, *, measure: Callable[[Shape], dict] = evaluate) -> None:
        self.path, self.measure = path, measure
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows = {tuple(row["shape"]): row for row in map(json.loads, lines)}

    def row(self, candidate: Candidate) -> dict:
        """What is known of a shape."""
        if candidate not in self.rows:
            self.rows[candidate] = self.measure(Shape(*candidate))
            with written_whole(self.path) as new:
                new.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()), encoding="utf-8")
        return self.rows[candidate]

    def fits(self, candidate: Candidate) -> bool:
        """Whether its measured time is within the budget."""
        return "bits_per_byte" in self.row(candidate)

    def loss_of(self, candidate: Candidate) -> float:
        """Bits per byte of held-out answers."""
        return self.row(candidate)["bits_per_byte"]

    def search(self, method: str, seed: int, *, evaluations: int = EVALUATIONS) -> Found:
        """One search over the space."""
        return METHODS[method](SPACE, fits=self.fits, loss_of=self.loss_of, evaluations=evaluations, seed=seed)


def best_shapes(table: Table) -> dict[str, Shape]:
    """The best shape of each method's searches, and as a control LabLM-small's, which inherits and recovers alike."""
    best = {}
    for method in METHODS:
        found = {shape: loss for seed in range(SEEDS) for shape, loss in table.search(method, seed).items()}
        best[f"best by {method}"] = Shape(*min(found, key=found.get))
    return best | {"LabLM-small's shape": shape_of("lablm-small")}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the searches ask for, then, with --all, the rest of the space, for as long as --minutes say."""
    parser = ArgumentParser(prog="python -m labutils.capstone.search", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="stop after so many; the next call goes on")
    parser.add_argument("--all", action="store_true", help="measure every shape of the space")
    parser.add_argument("--compare", type=int, metavar="STEPS", help="compare the best shapes after so many steps")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes

    def in_time(shape: Shape) -> dict:
        if time.monotonic() > deadline:
            raise TimeoutError
        row = evaluate(shape)
        print(shape, row["ratio"][0], row.get("bits_per_byte", "too slow"), flush=True)
        return row

    table = Table(measure=in_time)
    try:
        for seed, method in itertools.product(range(SEEDS), METHODS):
            found = table.search(method, seed)
            print(f"seed {seed}, {method}: {min(found.values())} bits per byte of {len(found)} trained", flush=True)
        for candidate in _unseen(SPACE, Random(0)) if args.all else ():
            table.row(candidate)
        if args.compare:
            with open(COMPARED, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in compare(best_shapes(table), steps=args.compare))
    except TimeoutError:
        print(f"time is up after {len(table.rows)} shapes: run the same command again to go on")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
