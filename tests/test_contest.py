"""The contest of chapter 03: what an entry may hold and weigh, and who stands where on the board."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from labutils.course.checks import CheckFailed, ch03_contest
from labutils.course.source import read_chapter
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.compare import paired_quality
from labutils.measurement.ledger import Record
from labutils.quantization.affine import Scheme, choose_qparams, quantize

ROW = Scheme(bits=3, symmetric=False, granularity="channel", scale_dtype=torch.float16)


def seen(model):
    return {name: SimpleNamespace(gram=torch.eye(weight_of(layer).shape[1])) for name, layer in linear_layers(model)}


def nearest(name, weight, gram, scheme=ROW):
    qparams = choose_qparams(weight, scheme)
    return quantize(weight, qparams), qparams


def test_entry_counts_codes_scales_and_zero_points():
    model = tiny_model("llama-gqa-tied")
    layers, size_bytes = ch03_contest.entry(nearest, model, seen(model))
    shapes = [tuple(weight_of(layer).shape) for _, layer in linear_layers(model)]
    others = sum(p.numel() for p in model.parameters()) - sum(map(math.prod, shapes))
    by_hand = 16 * others + sum(3 * out * n + (16 + 3) * out for out, n in shapes)
    assert len(layers) == len(shapes) and size_bytes == by_hand / 8

    def real_zeros(name, weight, gram):
        codes, qparams = nearest(name, weight, gram)
        return codes, replace(qparams, zero_point=qparams.zero_point.float())

    assert ch03_contest.entry(real_zeros, model, seen(model))[1] == (by_hand + sum(13 * out for out, _ in shapes)) / 8


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda name, weight, gram: weight, "no pair"),
        (lambda name, weight, gram: (weight, nearest(name, weight, gram)[1]), "no integers"),
        (lambda name, weight, gram: nearest(name, weight, gram, replace(ROW, bits=4)), "more than 3 bits"),
        (lambda name, weight, gram: (nearest(name, weight, gram)[0][:1], nearest(name, weight, gram)[1]), "item|index"),
    ],
)
def test_entry_refuses(answer, words):
    model = tiny_model("llama-gqa-tied")
    with pytest.raises(CheckFailed, match=words):
        ch03_contest.entry(answer, model, seen(model))


def test_entry_refuses_what_is_too_large(monkeypatch):
    monkeypatch.setattr(ch03_contest, "LIMIT_BYTES", 100)
    model = tiny_model("llama-gqa-tied")
    with pytest.raises(CheckFailed, match="too large"):
        ch03_contest.entry(nearest, model, seen(model))


def leaderboard(records):
    """As chapter 03 defines it."""
    source = Path(__file__).resolve().parents[1] / "notebooks" / "source" / "03_quantizing_a_language_model.py"
    cell = next(cell.source for cell in read_chapter(source).cells if "def leaderboard(" in cell.source)
    names = {"paired_quality": paired_quality}
    exec(cell.partition("enter(")[0], names)
    return names["leaderboard"](records)


def record(name, bits):
    documents = [(100.0 * each, 100) for each in bits]
    settings = {
        "model": "lablm",
        "device": "cpu",
        "dtype": "int3",
        "threads": 1,
        "prompt_tokens": 1,
        "output_tokens": 1,
    }
    settings |= {"task": "to_english", "task_score": 0.5, "bytes_resident": 4e6}
    return Record(
        technique=name, samples=[1.0] * 5, document_bits=documents, bits_per_byte=sum(bits) / len(bits), **settings
    )


def test_leaderboard_shares_a_rank_where_an_interval_holds_zero():
    best, worse = [1.0, 1.1, 1.2, 1.3, 1.4], [1.1, 1.2, 1.3, 1.4, 1.5]
    tied = [1.3, 0.9, 1.4, 1.1, 1.35]
    board = [record("contest: worse", worse), record("contest: tied", tied), record("contest: best", best)]
    lines = leaderboard([*board, record("another", [0.1] * 5)]).splitlines()[1:]
    assert [(line.split()[0], line.split()[-1]) for line in lines] == [("1", "best"), ("1", "tied"), ("3", "worse")]
