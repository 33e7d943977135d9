"""Rows of a benchmark: as a table for people, as JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from labutils.measurement.ledger import host_description
from labutils.measurement.timing import Ratio, bootstrap_interval, paired_ratio, quantile


@dataclass(frozen=True, kw_only=True)
class Row:
    """One technique on one model.

    Attributes:
        samples: Decoding speed in tokens/s, one per round; empty where the technique did not run.
        bandwidth_share: Bytes read per second of decoding, as a share of what the best probe reached in the same round
            on as many bytes; the median over rounds. None where it does not apply (a model that fits into the cache) or
            would exceed 100%.
        quality: Bits per byte on held-out text, of a technique whose tokens equal the reference's.
        agreement: Share of greedy tokens equal to `transformers`'.
        note: Why a number is missing.
    """

    technique: str
    model: str
    threads: int
    samples: tuple[float, ...] = ()
    batch: int = 1
    time_to_first_token_s: float | None = None
    bytes_per_token: float | None = None
    bandwidth_share: float | None = None
    quality: float | None = None
    agreement: float | None = None
    note: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Median decoding speed, all rows of the batch together."""
        return quantile(self.samples, 0.5) if self.samples else None

    def to_json(self) -> dict[str, object]:
        """The row with its median, its interval, and the machine."""
        interval = bootstrap_interval(self.samples) if self.samples else None
        return asdict(self) | {"tokens_per_s": self.tokens_per_s, "interval": interval, "host": host_description()}


@dataclass(frozen=True)
class Bar:
    """A claim about a measured ratio, and whether it holds."""

    claim: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}: {self.claim}; measured {self.measured}"


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Writes one JSON array with an object per row; to a file named .jsonl, a line per row."""
    objects = [row.to_json() for row in rows]
    lines = [json.dumps(each) for each in objects] if path.suffix == ".jsonl" else [json.dumps(objects, indent=1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_table(rows: Sequence[Row], *, reference: str) -> str:
    """Returns the rows as text, each with its paired ratio to the nearest `reference` above it.

    Raises:
        ValueError: If no row is of that technique.
    """
    base = next((row for row in rows if row.technique == reference), None)
    if base is None:
        raise ValueError(f"a row of the reference technique {reference!r} is needed; got {[r.technique for r in rows]}")
    head = f"{'technique':<26}{'threads':>7}{'tokens/s':>10} {'95% interval':>18}  {'vs ' + reference:<24}"
    lines = [head + f"{'bandwidth':>10}{'first token':>13}{'same tokens':>13}{'bits/byte':>11}  note"]
    for row in rows:
        base = row if row.technique == reference else base
        lines.append(_line(row, base))
    return "\n".join(lines)


def _line(row: Row, base: Row) -> str:
    name = row.technique + (f" (batch {row.batch})" if row.batch > 1 else "")
    if not row.samples:
        return (
            f"{name:<26}{row.threads:>7}{'-':>10} {'-':>18}  {'-':<24}{'-':>10}{'-':>13}{'-':>13}{'-':>11}  {row.note}"
        )
    low, high = bootstrap_interval(row.samples)
    ratio = str(_ratio(row, base)) if base.samples else "-"
    share = "-" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}"
    first = "-" if row.time_to_first_token_s is None else f"{row.time_to_first_token_s * 1e3:.1f} ms"
    same = "-" if row.agreement is None else f"{row.agreement:.0%}"
    quality = "-" if row.quality is None else f"{row.quality:.4f}"
    speed = f"{row.tokens_per_s:>10.2f} {f'[{low:.2f}, {high:.2f}]':>18}  {ratio:<24}"
    return f"{name:<26}{row.threads:>7}{speed}{share:>10}{first:>13}{same:>13}{quality:>11}  {row.note}".rstrip()


def _ratio(row: Row, base: Row) -> Ratio:
    return paired_ratio(row.samples, base.samples)
