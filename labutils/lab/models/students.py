"""The experiment of chapter 05: students of three sizes, with and without their teacher, over several seeds.

Each run is one point: a size, a loss, a seed. Everything else is equal: tokens, steps, order of the text (drawn by the
seed), learning rates and the weights that the student begins with. A run's state lies in `training-state/distillation`,
so that it survives a kill; when it ends, one line with its whole curve and its scores is appended to
`data/results/distillation_runs.jsonl`.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev

from labutils.distillation.recipe import Recipe, distillation_loss
from labutils.lab.data import service
from labutils.lab.layers.calibration import input_statistics
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.checkpoint import save_checkpoint, sha256
from labutils.lab.models.compare import bits_by_document, held_out_documents
from labutils.lab.models.evaluate_service import score_task
from labutils.lab.models.load import LanguageModel, load_model
from labutils.lab.models.training import Run, TrainingPlan, train
from labutils.lab.paths import DATA, ROOT, written_whole
from labutils.lab.training.losses import LossOf, teacher_loss
from labutils.measurement.timing import quantile
from labutils.pruning.structured import keep_layers, keep_neurons, neuron_scores, strongest

RESULTS = DATA / "results" / "distillation_runs.jsonl"
REFERENCES = DATA / "results" / "distillation_references.json"
STATE = ROOT / "training-state" / "distillation"
LOSSES = {"CE": None, "KD": Recipe(soft=0.5, hard=0.5, temperature=2.0)}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5%, by the number of seeds


@dataclass(frozen=True)
class Size:
    """Which of the teacher's layers a student takes, and how many of their MLP neurons."""

    layers: tuple[int, ...]
    neurons: int


SIZES = {
    "tiny": Size(layers=(0, 5), neurons=256),
    "small": Size(layers=(0, 2, 5), neurons=256),
    "half": Size(layers=(0, 2, 5), neurons=768),
}
SIBLING = Size(layers=(0, 3, 5), neurons=256)


@dataclass(frozen=True)
class Point:
    """One run of the experiment."""

    size: str
    loss: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Folder of its state."""
        return f"{self.size}-{self.loss}-{self.seed}-{self.steps}"

    @property
    def plan(self) -> TrainingPlan:
        """5,000 tokens a step, most of them code: what a student loses first."""
        return TrainingPlan(
            model=self.size,
            steps=self.steps,
            code_tokens=4096,
            dialogues=16,
            decay_fraction=0.7,
            mixed_precision=True,
            seed=self.seed,
        )


def points(*, seeds: int, steps: int) -> list[Point]:
    """All runs, a seed after the other: whatever is done when time runs out is a whole experiment of fewer seeds."""
    return [Point(size, loss, seed, steps) for seed in range(seeds) for size in SIZES for loss in LOSSES]


def first_student(teacher: LanguageModel, size: Size):
    """The teacher's chosen layers; of each, the neurons that say most on calibration text, the rest made up for.

    `pruning.structured` does the work: what a student begins with is a pruned teacher.
    """
    shallow = keep_layers(teacher.model, list(size.layers))
    if size.neurons == teacher.model.config.intermediate_size:
        return shallow
    text = calibration_batches(teacher.tokenizer, context=256)
    statistics = input_statistics(shallow, text, with_gram=True)
    kept = [strongest(scores, size.neurons) for scores in neuron_scores(shallow, statistics)]
    grams = [statistics[f"model.layers.{i}.mlp.down_proj"].gram for i in range(len(size.layers))]
    return keep_neurons(shallow, kept, grams=grams)


def run_point(
    point: Point, *, state: Path = STATE, results: Path = RESULTS, items: int = 100, log: Callable[[str], None]
) -> dict:
    """Trains one student, or goes on where it was killed; appends its line to the results and returns it."""
    started = time.monotonic()
    teacher = load_model("lablm")
    run = Run(
        point.plan,
        state_dir=state / point.name,
        data_dir=state,
        tokenizer_from=DATA / "lablm",
        start=first_student(teacher, SIZES[point.size]),
    )
    recipe, first = LOSSES[point.loss], run.step
    loss_of = None if recipe is None else distillation_loss(run.model, teacher.model.to(run.device), recipe)
    train(run, micro_batch=2048, compile_model=False, save_every=50, log=log, loss_of=loss_of)
    seconds = (time.monotonic() - started) / max(run.step - first, 1)
    row = asdict(point) | {
        "parameters": run.model.num_parameters(),
        "seconds_per_step": round(seconds, 3),
        "curve": run.curve,
        **scores(LanguageModel(run.model.eval(), run.tokenizer), items=items),
    }
    save_checkpoint(run.model, run.tokenizer, state / point.name / "checkpoint")
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def sibling_run(steps: int, *, mixed_precision: bool, **where) -> tuple[Run, LossOf]:
    """LabLM-small's run and its loss. What differs from the experiment was chosen by short runs (see the model card).

    Args:
        steps: of the whole run.
        mixed_precision: see `TrainingPlan`.
        where: the folder of its state, and what else `Run` takes.
    """
    plan = TrainingPlan(
        model="lablm-small",
        steps=steps,
        code_tokens=4096,
        dialogues=24,
        long_fraction=1.0,  # in short sequences a pruned teacher forgets how to copy from afar
        decay_fraction=0.5,
        mixed_precision=mixed_precision,
    )
    teacher = load_model("lablm")
    run = Run(plan, tokenizer_from=DATA / "lablm", start=first_student(teacher, SIBLING), **where)
    return run, teacher_loss(run.model, teacher.model.to(run.device))


def scores(loaded: LanguageModel, *, items: int) -> dict:
    """Bits and bytes of each held-out module, and right answers of each service task, on what training never showed."""
    documents = held_out_documents(limit_bytes=8_000)
    tasks = {
        task: sum(score_task(loaded.model, loaded.tokenizer, task, count=items).is_right) for task in service.TASKS
    }
    return {
        "documents": bits_by_document(loaded.model, loaded.tokenizer, documents, context=1024),
        "right": tasks,
        "items": items,
    }


def read_runs(path: Path = RESULTS) -> Iterator[dict]:
    """The finished runs, one a line."""
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)


def remaining(wanted: list[Point], path: Path = RESULTS) -> list[Point]:
    """Points that have no line yet."""
    done = {(r["size"], r["loss"], r["seed"], r["steps"]) for r in read_runs(path)}
    return [p for p in wanted if (p.size, p.loss, p.seed, p.steps) not in done]


def bits_per_byte_of(row: dict) -> float:
    """A run's bits per byte over its held-out modules."""
    return sum(bits for bits, _ in row["documents"]) / sum(size for _, size in row["documents"])


def wrong_share(row: dict) -> float:
    """Share of a run's service items, over all tasks, that were answered wrong."""
    return 1 - sum(row["right"].values()) / (row["items"] * len(row["right"]))


@dataclass(frozen=True)
class Effect:
    """What the teacher changed at one size: KD minus CE, paired by seed, in a score of which less is better."""

    size: str
    ce: float
    kd: float
    interval: tuple[float, float]
    seeds: int

    @property
    def difference(self) -> float:
        """What the teacher changed (negative: it helped)."""
        return self.kd - self.ce

    @property
    def is_shown(self) -> bool:
        """Whether the 95% interval lies below zero: only then may one say that KD beats CE."""
        return self.interval[1] < 0

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "KD beats CE" if self.is_shown else "CE beats KD" if low > 0 else "not told apart"
        return (
            f"{self.size:<6} CE {self.ce:.4f}  KD {self.kd:.4f}  {self.difference:+.4f} [{low:+.4f}, {high:+.4f}]  "
            f"{self.seeds} seeds: {verdict}"
        )


def effects(rows: list[dict], score: Callable[[dict], float] = bits_per_byte_of) -> list[Effect]:
    """One line a size: means over seeds, and a 95% interval of the paired differences.

    For bits per byte it is the hull of Student's interval over seeds and of a bootstrap over seeds and documents, so
    that neither another seed nor another text is forgotten; another score has Student's alone.

    Raises:
        ValueError: when a size has fewer than two seeds with both losses, or the runs differ in length.
    """
    if len(lengths := {row["steps"] for row in rows}) > 1:
        raise ValueError(f"only runs of one length may be compared; got {sorted(lengths)} steps")
    found = []
    for size in dict.fromkeys(row["size"] for row in rows):
        by = {(r["loss"], r["seed"]): r for r in rows if r["size"] == size}
        seeds = sorted(seed for loss, seed in by if loss == "CE" and ("KD", seed) in by)
        if len(seeds) < 2:
            raise ValueError(f"an interval needs at least 2 seeds with both losses; got {len(seeds)} for {size}")
        pairs = [(by["CE", seed], by["KD", seed]) for seed in seeds]
        intervals = [mean_interval([score(kd) - score(ce) for ce, kd in pairs])[1]]
        intervals += [_bootstrap_interval(pairs)] if score is bits_per_byte_of else []
        hull = min(low for low, _ in intervals), max(high for _, high in intervals)
        means = [fmean(score(by[loss, seed]) for seed in seeds) for loss in LOSSES]
        found.append(Effect(size, *means, hull, len(seeds)))
    return found


def _bootstrap_interval(pairs: Sequence[tuple[dict, dict]], *, resamples: int = 1000) -> tuple[float, float]:
    """95% interval of KD minus CE in bits per byte: seeds and documents are drawn with replacement, both at once."""
    rng, sizes = Random(0), [size for _, size in pairs[0][0]["documents"]]
    gaps = [
        [kd_bits - ce_bits for (ce_bits, _), (kd_bits, _) in zip(ce["documents"], kd["documents"], strict=True)]
        for ce, kd in pairs
    ]
    found = []
    for _ in range(resamples):
        texts = rng.choices(range(len(sizes)), k=len(sizes))
        whole = sum(sizes[i] for i in texts)
        found.append(fmean(sum(gap[i] for i in texts) / whole for gap in rng.choices(gaps, k=len(gaps))))
    return quantile(found, 0.025), quantile(found, 0.975)


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of 2 to 5 values (one a seed) and Student's 95% interval of it: mean ± t · s ÷ √n.

    >>> middle, (low, high) = mean_interval([1.0, 2.0, 3.0])
    >>> middle, round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)
    """
    if len(values) not in T_95:
        raise ValueError(f"an interval over seeds needs {min(T_95)} to {max(T_95)} values; got {len(values)}")
    middle, half = fmean(values), T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return middle, (middle - half, middle + half)


def longest_runs(path: Path = RESULTS) -> list[dict]:
    """The recorded runs with the most steps at which every size has two seeds or more: lengths are never mixed."""
    rows = list(read_runs(path))
    whole = [steps for steps in {row["steps"] for row in rows} if not remaining(points(seeds=2, steps=steps), path)]
    return [row for row in rows if row["steps"] == max(whole, default=None)]


def validation_curves(rows: list[dict]) -> tuple[dict[str, list[list[float]]], list[int]]:
    """Validation bits per byte of one size's runs, a list for each loss, and the steps at which they were measured."""
    key = "validation_bits_per_byte"
    steps = [record["step"] for record in rows[0]["curve"] if key in record]
    lines = {loss: [[c[key] for c in r["curve"] if key in c] for r in rows if r["loss"] == loss] for loss in LOSSES}
    return lines, steps


def reference_scores(path: Path = REFERENCES, *, items: int = 100) -> dict[str, dict]:
    """`scores` of LabLM and LabLM-small, on the documents and items that the students got: measured once, then read.

    "weights" is the checksum of the model measured: after a change of the shipped models, delete the file.
    """
    if not path.is_file():
        found = {
            name: scores(load_model(name), items=items) | {"weights": sha256(DATA / name / "model.safetensors")}
            for name in ("lablm", "lablm-small")
        }
        with written_whole(path) as new:
            new.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
