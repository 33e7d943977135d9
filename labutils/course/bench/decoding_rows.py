"""What `bench decoding` reports: rows, their table, and the bars of chapter 10."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from labutils.course.bench.table import Bar
from labutils.measurement.ledger import host_description
from labutils.measurement.timing import bootstrap_interval, paired_ratio, quantile


@dataclass(frozen=True, kw_only=True)
class DraftRow:
    """One way to decode one kind of text.

    Attributes:
        samples: tokens/s of each round, all prompts together, without reading them.
        speedup: over our fastest plain decoding, with its interval, paired by round.
        draft_tokens: γ, chosen on other prompts.
        acceptance: accepted ÷ judged with its bootstrap interval over prompts; None where nothing was judged.
        shares: of its time, drafting, the target's rows by the step curve, and the rest (verifier and Python).
        predicted: the speed-up that acceptance, the step's curve and the draft's cost foretell, by batch.
        measured: over plain decoding of the same batch, with its interval and the equal texts, for batches above 1.
        same_text: how many prompts' greedy text equals plain decoding's, and how many part from it at a near-tie.
        exact: whether those are all.
    """

    technique: str
    model: str
    kind: str
    threads: int
    samples: tuple[float, ...] = ()
    speedup: str = ""
    draft_tokens: int | None = None
    acceptance: tuple[float, float, float] | None = None
    tokens_per_step: float | None = None
    shares: tuple[float, float, float] | None = None
    predicted: dict[int, float] | None = None
    measured: dict[int, str] | None = None
    same_text: str = ""
    exact: bool = True
    note: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Median over rounds."""
        return quantile(self.samples, 0.5)

    def to_json(self) -> dict[str, object]:
        """The row with its median, its interval, and the machine."""
        interval = bootstrap_interval(self.samples) if self.samples else None
        median = self.tokens_per_s if self.samples else None
        return asdict(self) | {"tokens_per_s": median, "interval": interval, "host": host_description()}


def judge(rows: Sequence[DraftRow]) -> list[Bar]:
    """The bars of chapter 10 for one subject: against our fastest plain decoding, and llama.cpp's own drafts."""
    bars, by_kind = [], lambda kind: [row for row in rows if row.kind == kind and row.samples]
    for kind, factor in (("qa", 1.8), ("code", 1.3)):
        found = by_kind(kind)
        plain = max((r for r in found if r.technique.startswith("plain")), key=lambda r: r.tokens_per_s)
        lossless = [r for r in found if r.predicted is not None and r.exact]
        best = max(lossless or [plain], key=lambda r: r.tokens_per_s)
        ratio = paired_ratio(best.samples, plain.samples)
        claim = f"{best.model}, {kind}: {best.technique} at least {factor} times {plain.technique}"
        bars.append(Bar(claim, f"{ratio}{_profile(best)}", ratio.value >= factor))
        peers = [r for r in found if r.technique.startswith("llama.cpp,")]
        if peers:
            peer = max(peers, key=lambda r: r.tokens_per_s)
            ratio = paired_ratio(best.samples, peer.samples)
            claim = f"{best.model}, {kind}: {best.technique} at least 1.2 times {peer.technique}"
            bars.append(Bar(claim, str(ratio), ratio.value >= 1.2))
    return bars


def _profile(row: DraftRow) -> str:
    """Where the time of a drafted text goes."""
    if row.shares is None or row.tokens_per_step is None:
        return ""
    draft, rows, rest = row.shares
    spent = f"{draft:.0%} drafting, {rows:.0%} rows, {rest:.0%} verifier and Python"
    return f"; {row.tokens_per_step:.2f} tokens a step; time: {spent}"


def as_table(rows: Sequence[DraftRow]) -> str:
    """The rows as text."""
    head = f"{'technique':<28}{'text':<12}{'γ':>3}{'acceptance':>20}{'a step':>8}{'tokens/s':>10}  {'speed-up':<20}"
    batches = [
        f"{row.technique}, {row.kind}, {batch} streams: {speedup} (predicted {row.predicted[batch]:.2f}x)"
        for row in rows
        for batch, speedup in (row.measured or {}).items()
    ]
    return "\n".join([head + f"{'predicted at batch 1, 4, 8':<28}same text", *map(_line, rows), *batches])


def _line(row: DraftRow) -> str:
    accepted = "-" if row.acceptance is None else "{:.2f} [{:.2f}, {:.2f}]".format(*row.acceptance)
    step = "-" if row.tokens_per_step is None else f"{row.tokens_per_step:.2f}"
    foretold = "-" if row.predicted is None else ", ".join(f"{gain:.2f}x" for gain in row.predicted.values())
    line = f"{row.technique:<28}{row.kind:<12}{row.draft_tokens or '-':>3}{accepted:>20}{step:>8}"
    if not row.samples:
        return f"{line}  {row.note}"
    return line + f"{row.tokens_per_s:>10.1f}  {row.speedup:<20}{foretold:<28}{row.same_text}"
