"""`bench distributed`: policies on an uneven cluster, the cost of dispatch, a pipeline's bubble, each with its bar."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from labutils.course.bench.table import Bar
from labutils.distributed.dask_engine import local_cluster
from labutils.distributed.dispatch import Engine, Report, Settings, dispatch
from labutils.distributed.launch import launch
from labutils.distributed.partition import ideal_s
from labutils.distributed.pipeline import bubble, measured_bubble
from labutils.distributed.work import current_node

DELAYS_S = {"node-0": 0.020, "node-1": 0.040, "node-2": 0.160}  # simulated: each node sleeps so long for a request
PULL_BAR, ROUND_ROBIN, BUBBLE_BAR = 1.35, 4.5, 0.03


def paced(batch: list) -> list:
    """Answers each request with itself, after the delay of the node that this runs on (simulated work)."""
    time.sleep(len(batch) * DELAYS_S[current_node()])
    return batch


def echo(batch: list) -> list:
    """Answers at once: what is left is the overhead of dispatching."""
    return batch


@functools.cache
def _lablm():
    import torch
    from transformers.utils import logging

    from labutils.lab.models.load import load_model

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return load_model("lablm")


def continue_texts(prompts: list[str]) -> list[str]:
    """Continues each prompt by eight greedy tokens; a node loads LabLM once, at its first batch."""
    from labutils.generation.decode import generate_batch

    model, tokenizer = _lablm()
    ids = [tokenizer(tokenizer.bos_token + prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    made = generate_batch(model, ids, 8, pad_token_id=tokenizer.pad_token_id)
    return [tokenizer.decode(row[-8:]) for row in made]


@dataclass(frozen=True)
class PolicyTime:
    """Seconds that a policy took for all requests, every round, and how the last round shared them out."""

    policy: str
    samples_s: tuple[float, ...]
    ideal_s: float
    report: Report

    @property
    def ratio(self) -> float:
        """Median time over the time that no schedule can beat."""
        return statistics.median(self.samples_s) / self.ideal_s

    def __str__(self) -> str:
        shares = ", ".join(f"{node} {count}" for node, count in sorted(self.report.per_node.items()))
        times = f"{statistics.median(self.samples_s):.2f} s"
        if len(self.samples_s) > 1:
            times += f" ({min(self.samples_s):.2f} to {max(self.samples_s):.2f})"
        return f"{self.policy:<9}{times:<24}{self.ratio:5.2f} x ideal   {shares}"


def measured_rates(engine: Engine, function: Callable[[list], list], requests: list) -> dict[str, float]:
    """Returns each node's requests/s: every node answers all of them, one by one, while the others rest."""
    rates = {}
    for name, address in engine.nodes().items():
        only = _OnlyNode(engine, name, address)
        list(dispatch(requests[:1], function, only))  # the warm-up: a node imports the function's module
        began = time.perf_counter()
        count = sum(1 for _ in dispatch(requests, function, only))
        rates[name] = count / (time.perf_counter() - began)
    return rates


class _OnlyNode:
    """An engine that shows a single node of another."""

    def __init__(self, engine: Engine, name: str, address: str) -> None:
        self.session = engine.session
        self.nodes = lambda: {name: address}


def bench_policies(engine: Engine, *, requests: int = 120, rounds: int = 1) -> list[PolicyTime]:
    """Times the three policies on the paced nodes, interleaved; "weighted" with rates measured just before."""
    rates = measured_rates(engine, paced, list(range(4)))
    policies = {
        "static": Settings(policy="static"),
        "weighted": Settings(policy="weighted", rates=rates),
        "pull": Settings(),
    }
    samples: dict[str, list[float]] = {name: [] for name in policies}
    reports = {}
    for _ in range(rounds):
        for name, settings in policies.items():
            reports[name] = Report()
            began = time.perf_counter()
            answers = list(dispatch(range(requests), paced, engine, settings, report=reports[name]))
            samples[name].append(time.perf_counter() - began)
            if [answer.value for answer in answers] != list(range(requests)):
                raise ValueError(f"the {name} policy must answer every request in order; got {reports[name]}")
    ideal = ideal_s(requests, list(DELAYS_S.values()))
    return [PolicyTime(name, tuple(samples[name]), ideal, reports[name]) for name in policies]


def bench_overhead(engine: Engine, counts: tuple[int, ...], *, batch: int) -> dict[int, float]:
    """Returns the seconds per request of dispatching requests that cost nothing, by their number."""
    settings, found = Settings(max_requests=batch, window=max(4096, 8 * batch)), {}
    for count in counts:
        began = time.perf_counter()
        done = sum(1 for _ in dispatch(range(count), echo, engine, settings))
        found[count] = (time.perf_counter() - began) / done
    return found


def bench_bubble(*, stages: int, counts: tuple[int, ...], pace_s: float) -> dict[int, tuple[float, float]]:
    """Returns (measured, (p-1)/(m+p-1)) for each number m of micro-batches on paced stages."""
    arguments = {"pace_s": pace_s, "counts": counts}
    by_rank = launch("labutils.course.bench.ranks:paced_pipeline", stages, arguments, device="cpu", timeout_s=300)
    return {m: (measured_bubble([times[m] for times in by_rank]), bubble(stages, m)) for m in counts}


def bars(policies: list[PolicyTime], bubbles: Mapping[int, tuple[float, float]]) -> list[Bar]:
    """The claims: pull and weighted near the ideal, round-robin far from it, the bubble as the formula says."""
    by_name = {p.policy: p.ratio for p in policies}
    found = [
        Bar(f"{name} within {PULL_BAR}x of the ideal time", f"{by_name[name]:.2f}x", by_name[name] <= PULL_BAR)
        for name in ("pull", "weighted")
    ]
    static = by_name["static"]
    found.append(Bar(f"round-robin needs about {ROUND_ROBIN}x", f"{static:.2f}x", abs(static - ROUND_ROBIN) < 0.5))
    off = max(abs(measured - formula) for m, (measured, formula) in bubbles.items() if m <= 4)
    return [*found, Bar(f"bubble within {BUBBLE_BAR} of (p-1)/(m+p-1) for m <= 4", f"{off:.3f}", off <= BUBBLE_BAR)]


def bench_distributed(*, quick: bool = False, say: Callable[[str], object] = print) -> list[Bar]:
    """Runs all three on this machine and says what comes out.

    Raises:
        ModuleNotFoundError: Without Dask distributed.
    """
    with local_cluster(len(DELAYS_S)) as engine:
        list(dispatch(range(9), echo, engine))  # the warm-up
        say("\n120 requests on nodes that sleep 20, 40 and 160 ms for each (simulated), on Dask distributed")
        policies = bench_policies(engine, rounds=1 if quick else 5)
        say("\n".join(map(str, policies)))
        for batch in (1, 100):
            counts = (100, 1000) if quick or batch == 1 else (100, 1000, 10_000, 100_000)
            found = bench_overhead(engine, counts, batch=batch)
            row = ", ".join(f"{count}: {seconds * 1e6:.0f} µs" for count, seconds in found.items())
            say(f"overhead per request, batches of {batch}: {row}")
    bubbles = bench_bubble(stages=2 if quick else 4, counts=(1, 2, 4, 8), pace_s=0.1 if quick else 0.2)
    for m, (measured, formula) in bubbles.items():
        say(f"bubble with {m} micro-batches: {measured:.3f} measured, {formula:.3f} by formula (paced stages)")
    return bars(policies, bubbles)
