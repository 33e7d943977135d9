"""`bench quantization`: our float32, int8 and int4 beside llama.cpp, ik_llama.cpp and PyTorch's int8, at equal bits.

Engines that share a process, or are awake together, slow each other down: idle threads of one pool spin on cores that
another needs. So each is a process of its own that is stopped while another is timed. All read the same weights with
the same number of threads, and rounds go through all engines in turn. A second process of our int8 shows how far equal
engines differ.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from labutils.course.bench.bandwidth import probe_bytes
from labutils.course.bench.child import Child, start
from labutils.course.bench.decode import Settings
from labutils.course.bench.llama_cpp import FORKS, not_installed
from labutils.course.bench.quantization_rows import (
    AGAIN,
    BATCHES,
    DECODE,
    LONG,
    OURS,
    POSITIONS,
    PREFILL,
    REPACKED,
    EngineRow,
    as_table,
    judge,
    place,
    read_rows,
)
from labutils.course.bench.subject import Subject
from labutils.course.bench.table import write_json
from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.quantized import save_quantized
from labutils.measurement.ledger import host_description
from labutils.measurement.resources import kv_bytes_per_position
from labutils.measurement.timing import check_repeats, measure_interleaved
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import find_kernels
from labutils.quantization.packed import pack_model_

SCHEMES = {"int8": Scheme(8), "int4": Scheme(4, granularity="group", group_size=64)}
PEERS = {"float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
PROMPT_TOKENS, IN_CACHE = 16, 4  # a small model decodes so many times as many tokens


@dataclass(frozen=True)
class Load:
    """What is asked of an engine: so many prompts of so many tokens, and new tokens for each."""

    name: str
    rows: int
    prompt: int
    count: int

    def rate(self, ticks: Sequence[float]) -> float:
        """tokens/s: of the new tokens after the first, or of the prompt where no more are asked for.

        >>> Load("decode", 1, 16, 3).rate([0.0, 1.0, 1.5, 2.0]), Load("prefill", 1, 16, 1).rate([0.0, 2.0])
        (2.0, 8.0)
        """
        if self.count == 1:
            return self.prompt / (ticks[1] - ticks[0])
        return self.rows * (self.count - 1) / (ticks[-1] - ticks[1])


@dataclass(frozen=True)
class Contender:
    """An engine to start: its name in the table, what `engines.main` is told, the form and file of its weights."""

    name: str
    engine: str
    settings: dict
    form: str
    file: Path
    missing: str = ""
    python: str = ""

    @property
    def read(self) -> int:
        """How much a probe reads beside it; 0 in the cache, and where the file holds another form of the weights."""
        return 0 if self.engine == "torch" else probe_bytes(self.file.stat().st_size)


def loads(new_tokens: int, *, small: bool) -> list[Load]:
    """All loads, the batches with as many new tokens together; a model in the cache decodes more, as it is faster."""
    many = new_tokens * (IN_CACHE if small else 1)
    batches = {name: int(name.split()[0]) for name in BATCHES}
    several = [Load(name, rows, PROMPT_TOKENS, max(4 * many // rows, 2) + 1) for name, rows in batches.items()]
    return [Load(DECODE, 1, PROMPT_TOKENS, many + 1), Load(PREFILL, 1, 512, 1), *several, Load(LONG, 1, POSITIONS, 1)]


def bench_quantization(
    subjects: Sequence[Callable[[], Subject]],
    settings: Settings,
    *,
    threads: Sequence[int],
    say: Callable[[str], None] = print,
    path: Path | None = None,
) -> list[EngineRow]:
    """Measures every engine under every load and returns the rows of this machine.

    Args:
        subjects: Each makes a model.
        settings: Tokens, rounds, and whether others than ours run.
        threads: Numbers of threads, one after the other.
        say: Hears of the progress.
        path: Where rows are kept, load by load; what it holds of this CPU is not measured again.

    Raises:
        ValueError: If `rounds` is below 5.
        RuntimeError: If an engine ends instead of answering.
    """
    check_repeats(settings.rounds)
    find_kernels()  # compiles them, where that was not done: no engine's loading is to wait for it
    rows = read_rows(path) if path and path.exists() else []
    for make in subjects:
        subject = make()
        for count in threads:
            known = {r.load for r in rows if (r.model, r.threads, r.host) == (subject.name, count, host_description())}
            todo = [load for load in loads(settings.new_tokens, small=_small(subject)) if load.name not in known]
            if not todo:
                continue
            with ExitStack() as stack:
                bench = Bench(subject, replace(settings, threads=count), stack, say)
                for load in todo:
                    found = bench.measure(load)
                    say(f"\n{place(found[0])}, {settings.rounds} rounds in turn")
                    say("\n".join([as_table(found), *map(str, judge(found))]))
                    rows += found
                    if path:
                        write_json(rows, path)
    return rows


class Bench:
    """One model with one number of threads: its engines, awake one at a time."""

    def __init__(self, subject: Subject, settings: Settings, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.subject, self.settings, self.say = subject, settings, say
        self.children: dict[str, Child] = {}
        self.missing: dict[str, str] = {}
        self.contenders = contenders(subject, settings, Path(stack.enter_context(TemporaryDirectory())))
        for each in self.contenders:
            try:
                if each.missing:
                    raise RuntimeError(each.missing)
                self.children[each.name] = start(
                    each.engine, each.settings, settings.threads, stack, python=each.python
                )
            except (RuntimeError, OSError) as error:
                self.missing[each.name] = str(error)
                say(f"  {each.name} is left out: {error}")
        self.probe = start("bandwidth", {"threads": settings.threads}, settings.threads, stack)

    def measure(self, load: Load) -> list[EngineRow]:
        """A row for each engine; attention is that of our int8 alone."""
        if load.name == LONG:
            return [self._attention(load)]
        generator = torch.Generator().manual_seed(load.rows)
        vocab = self.subject.model.config.vocab_size
        prompts = torch.randint(vocab, (load.rows, load.prompt), generator=generator).tolist()
        job = {"do": "timed", "prompts": prompts, "count": load.count}
        names = [c.name for c in self.contenders if c.name in self.children and (c.engine != "torch" or load.rows == 1)]
        answers: dict[str, list[dict]] = {name: [] for name in names}
        sizes = {c.read for c in self.contenders if c.name in names and load.name == DECODE} - {0}
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        functions = {name: partial(self._run, name, job, answers[name]) for name in names}
        functions |= {str(size): partial(self._ask_probe, size, found) for size, found in rates.items()}
        measure_interleaved(functions, repeats=self.settings.rounds, warmup=1)
        return [self._row(each, load, answers.get(each.name, [])[1:], rates) for each in self.contenders]

    def _attention(self, load: Load) -> EngineRow:
        its, answers, rates = next(c for c in self.contenders if c.form == "int8"), [], []
        row = EngineRow(
            engine=its.name, model=self.subject.name, load=load.name, threads=self.settings.threads, form="int8"
        )
        if its.name in self.missing:
            return replace(row, note=self.missing[its.name])
        job = {"do": "attention", "positions": load.prompt}
        try:
            size = self.children[its.name].ask(job)["bytes"]
        except RuntimeError as error:  # heads that an int8 cache does not fit
            return replace(row, note=str(error))
        functions = {
            its.name: partial(self._run, its.name, job, answers),
            "probe": partial(self._ask_probe, size, rates),
        }
        measure_interleaved(functions, repeats=self.settings.rounds, warmup=1)
        seconds = [answer["seconds"] for answer in answers[1:]]
        share = median(size / s / rate for s, rate in zip(seconds, rates[1:], strict=True))
        return replace(row, samples=tuple(load.prompt / s for s in seconds), cache_bytes=size, bandwidth_share=share)

    def _run(self, name: str, job: dict, answers: list[dict]) -> None:
        answers.append(self.children[name].ask(job))

    def _ask_probe(self, size: int, rates: list[float]) -> None:
        rates.append(self.probe.ask({"do": "read", "size": size})["rate"])

    def _row(self, each: Contender, load: Load, answers: list[dict], rates: dict[int, list[float]]) -> EngineRow:
        size = each.file.stat().st_size
        row = EngineRow(
            engine=each.name,
            model=self.subject.name,
            load=load.name,
            threads=self.settings.threads,
            form=each.form,
            file_bytes=size,
            cache_bytes=load.rows * (load.prompt + load.count) * kv_bytes_per_position(self.subject.model.config),
            note=self.missing.get(each.name, "" if answers else "one prompt at a time"),
        )
        if not answers:
            return row
        samples = tuple(load.rate(answer["ticks"]) for answer in answers)
        row = replace(row, samples=samples, load_s=answers[-1]["load_s"], peak_bytes=answers[-1]["peak_bytes"])
        peaks = rates.get(each.read, [])[1:]
        if peaks:
            shares = [speed * size / peak for speed, peak in zip(samples, peaks, strict=True)]
            row = replace(row, bandwidth_share=median(shares))
        return replace(row, profile=self._profile(row, load)) if row.ours else row

    def _profile(self, row: EngineRow, load: Load) -> dict[str, float]:
        """Shares of a step: the layers' matrices and the head timed alone, the rest by subtraction.

        None at all where those parts, called one by one from Python, take longer than the step in C.
        """
        step_rows = load.prompt if load.count == 1 else load.rows
        answer = self.children[row.engine].ask({"do": "profile", "rows": step_rows})
        shares = {name: answer[name] * row.tokens_per_s / step_rows for name in ("matrices", "head")}
        rest = 1 - sum(shares.values())
        return shares | {"attention, norms, the rest": rest} if rest >= 0 else {}


def contenders(subject: Subject, settings: Settings, folder: Path) -> list[Contender]:
    """Writes the model in every form and names the engines that read it."""
    threads, found = {"threads": settings.threads}, []
    plain = folder / "float32"
    subject.model.save_pretrained(plain)
    weights = plain / "model.safetensors"
    for form in PEERS:
        packed, its = form in SCHEMES, plain
        if packed:
            its = folder / form
            save_quantized(pack_model_(copy.deepcopy(subject.model), SCHEMES[form]), None, its, method="rtn")
        told = threads | {"folder": str(its), "packed": packed}
        found.append(Contender(f"{OURS} {form}", "ours", told, form, its / "model.safetensors"))
        if form == "int8":
            found.append(replace(found[-1], name=f"{OURS} {form}, {AGAIN}"))
    if not settings.peers:
        return found
    for form, name in PEERS.items():
        path = folder / f"{name}.gguf"
        export_gguf(subject.model, None, path, format=name)
        for fork in FORKS:
            for repack in (True, False) if form in SCHEMES else (False,):
                told = threads | {"path": str(path), "fork": fork, "repack": repack}
                label = f"{fork} {name}" + REPACKED * repack
                found.append(Contender(label, "llama", told, form, path, not_installed(fork)))
    absent = "" if settings.vllm else "name a Python that has it with --vllm"
    told = {"folder": str(plain)}
    found.append(Contender("vLLM", "vllm", told, "float32", weights, absent, settings.vllm))
    absent = "" if find_spec("torchao") else "not installed: pip install torchao"
    for name, kind, missing in (("torch dynamic int8", "dynamic", ""), ("torchao int8, eager", "torchao", absent)):
        told = threads | {"folder": str(plain), "kind": kind}
        found.append(Contender(name, "torch", told, "int8", weights, missing))
    return found


def _small(subject: Subject) -> bool:
    return probe_bytes(subject.weight_bytes) == 0
