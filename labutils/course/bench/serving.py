"""`bench serving`: our engine beside llama.cpp's server, vLLM and transformers, on LabLM and on LabLM tiled to 0.24B.

All read the same weights and prompts with the same threads, and write the same number of tokens (ends of text are
ignored). No engine may reuse a prefix that another request has read.
"""

import itertools
import json
import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from labutils.course.bench.child import Child, environment
from labutils.course.bench.decoding_ways import Remembering, near_tie
from labutils.course.bench.llama_server import INSTALL
from labutils.course.bench.serving_engines import CONTEXT
from labutils.course.bench.serving_rows import (
    AGAIN,
    OURS,
    VLLM,
    ServingRow,
    Times,
    as_shares,
    as_table,
    judge,
    same_twice,
)
from labutils.course.bench.table import Bar
from labutils.generation.decode import generate_cached
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.drafting_text import text_prompts
from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.load import load_model
from labutils.lab.models.tiled import tiled_model
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import check_repeats, measure_interleaved
from labutils.serving.queueing import poisson_arrivals

BITS, FORMATS = {32: "float32", 8: "int8", 4: "int4"}, {32: "F32", 8: "Q8_0", 4: "Q4_0"}
KINDS = ("chat", "translation", "qa")
FEWEST = 4  # requests of a round


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        at_once: Loads of the closed loop.
        rates: Loads of the open loop, as shares of what our int8 engine serves at 8 at once.
        new_tokens: Of each request.
        rounds: At least 5.
        threads: Of every engine.
        ttft_slo_s: The longest time to first token of a good request.
        tpot_slo_s: The longest time per token of a good request.
        peers: Whether others than ours run.
        vllm: A Python in whose environment vLLM is.
        width: Of the tiled subject; 1 leaves it out.
    """

    at_once: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rates: tuple[float, ...] = (0.3, 0.6, 0.9, 1.2)
    new_tokens: int = 32
    rounds: int = 5
    threads: int = 1
    ttft_slo_s: float = 1.0
    tpot_slo_s: float = 0.05
    peers: bool = True
    vllm: str = ""
    width: int = 7

    def for_tiled(self) -> "Settings":
        """Half the tokens under four loads at most: the tiled subject needs about twenty times as long for each."""
        at_once = tuple(count for count in self.at_once if count in (1, 2, 8, 16))
        return replace(self, at_once=at_once, rates=self.rates[-2:][:1], new_tokens=max(2, self.new_tokens // 2))


@dataclass
class Way:
    """An engine that runs, and what is known of it."""

    child: Child
    bits: int
    settings: str = ""
    same_text: str = ""


def bench_serving(
    settings: Settings,
    *,
    say: Callable[[str], None] = print,
    save: Callable[[list[ServingRow]], None] = lambda rows: None,
) -> tuple[list[ServingRow], list[Bar]]:
    """Measures every engine on both subjects, prints a table for each, and returns all rows and bars.

    Args:
        settings: How much to measure.
        say: Hears of the progress, line by line.
        save: Is given all rows so far after each subject.

    Raises:
        ValueError: If fewer than two tokens a request, or fewer than five rounds, are asked for.
        RuntimeError: If an engine ends instead of answering.
    """
    check_repeats(settings.rounds)
    if settings.new_tokens < 2:
        raise ValueError(f"a time per token needs new_tokens of at least 2; got {settings.new_tokens}")
    rows, bars = [], []
    names = ("lablm", f"lablm, {settings.width} times as wide")
    for name in names[: 1 + (settings.width > 1)]:
        with ExitStack() as stack, thread_count(settings.threads):
            bench = Bench(name, settings if name == "lablm" else settings.for_tiled(), stack, say)
            found = bench.measure()
            say(as_table(found))
            say("\n".join(same_twice(found)))
            rows += found
            save(rows)
            bars += [*bench.bars, *judge(found, bench.shares(), large=name != "lablm")]
    return rows, bars


class Bench:
    """One subject: its prompts, its engines, and their measurement."""

    def __init__(self, name: str, settings: Settings, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.name, self.settings, self.stack, self.say = name, settings, stack, say
        lablm, self.tokenizer = load_model("lablm")
        self.model = lablm if name == "lablm" else tiled_model(lablm, width=settings.width)
        self.folder = Path(stack.enter_context(TemporaryDirectory()))
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        most = max(*settings.at_once, 8)
        kinds = [text_prompts(kind, self.tokenizer, -(-most // len(KINDS))) for kind in KINDS]
        self.prompts = [ids[0].tolist() for ids in itertools.islice(itertools.chain(*zip(*kinds, strict=True)), most)]
        self.ways: dict[str, Way] = {}
        self.bars: list[Bar] = []
        self._start()
        self._compare()

    def measure(self) -> list[ServingRow]:
        """Times all engines under all loads, interleaved, and returns a row for each."""
        loads = self._loads()
        records: dict[tuple[str, str], list] = {}

        def run(way: str, load: str) -> None:
            found = self.ways[way].child.ask(loads[load])
            records.setdefault((way, load), []).append([(r["arrived"], r["first"], r["last"]) for r in found])

        functions = {f"{way}|{load}": partial(run, way, load) for load in loads for way in self.ways}
        self.say(f"  {self.settings.rounds} rounds of {len(self.ways)} engines under {len(loads)} loads begin")
        measure_interleaved(functions, repeats=self.settings.rounds, warmup=1)
        return [self._row(way, loads[load], records[way, load][1:]) for load in loads for way in self.ways]

    def shares(self) -> dict[str, dict[str, float]]:
        """Where the time of each of our engines goes, at 8 at once."""
        job = self._closed(8) | {"profile": True}
        found = {name: way.child.ask(job) for name, way in self.ways.items() if name.startswith(OURS)}
        self.say("\n".join(f"time of {name}: {as_shares(parts)}" for name, parts in found.items()))
        return found

    def _start(self) -> None:
        for bits, name in BITS.items():
            self._add(f"{OURS} {name}", "ours", bits, {"bits": bits})
        self._add(f"{OURS} int8, {AGAIN}", "ours", 8, {"bits": 8})
        if not self.settings.peers:
            return
        self._add("transformers float32", "transformers", 32, {})
        if self.settings.vllm:
            self._add(f"{VLLM} float32", "vllm", 32, {}, python=self.settings.vllm)
        else:
            self.say("  vLLM is left out: name a Python that has it with --vllm")
        if find_spec("xllamacpp") is None:
            self.say(f"  llama.cpp is {INSTALL}")
            return
        for bits, form in FORMATS.items():
            self._add_llama(bits, form)

    def _add(self, name: str, engine: str, bits: int, options: dict, *, python: str = sys.executable) -> Way | None:
        """Starts an engine; one that cannot run here is left out with one sentence."""
        told = json.dumps([engine, {"folder": str(self.folder), "threads": self.settings.threads} | options])
        command = [python, "-m", "labutils.course.bench.serving_engines", told]
        try:
            child = Child(command, environment=environment(self.settings.threads))
        except (RuntimeError, OSError) as error:
            self.say(f"  {name} is left out: {error}")
            return None
        self.stack.callback(child.close)
        self.ways[name] = Way(child, bits)
        return self.ways[name]

    def _add_llama(self, bits: int, form: str) -> None:
        """llama.cpp with flash attention on or off and its weights repacked or not: the fastest at 8 at once stays."""
        path = str(self.folder / f"{form}.gguf")
        export_gguf(self.model, self.tokenizer, Path(path), format=form)
        name, speeds = f"llama.cpp {form}", {}
        for flash, repack in itertools.product((True, False), (True, False) if bits < 32 else (False,)):
            way = self._add(name, "llama.cpp", bits, {"folder": path, "flash": flash, "repack": repack})
            if way is None:
                return
            seconds = [max(r["last"] for r in way.child.ask(self._closed(8))) for _ in range(3)]
            speeds[flash, repack] = min(seconds[1:])
            way.child.close()
        flash, repack = min(speeds, key=speeds.get)
        way = self._add(name, "llama.cpp", bits, {"folder": path, "flash": flash, "repack": repack})
        way.settings = f"flash attention {_on(flash)}" + (f", repacked {_on(repack)}" if bits < 32 else "")

    def _closed(self, at_once: int) -> dict:
        count = max(at_once, FEWEST)
        return {"prompts": self.prompts[:count], "new_tokens": self.settings.new_tokens, "at_once": at_once}

    def _loads(self) -> dict[str, dict]:
        """A job for each load; the same arrivals for every engine."""
        jobs = {f"{count} at once": self._closed(count) for count in self.settings.at_once}
        way = self.ways.get(f"{OURS} int8") or next(iter(self.ways.values()))
        capacity = 8 / max(r["last"] for r in way.child.ask(self._closed(8)))
        for share in self.settings.rates:
            rate = float(f"{share * capacity:.3g}")
            arrivals = poisson_arrivals(rate, len(self.prompts), seed=0)
            common = {"prompts": self.prompts, "new_tokens": self.settings.new_tokens}
            jobs[f"{rate} requests/s"] = common | {"arrivals": arrivals, "rate": rate}
        return jobs

    def _compare(self) -> None:
        """Counts the texts that equal those of each request alone, before anything is timed.

        In float32, alone means the model's own forward pass; of packed weights, the engine with one request at a time;
        of a peer, our float32 texts, which its own float32 should give.
        """
        count = self.settings.new_tokens
        ids = [torch.tensor([prompt]) for prompt in self.prompts]
        plain = [generate_cached(self.model, each, count)[0, each.shape[1] :].tolist() for each in ids]
        everyone = self._closed(len(self.prompts))
        for name, way in self.ways.items():
            made = [r["text"] for r in way.child.ask(everyone)]
            if name == f"{OURS} float32":
                same = sum(map(operator.eq, made, plain))
                ties = sum(self._near_tie(*each) for each in zip(self.prompts, made, plain, strict=True))
                claim = f"{self.name}: float32 texts equal those of each request alone"
                said = f"{same}/{len(plain)}" + (f" + {ties} near-ties" if ties else "")
                self.bars.append(Bar(claim, said, same + ties == len(plain)))
            elif way.bits < 32 and name.startswith(OURS):
                alone = [r["text"] for r in way.child.ask(everyone | {"at_once": 1})]
                said = f"{sum(map(operator.eq, made, alone))}/{len(alone)}"
            else:
                same = sum(map(self._same, made, plain))
                said = f"{same}/{len(plain)}" + ("" if way.bits == 32 else " of float32's")
            way.same_text = said
            self.say(f"  {name}: {said} texts the same{f', {way.settings}' if way.settings else ''}")

    def _same(self, text: str | list[int], expected: list[int]) -> bool:
        """Whether a peer's text is ours; up to our end for llama.cpp, which bans that token where it must go on."""
        if isinstance(text, list):
            return text == expected
        end = self.tokenizer.eos_token_id
        shown = expected[: expected.index(end)] if end in expected else expected
        return text.startswith(self.tokenizer.decode(shown, skip_special_tokens=True))

    def _near_tie(self, prompt: list[int], text: list[int], expected: list[int]) -> bool:
        if text == expected:
            return False
        decoder = Remembering(FastLlama(self.model, max_length=CONTEXT))
        return near_tie({"float32": decoder}, "float32", prompt + text, prompt + expected)

    def _row(self, way: str, job: dict, rounds: Sequence[Sequence[Times]]) -> ServingRow:
        here, settings = self.ways[way], self.settings
        return ServingRow(
            engine=way,
            model=self.name,
            bits=here.bits,
            threads=settings.threads,
            new_tokens=settings.new_tokens,
            rounds=tuple(map(tuple, rounds)),
            at_once=job.get("at_once"),
            rate=job.get("rate"),
            ttft_slo_s=settings.ttft_slo_s,
            tpot_slo_s=settings.tpot_slo_s,
            settings=here.settings,
            same_text=here.same_text,
        )


def _on(switch: bool) -> str:
    return "on" if switch else "off"
