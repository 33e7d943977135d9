"""What `bench quantization` reports: a row for each engine and load, the bars of the course, and the README's tables.

`python -m labutils.course.bench.quantization_rows` writes the stored run into the README, between its two comments.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median

from labutils.course.bench.llama_cpp import FORKS
from labutils.course.bench.serving_rows import as_shares
from labutils.course.bench.table import Bar
from labutils.lab.paths import DATA, ROOT
from labutils.measurement.ledger import host_description
from labutils.measurement.timing import bootstrap_interval, paired_ratio

STORED, README = DATA / "results" / "engines.json", ROOT / "README.md"
BEGIN, END = "<!-- engines -->\n", "<!-- /engines -->\n"
INTRO = """The same weights in our engines, in llama.cpp and ik_llama.cpp ({wheels}) with flash attention on, in vLLM on
the CPU (float32, eager) and in PyTorch's int8, whose inputs have 7 bits (`python -m labutils bench quantization
--json FILE`; every sample is in [engines.json](data/results/engines.json)). Each engine is a process of its own that is
stopped while another is timed, since engines that share one slow each other
([chapter 06](notebooks/solutions/06_gpu_acceleration.ipynb) shows it), and no server stands between us and llama.cpp.
A second process of our int8, timed in the same rounds (an A/A pair, `again` in that file), shows how far equal
engines differ.
Tokens/s with 95% intervals over {rounds} rounds in turn: decoding after 16 tokens, reading 512, decoding for
8 and 32 prompts together. `r` marks weights reordered for the CPU, where that was faster; memory is the most
used while loading and decoding, beyond what the process had before; vLLM reserves 2 GB of it for its cache."""
OURS, AGAIN, REPACKED = "ours", "again", ", repacked"
DECODE, PREFILL, BATCHES = "decode", "prefill of 512", ("8 at once", "32 at once")
LOADS = (DECODE, PREFILL, *BATCHES)
POSITIONS, LONG = 2048, "attention over an int8 cache of 2,048"
SAME, SHARE, LOAD_S, MEMORY, CACHE = 0.03, 0.85, 0.2, 1.15, 1.3  # bars that are no ratio to a peer
SMALL, LARGE = {"float32": 1.05, "int8": 1.6, "int4": 1.4}, {"float32": 1.05, "int8": 1.5, "int4": 1.8}


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """One engine under one load.

    Attributes:
        form: float32, int8 or int4; peers are met at equal bits.
        samples: tokens/s of each round; of a prompt's tokens where the load is to read it, of positions for `LONG`.
        file_bytes: Of the weights as stored.
        cache_bytes: Of the keys and values of this load, as our engine stores them.
        bandwidth_share: Bytes read per second, as a share of what the best probe read of as many in the same round; the
            median over rounds. None where they fit into the cache. Of the cache's bytes for `LONG`.
        load_s: From the file to an engine that is ready, without imports.
        peak_bytes: The most memory in use so far, beyond what the process had before it loaded.
        profile: Shares of a step's time; empty where they are not known.
        note: Why there are no samples.
    """

    engine: str
    model: str
    load: str
    threads: int
    form: str
    samples: tuple[float, ...] = ()
    file_bytes: int = 0
    cache_bytes: int = 0
    bandwidth_share: float | None = None
    load_s: float | None = None
    peak_bytes: int | None = None
    profile: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    host: Mapping[str, object] = field(default_factory=host_description)

    @property
    def tokens_per_s(self) -> float:
        """The median over rounds."""
        return median(self.samples)

    @property
    def ours(self) -> bool:
        """Whether it is one of the course's engines, and not the second of the A/A pair."""
        return self.engine.startswith(OURS) and AGAIN not in self.engine

    def to_json(self) -> dict[str, object]:
        """The row with its median and interval."""
        interval = bootstrap_interval(self.samples) if self.samples else None
        speed = self.tokens_per_s if self.samples else None
        return asdict(self) | {"tokens_per_s": speed, "interval": interval}

    @classmethod
    def from_json(cls, entry: Mapping) -> "EngineRow":
        """The row of `to_json`."""
        known = {f.name: entry[f.name] for f in fields(cls)}
        return cls(**known | {"samples": tuple(entry["samples"])})


def read_rows(path=STORED) -> list[EngineRow]:
    """The rows of a stored run."""
    return [EngineRow.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def judge(rows: Sequence[EngineRow]) -> list[Bar]:
    """Every bar for which there are measurements; a missed one says where a step's time goes."""
    bars = []
    for here in _groups(rows):
        for ours in (row for row in here if row.ours):
            bars += [*_against_others(ours, here), *_alone(ours)]
        again = [row for row in here if AGAIN in row.engine]
        for second in again:
            first = next(row for row in here if row.engine == second.engine.removesuffix(f", {AGAIN}"))
            ratio = paired_ratio(first.samples, second.samples)
            claim = f"{place(first)}: {first.engine} in two processes within {SAME:.0%}"
            bars.append(Bar(claim, str(ratio), abs(ratio.value - 1) <= SAME))
    return bars


def _groups(rows: Sequence[EngineRow]) -> Iterator[list[EngineRow]]:
    """Rows that were measured in the same rounds, without those that could not be."""
    keys = dict.fromkeys((row.model, row.threads, row.load) for row in rows)
    for key in keys:
        yield [row for row in rows if (row.model, row.threads, row.load) == key and row.samples]


def place(row: EngineRow) -> str:
    """Model, threads and load in words."""
    return f"{row.model}, {_threads(row.threads)}, {row.load}"


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


def _against_others(ours: EngineRow, here: Sequence[EngineRow]) -> Iterator[Bar]:
    factors = SMALL if ours.model == "lablm" else LARGE
    factor = factors[ours.form] if ours.load == DECODE else 1.2
    peers = [row for row in here if not row.engine.startswith(OURS) and row.form == ours.form]
    if ours.load in BATCHES:
        peers = [row for row in peers if row.engine.startswith("llama.cpp")]
    others = [(max(peers, key=lambda row: row.tokens_per_s), factor)] if peers else []
    if ours.load == PREFILL and ours.form != "float32":
        others += [(row, 1.5) for row in here if row.ours and row.form == "float32"]
    for other, factor in others:
        ratio = paired_ratio(ours.samples, other.samples)
        holds = ratio.value >= factor
        spent = "" if holds or not ours.profile else f"; time: {as_shares(ours.profile)}"
        if not holds and ours.bandwidth_share:
            spent = f"; {ratio.value / ours.bandwidth_share:.2f}x if all bandwidth were used{spent}"
        yield Bar(f"{place(ours)}: {ours.engine} at least {factor} times {other.engine}", f"{ratio}{spent}", holds)


def _alone(ours: EngineRow) -> Iterator[Bar]:
    if ours.load == LONG:
        ratio = 1 / ours.bandwidth_share
        yield Bar(f"{place(ours)}: at most {CACHE} times its bytes' time", f"{ratio:.2f}x", ratio <= CACHE)
    if ours.load != DECODE:
        return
    if ours.bandwidth_share is not None:
        share, spent = ours.bandwidth_share, f"; time: {as_shares(ours.profile)}" if ours.profile else ""
        claim = f"{place(ours)}: {ours.engine} reads at {SHARE:.0%} of the bandwidth measured"
        yield Bar(claim, f"{share:.0%}{'' if share >= SHARE else spent}", share >= SHARE)
    if ours.form == "int4" and ours.peak_bytes is not None:
        ratio = ours.peak_bytes / (ours.file_bytes + ours.cache_bytes)
        claim = f"{place(ours)}: memory of {ours.engine} at most {MEMORY} times file and cache"
        yield Bar(claim, f"{ratio:.2f}x of {(ours.file_bytes + ours.cache_bytes) / 1e6:.0f} MB", ratio <= MEMORY)
        claim = f"{place(ours)}: {ours.engine} loads in at most {LOAD_S} s"
        yield Bar(claim, f"{ours.load_s:.2f} s", ours.load_s <= LOAD_S)


def as_markdown(rows: Sequence[EngineRow]) -> str:
    """What the README says of a stored run: how it was made, a table by machine, and every bar."""
    wheels = ", ".join(fork.wheel.replace("==", " ") for fork in FORKS.values())
    parts = [INTRO.format(wheels=wheels, rounds=max(len(row.samples) for row in rows)).rstrip()]
    for cpu in dict.fromkeys(row.host["cpu"] for row in rows):
        its = [row for row in rows if row.host["cpu"] == cpu]
        bars = judge(its)
        parts += [
            as_table(its),
            f"<details><summary>{sum(bar.holds for bar in bars)} of {len(bars)} bars are met</summary>",
        ]
        lines = [f"| {bar.claim} | {bar.measured} | {'met' if bar.holds else 'missed'} |" for bar in bars]
        parts += ["\n".join(["| bar | measured | |", "| --- | --- | --- |", *lines]), "</details>\n"]
    return "\n\n".join(parts)


def as_table(rows: Sequence[EngineRow]) -> str:
    """One machine's tokens/s with their intervals, by model and threads, the fastest first.

    Of a peer's weights as stored and reordered for the CPU, the faster is shown; `r` marks the latter.
    """
    lines = [f"| {rows[0].host['cpu']}, tokens/s | {' | '.join(LOADS)} | memory, MB | to load, s |", "| --- " * 7 + "|"]
    for key in dict.fromkeys((row.model, row.threads) for row in rows):
        cells: dict[str, dict[str, EngineRow]] = {}
        for row in sorted((row for row in rows if row.samples and row.load in LOADS), key=lambda row: row.tokens_per_s):
            if (row.model, row.threads) == key and AGAIN not in row.engine:
                cells.setdefault(row.engine.removesuffix(REPACKED), {})[row.load] = row
        firsts = {name: next(row[load] for load in LOADS if load in row) for name, row in cells.items()}
        lines.append(f"| **{key[0]}, {_threads(key[1])}** | | | | | | |")
        for name, row in sorted(firsts.items(), key=lambda item: -item[1].tokens_per_s):
            speeds = [_speed(cells[name][load]) if load in cells[name] else "" for load in LOADS]
            memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
            lines.append(f"| {name} | {' | '.join(speeds)} | {memory} | {row.load_s:.2f} |")
    return "\n".join(lines)


def _speed(row: EngineRow) -> str:
    digits = 0 if row.tokens_per_s >= 100 else 1
    middle, low, high = (f"{v:,.{digits}f}" for v in (row.tokens_per_s, *bootstrap_interval(row.samples)))
    return f"{middle} [{low}, {high}]" + " r" * row.engine.endswith(REPACKED)


def main() -> None:
    """Writes the stored run into the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}{as_markdown(read_rows())}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
