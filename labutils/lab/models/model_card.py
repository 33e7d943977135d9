"""The numbers of the model card, each with a 95% interval, by one command that anyone can rerun."""

import statistics
from collections.abc import Callable

from labutils.lab.data import corpus, service
from labutils.lab.data.compressors import bigram_bits_per_byte, primed_xz_bits_per_byte, xz_bits_per_byte
from labutils.lab.models.evaluate_service import TaskScore, chrf, score_task
from labutils.lab.models.evaluate_text import document_bits
from labutils.lab.models.load import LanguageModel
from labutils.measurement.resources import NOT_MEASURED
from labutils.measurement.timing import bootstrap_interval

Row = dict[str, object]


def text_rows(loaded: LanguageModel, *, split: str = "test", context: int, limit_bytes: int | None = None) -> list[Row]:
    """Bits per byte of a model on the held-out modules, with an interval over modules."""
    documents = [corpus.Document(d.name, d.text[:limit_bytes]) for d in corpus.stdlib_documents(split)]
    measured = [document_bits(loaded.model, loaded.tokenizer, d, context=context) for d in documents]
    return [_row(f"code, bits per byte (context {context})", measured, _ratio, items=len(measured))]


def compressor_rows(*, split: str = "test", packages: bool = True) -> list[Row]:
    """Bits per byte of compressors on the same modules; "primed" ones have read LabLM's training text first."""
    documents = corpus.stdlib_documents(split)
    stdlib = corpus.stdlib_documents("train")
    library = [d for d in stdlib if not corpus.is_test_file(d)]
    rows = [
        _plain("byte bigram, counted on the library", bigram_bits_per_byte(documents, library)),
        _plain("xz -9e", xz_bits_per_byte(documents)),
        _plain("xz -9e primed with the library", primed_xz_bits_per_byte(documents, library)),
    ]
    if packages:
        everything = stdlib + [d for d in corpus.package_documents() if not corpus.is_test_file(d)]
        rows.append(_plain("xz -9e primed with all training code", primed_xz_bits_per_byte(documents, everything)))
    return rows


def service_rows(loaded: LanguageModel, *, count: int, split: str = "test") -> list[Row]:
    """Exact match of every service task on held-out phrasings, and chrF of the two translations."""
    rows = []
    for task in service.TASKS:
        score = score_task(loaded.model, loaded.tokenizer, task, count=count, split=split)
        rows.append(_accuracy_row(f"{task}, exact match", score))
        novel = [right for right, is_novel in zip(score.is_right, score.is_novel, strict=True) if is_novel]
        if novel:
            rows[-1]["novel_acts"] = f"{sum(novel)}/{len(novel)}"
        if task in (service.TO_CHINESE, service.TO_ENGLISH):
            rows.append(_chrf_row(f"{task}, chrF", score))
    return rows


def _accuracy_row(name: str, score: TaskScore) -> Row:
    return _row(name, [float(right) for right in score.is_right], statistics.fmean, items=len(score.references))


def _chrf_row(name: str, score: TaskScore) -> Row:
    pairs = list(zip(score.predictions, score.references, strict=True))

    def of(sample) -> float:
        predictions, references = zip(*sample, strict=True)
        return chrf(TaskScore(score.task, predictions, references, ())) / 100

    return _row(name, pairs, of, items=len(pairs), resamples=100)


def _row(name: str, samples: list, statistic: Callable, *, items: int, resamples: int = 1000) -> Row:
    low, high = bootstrap_interval(samples, statistic=statistic, resamples=resamples)
    return {"measure": name, "value": statistic(samples), "low": low, "high": high, "items": items}


def _plain(name: str, value: float) -> Row:
    return {"measure": f"code, bits per byte: {name}", "value": value}


def _ratio(samples) -> float:
    bits, sizes = zip(*samples, strict=True)
    return sum(bits) / sum(sizes)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; a value of None was not measured."""
    lines = ["| measure | value | 95% interval | items | novel acts |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        value = NOT_MEASURED if row["value"] is None else f"{row['value']:.3f}"
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else "exact" * (value != NOT_MEASURED)
        cells = (row["measure"], value, interval, row.get("items", ""), row.get("novel_acts", ""))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
