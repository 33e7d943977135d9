"""The ledger: one record per measurement, one JSON line per record, in the learner's own folder.

A line is written by a single `write` to a file opened for appending, under a lock, so two notebooks may
append at once. A process killed in the middle leaves a torn last line: readers skip it with a warning, and
the next append ends it with a newline before writing its own.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from labutils.lab.paths import learner_dir
from labutils.measurement.limits import available_cores
from labutils.measurement.timing import MIN_REPEATS, bootstrap_interval

LEDGER_NAME = "ledger.jsonl"
SAMPLED = ("samples", "task_scores", "answer_s", "joules_per_token")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: what ran, how fast, how well, on which machine.

    Attributes:
        technique: For the legend: `own KV cache`, `int8 weights`.
        model: Name or path; a speed-only model says `random weights` here.
        samples: Raw tokens/s, one per repeat; at least five to be drawn.
        bits_per_byte: Quality on text; lower is better. `baseline_bits_per_byte` is the same tokens' before.
        task_score: A task's score in [0, 1], higher is better, with the task's name in `task`.
        task_scores: The score of every request behind `task_score`, so that two records can be compared in pairs.
        family: What kind of technique it is: "quantized", "pruned" …; empty where nobody said.
        answer_s: Seconds that one request of the task took, prompt, samples and votes included; one per repeat.
        joules_per_token: Measured by a counter, idle power taken off; one per repeat, empty where nothing can count.
        quality_tokens: How many tokens the quality was measured on.
        document_bits: (bits, bytes) of every document behind `bits_per_byte`, so that two records can be compared in
            pairs; empty where nobody kept them.
        bytes_moved_per_token: Read from memory to make one token.
        bytes_resident: Weights and cache kept in memory.
        host: See `host_description`.
    """

    technique: str
    model: str
    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    output_tokens: int
    batch: int = 1
    samples: tuple[float, ...] = ()
    time_to_first_token_s: float | None = None
    time_per_output_token_s: float | None = None
    bytes_moved_per_token: float | None = None
    bytes_resident: float | None = None
    bits_per_byte: float | None = None
    baseline_bits_per_byte: float | None = None
    quality_tokens: int | None = None
    document_bits: tuple[tuple[float, int], ...] = ()
    task: str | None = None
    task_score: float | None = None
    baseline_task_score: float | None = None
    task_scores: tuple[float, ...] = ()
    family: str = ""
    answer_s: tuple[float, ...] = ()
    joules_per_token: tuple[float, ...] = ()
    chapter: str = ""
    host: dict = field(default_factory=lambda: dict(host_description()))
    recorded_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        for name in SAMPLED:
            object.__setattr__(self, name, tuple(float(s) for s in getattr(self, name)))
        object.__setattr__(self, "document_bits", tuple((float(bits), int(size)) for bits, size in self.document_bits))
        for name in ("technique", "model", "device", "dtype"):
            if not getattr(self, name):
                raise ValueError(f"a record needs a {name}; got {getattr(self, name)!r}")
        for name in ("threads", "prompt_tokens", "output_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name, value in self._numbers():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0; got {value}")

    @property
    def tokens_per_s(self) -> float | None:
        """Median of the raw samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def interval_tokens_per_s(self) -> tuple[float, float]:
        """95% bootstrap interval of the median; needs five samples."""
        return bootstrap_interval(self.samples)

    @property
    def missing(self) -> str:
        """The sentence that says what keeps this record from being stored and drawn; empty if nothing does."""
        if len(self.samples) < MIN_REPEATS:
            return f"a record needs at least {MIN_REPEATS} raw samples of tokens/s to be drawn; got {len(self.samples)}"
        if self.bits_per_byte is None and self.task_score is None:
            return "a record needs a quality (bits_per_byte or task_score) to be drawn; got neither"
        if self.task_score is not None and not self.task:
            return "a task_score needs the name of its task; got none"
        return ""

    @property
    def drawable(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def to_json(self) -> str:
        """Returns one line of JSON, with the median beside the samples."""
        return json.dumps({**asdict(self), "tokens_per_s": self.tokens_per_s}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Reads a line; fields of a newer version are ignored.

        Raises:
            ValueError: If the line is not a JSON object with a record's fields.
        """
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError(f"a ledger line must be a JSON object; got {type(entry).__name__}")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{name: value for name, value in entry.items() if name in known})
        except TypeError as error:
            raise ValueError(f"a ledger line must hold a record's fields; {error}") from error

    def _numbers(self) -> Iterator[tuple[str, float]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield f.name, value
        yield from ((name, s) for name in SAMPLED for s in getattr(self, name))


def check_drawable(record: Record) -> None:
    """Refuses a record that could not be drawn.

    Raises:
        ValueError: With the sentence of `record.missing`.
    """
    if not record.drawable:
        raise ValueError(record.missing)


def ledger_path() -> Path:
    """Returns `$LABUTILS_HOME/ledger.jsonl`, or `learner/ledger.jsonl` at the repository's root."""
    return learner_dir() / LEDGER_NAME


def append(record: Record, path: Path | None = None) -> Path:
    """Appends one record as one line and returns the ledger's path.

    Raises:
        ValueError: If the record has no quality or too few raw samples; nothing is written then.
        OSError: If the ledger cannot be written.
    """
    check_drawable(record)
    path = Path(path) if path is not None else ledger_path()
    line = (record.to_json() + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append_line(path, line)
    except TimeoutError:
        raise
    except OSError as error:
        advice = "set LABUTILS_HOME to a folder that is"
        raise type(error)(f"the ledger {path} must be writable: {advice}; got {error.strerror or error}") from error
    return path


def _append_line(path: Path, line: bytes) -> None:
    with locked(path.with_suffix(".lock")):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            if _ends_torn(file):
                line = b"\n" + line
            written = os.write(file, line)
            if written != len(line):
                raise OSError(f"the disk took {written} of {len(line)} bytes")
        finally:
            os.close(file)


def read(path: Path | None = None) -> list[Record]:
    """Returns all readable records, oldest first; a torn line is skipped with a warning."""
    path = Path(path) if path is not None else ledger_path()
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line.decode()))
        except (ValueError, TypeError) as error:
            warnings.warn(f"{path}, line {number}: skipped, torn or not a record ({error})", stacklevel=2)
    return records


@contextmanager
def locked(path: Path, *, timeout_s: float = 30.0) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; the system frees it when the process dies.

    Raises:
        TimeoutError: If another process keeps the lock longer than `timeout_s`.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + timeout_s
    try:
        while not _try_lock(file):
            if time.monotonic() > end:
                raise TimeoutError(f"the ledger's lock must come free within {timeout_s} s; got {path} still locked")
            time.sleep(0.001)
        yield
    finally:
        os.close(file)  # closing frees the lock


@functools.cache
def host_description() -> dict:
    """Returns the machine and the libraries, as far as a number depends on them."""
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "numpy")},
    }


def host_line() -> str:
    """Returns the machine in one line, for the head of a table."""
    host = host_description()
    parts = [
        f"{host['cpu']} ({host['cores']} cores)",
        host["gpu"],
        host["system"],
        f"Python {host['python']}",
        f"torch {host['torch']}",
    ]
    return ", ".join(part for part in parts if part)


def _try_lock(file: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _ends_torn(file: int) -> bool:
    size = os.lseek(file, 0, os.SEEK_END)
    if size == 0:
        return False
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) != b"\n"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
