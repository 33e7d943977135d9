"""What `bench serving` reports: a row for each engine and load, their table, and the bars of chapter 11."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from labutils.course.bench.table import Bar
from labutils.measurement.ledger import host_description
from labutils.measurement.timing import bootstrap_interval, paired_ratio, quantile

OURS, AGAIN, VLLM = "ours", "again", "vLLM"
Times = tuple[float, float, float]  # of a request: arrival, first token, last token


@dataclass(frozen=True, kw_only=True)
class ServingRow:
    """One engine under one load.

    Attributes:
        at_once: Clients of a closed loop, each with one request at a time; None in an open loop.
        rate: Requests/s of an open loop; None in a closed one.
        rounds: Of each round, the times of each request in seconds from the round's beginning.
        new_tokens: Of each request.
        ttft_slo_s: The longest time to first token of a good request.
        tpot_slo_s: The longest time per token of a good request.
        settings: What the engine was tuned to.
        same_text: How many texts equal those of each request alone.
    """

    engine: str
    model: str
    bits: int
    threads: int
    new_tokens: int
    rounds: tuple[tuple[Times, ...], ...]
    at_once: int | None = None
    rate: float | None = None
    ttft_slo_s: float = 1.0
    tpot_slo_s: float = 0.05
    settings: str = ""
    same_text: str = ""

    @property
    def load(self) -> str:
        """The load in words."""
        return f"{self.at_once} at once" if self.at_once else f"{self.rate:.3g} requests/s"

    @property
    def samples(self) -> tuple[float, ...]:
        """Tokens/s of each round, from its beginning to its last token."""
        return tuple(len(times) * self.new_tokens / max(last for *_, last in times) for times in self.rounds)

    @property
    def ttft_s(self) -> list[float]:
        """Time to first token of all requests of all rounds; a wait in the queue counts."""
        return [first - arrived for times in self.rounds for arrived, first, _ in times]

    @property
    def tpot_s(self) -> list[float]:
        """Time per token after the first, of all requests of all rounds."""
        return [(last - first) / (self.new_tokens - 1) for times in self.rounds for _, first, last in times]

    @property
    def good_share(self) -> float:
        """Goodput as a share: requests within both objectives, of all requests."""
        pairs = list(zip(self.ttft_s, self.tpot_s, strict=True))
        return sum(ttft <= self.ttft_slo_s and tpot <= self.tpot_slo_s for ttft, tpot in pairs) / len(pairs)

    def to_json(self) -> dict[str, object]:
        """The row with its raw times in microseconds' resolution, its summaries, and the machine."""
        rounds = [[[round(t, 6) for t in times] for times in each] for each in self.rounds]
        found = {"tokens_per_s": median(self.samples), "interval": bootstrap_interval(self.samples)}
        for name, values in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            found[name] = {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99)}
        return asdict(self) | {"rounds": rounds} | found | {"good_share": self.good_share, "host": host_description()}


def judge(rows: Sequence[ServingRow], shares: Mapping[str, Mapping[str, float]], *, large: bool) -> list[Bar]:
    """The bars of chapter 11 for one subject, at 8 at once (or the largest load below).

    llama.cpp is met at equal bits; vLLM, which reads these models in float32, by our best format.

    Args:
        rows: Of one subject.
        shares: Of our engines, where their time goes; said where a bar is missed.
        large: Whether it is the 0.2B model, on which more is asked for against llama.cpp, and nothing against vLLM.
    """
    loads = [row.at_once for row in rows if row.at_once]
    load = max((count for count in loads if count <= 8), default=min(loads, default=0))
    here = [row for row in rows if row.at_once == load]
    ours = [row for row in here if row.engine.startswith(OURS) and AGAIN not in row.engine]
    llama = {row.bits: row for row in here if row.engine.startswith("llama.cpp")}
    pairs = [(row, llama[row.bits], 1.2 if large else 1.0) for row in ours if row.bits in llama]
    best = max(ours, key=lambda row: median(row.samples), default=None)
    pairs += [(best, row, 5.0) for row in here if row.engine.startswith(VLLM) and not large]
    bars = []
    for row, peer, factor in pairs:
        ratio = paired_ratio(row.samples, peer.samples)
        claim = f"{row.model}, {row.load}: {row.engine} at least {factor} times {peer.engine}"
        missed = "" if ratio.value >= factor else f"; time: {as_shares(shares.get(row.engine, {}))}"
        bars.append(Bar(claim, f"{ratio}{missed}", ratio.value >= factor))
    return bars


def same_twice(rows: Sequence[ServingRow]) -> list[str]:
    """The A/A pair: our engine in two processes, load by load; its ratio shows what the harness itself adds."""
    again = {row.load: row for row in rows if AGAIN in row.engine}
    firsts = {row.engine: row.engine.removesuffix(f", {AGAIN}") for row in again.values()}
    pairs = [(row, again[row.load]) for row in rows if row.engine in firsts.values() and row.load in again]
    return [f"A/A, {row.model}, {row.load}: {paired_ratio(row.samples, other.samples)}" for row, other in pairs]


def as_shares(shares: Mapping[str, float]) -> str:
    """Shares of the time in words."""
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items())


def as_table(rows: Sequence[ServingRow]) -> str:
    """The rows as text, load by load."""
    head = f"{'load':<18}{'engine':<28}{'tokens/s':>10} {'95% interval':>19}{'TTFT p50':>11}{'p99':>9}"
    lines = [head + f"{'a token p50':>13}{'p99':>8} ms {'good':>5}  same text"]
    for row in sorted(rows, key=lambda row: (row.at_once is None, row.at_once or 0, row.rate or 0.0)):
        low, high = bootstrap_interval(row.samples)
        times = [quantile(values, part) * 1e3 for values in (row.ttft_s, row.tpot_s) for part in (0.5, 0.99)]
        line = f"{row.load:<18}{row.engine:<28}{median(row.samples):>10.1f} {f'[{low:.1f}, {high:.1f}]':>19}"
        line += "{:>11.1f}{:>9.1f}{:>13.2f}{:>8.2f}".format(*times)
        lines.append(f"{line}    {row.good_share:>5.0%}  {row.same_text}  {row.settings}".rstrip())
    return "\n".join(lines)


def as_markdown(rows: Sequence[Mapping], *, at_once: int) -> str:
    """The README's table of stored rows: each engine under one load, a model behind the other, the fastest first."""
    lines = ["| | tokens/s | 95% interval | first token p50, p99 (ms) | a later token p50, p99 (ms) |"]
    lines.append("| --- | --- | --- | --- | --- |")
    here = [row for row in rows if row["at_once"] == at_once and AGAIN not in row["engine"]]
    for model in dict.fromkeys(row["model"] for row in here):
        lines.append(f"| **{model}** | | | | |")
        for row in sorted((r for r in here if r["model"] == model), key=lambda r: -r["tokens_per_s"]):
            low, high = row["interval"]
            first, later = ([1e3 * row[name][part] for part in ("p50", "p99")] for name in ("ttft_s", "tpot_s"))
            shown = [f"{row['tokens_per_s']:,.0f}", f"{low:,.0f} to {high:,.0f}"]
            shown += ["{:,.0f}, {:,.0f}".format(*first), "{:.1f}, {:.1f}".format(*later)]
            lines.append(f"| {row['engine']} | {' | '.join(shown)} |")
    return "\n".join(lines)
