"""The XLA benchmark on a tiny model: rows, tokens, notes; never a speed."""

from argparse import ArgumentParser

import pytest
from jax_here import devices  # noqa: F401
from tiny_models import random_ids, tiny_model

from labutils.course.bench import xla
from labutils.course.bench.subject import Subject
from labutils.course.cli import bench


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", tiny_model("llama-gqa-tied"), None, random_ids(6), bits_per_byte=2.5)


@pytest.fixture(scope="module")
def rows(subject, devices):  # noqa: F811
    return xla.bench_xla(subject, new_tokens=6, rounds=5, compiled=False, say=lambda line: None)


def test_every_way_makes_the_tokens_of_eager_torch(rows):
    assert [row.technique for row in rows] == [xla.EAGER, xla.JIT, xla.SCAN]
    assert {row.agreement for row in rows} == {1.0} and {row.quality for row in rows} == {2.5}
    assert all(len(row.samples) == 5 and row.threads == 1 for row in rows)
    assert rows[0].note == "" and all(row.note.startswith("compiled in ") for row in rows[1:])


def test_paid_by_hand():
    assert xla._paid(2.0, 0.6, 0.2, 10) == "compiled in 2.0 s, pays for itself after 50 tokens"
    assert xla._paid(2.0, 0.2, 0.2, 10) == "compiled in 2.0 s, never pays for itself"


def test_a_way_that_fails_becomes_a_row_that_says_why(subject, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(xla, "generate_compiled", broken)
    rows = xla.bench_xla(subject, new_tokens=2, rounds=5, say=lambda line: None)
    assert rows[1].technique == xla.COMPILED and rows[1].note == "RuntimeError: no C++ compiler"
    assert rows[1].samples == () and rows[2].samples


def test_other_tokens_have_no_quality(subject, monkeypatch):
    real = xla.contestants

    def changed(*arguments, **settings):
        ways = real(*arguments, **settings)
        return ways | {xla.SCAN: lambda: [-1, *ways[xla.SCAN]()[1:]]}

    monkeypatch.setattr(xla, "contestants", changed)
    row = xla.bench_xla(subject, new_tokens=4, rounds=5, compiled=False, say=lambda line: None)[-1]
    assert row.agreement == 0.75 and row.quality is None


def test_bench_command_prints_the_table(monkeypatch, capsys, subject, rows, tmp_path):
    monkeypatch.setattr("labutils.course.bench.xla.bench_xla", lambda subject, **settings: rows)
    monkeypatch.setattr("labutils.course.bench.subject.trained_subject", lambda name: subject)
    parser = ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["xla", "--no-speed-model", "--json", str(tmp_path / "rows.json")])) == 0
    out = capsys.readouterr().out
    assert "scanned loop" in out and "1.00x [1.00, 1.00]" in out and (tmp_path / "rows.json").is_file()


def test_bench_command_without_jax_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("labutils.xla.runtime.has_jax", lambda: False)
    parser = ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["xla"])) == 1
    assert "JAX is needed here and is not installed" in capsys.readouterr().out
