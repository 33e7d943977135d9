"""The decode benchmark on tiny models: rows, ticks, shares, JSON; never a speed."""

import json
import sys
from argparse import ArgumentParser

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.course.bench import decode
from labutils.course.bench.decode import Clock, Settings, Technique, agreement, as_record, bench_decode
from labutils.course.bench.subject import Subject, speed_subject
from labutils.course.bench.table import Row, as_table, write_json
from labutils.course.cli import bench
from labutils.measurement import ledger

QUICK = Settings(new_tokens=4, rounds=5, threads=1, compile=False)


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", tiny_model("llama-gqa-tied"), None, random_ids(6), bits_per_byte=2.5)


@pytest.fixture(scope="module")
def rows(subject):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "sets_numpy_threads", lambda: True)
        said = []
        rows = bench_decode(subject, QUICK, say=said.append)
        assert "between the matrices" in said[-1] and "where a token's time goes in plain fp32" in said[-1]
        return rows


def test_every_path_makes_the_tokens_of_transformers(rows):
    assert [row.technique for row in rows] == [
        "no cache",
        "growing KV cache",
        "static KV cache",
        "left-padded batch",
        "plain fp32, numpy matvec",
        "plain fp32, torch matvec",
        "transformers.generate",
    ]
    assert {row.agreement for row in rows} == {1.0}
    assert {row.quality for row in rows} == {2.5}
    assert all(len(row.samples) == 5 and row.threads == 1 and row.time_to_first_token_s > 0 for row in rows)


def test_a_technique_that_fails_becomes_a_row_that_says_why():
    def broken(clock):
        raise RuntimeError("no C++ compiler\nmore")

    proved = decode._proved(Technique("x", broken), lambda line: None)
    assert proved.missing == "RuntimeError: no C++ compiler"


def fill(ticks, *, batch=1, weight_bytes=100e6, peaks=(1e9,) * 5, bytes_per_weight=4.0, same=True):
    class Heavy:
        model, bits_per_byte = tiny_model("llama-gqa-tied"), 2.0

    Heavy.weight_bytes = weight_bytes
    tokens = torch.zeros(batch, 3, dtype=torch.long)
    reference = torch.zeros(1, 3, dtype=torch.long) if same else torch.ones(1, 3)
    row = Row(technique="x", model="m", threads=1, batch=batch)
    technique = Technique("x", batch=batch, bytes_per_weight=bytes_per_weight)
    return decode._filled(row, technique, ticks, tokens, reference, peaks, Heavy)


def test_ticks_become_speeds_by_hand():
    ticks = [[10.0, 12.0, 12.5, 13.0]] * 5  # prefill 2 s, then two tokens in 1 s
    row = fill(ticks)
    assert row.samples == (2.0,) * 5
    assert row.time_to_first_token_s == 2.0
    cached = 3 * 2 * 3 * 2 * 8 * 4  # positions, K and V, layers, KV heads, head size, bytes
    assert row.bytes_per_token == 100e6 + cached
    assert row.bandwidth_share == pytest.approx(2.0 * (100e6 + cached) / 1e9)
    assert fill(ticks, batch=2).samples == (4.0,) * 5
    assert fill(ticks, batch=2).bytes_per_token == 50e6 + cached
    assert fill(ticks, bytes_per_weight=1.0).bytes_per_token == 25e6 + cached


def test_shares_that_mean_nothing_are_left_out_with_a_reason():
    ticks = [[0.0, 1.0, 1.5, 2.0]] * 5
    assert fill(ticks, peaks=None).bandwidth_share is None
    assert "fit into the cache" in fill(ticks, peaks=None).note
    assert fill(ticks, peaks=(1e8,) * 5).bandwidth_share is None
    assert "probe error" in fill(ticks, peaks=(1e8,) * 5).note


def test_a_share_compares_within_a_round():
    rounds = [[0.0, 1.0, 1.0 + t, 1.0 + 2 * t] for t in (1.0, 0.5, 0.5, 2.0, 1.0)]  # 1, 2, 2, 0.5, 1 tokens/s
    moved = fill(rounds).bytes_per_token
    share = fill(rounds, peaks=[2 * moved, 2.5 * moved, 2.5 * moved, 0.4 * moved, 2 * moved]).bandwidth_share
    assert share == pytest.approx(0.8)  # 0.5, 0.8, 0.8, 1.25, 0.5 in its round: the fourth is a disturbed probe


def test_quality_is_claimed_only_for_exact_tokens_of_exact_weights():
    ticks = [[0.0, 1.0, 1.5, 2.0]] * 5
    assert fill(ticks).quality == 2.0
    assert fill(ticks, same=False).quality is None
    assert fill(ticks, bytes_per_weight=1.0).quality is None


def test_a_thread_count_that_cannot_be_set_is_not_stated(subject, monkeypatch):
    monkeypatch.setattr(decode, "sets_numpy_threads", lambda: False)
    (numpy,) = [t for t in decode.our_techniques(subject, QUICK) if "numpy" in t.name]
    assert numpy.run is None and "pip install threadpoolctl" in numpy.missing


def test_clock_ticks_at_each_token_of_ours_and_of_transformers(subject, monkeypatch):
    monkeypatch.setattr(decode, "sets_numpy_threads", lambda: True)
    for technique in decode.our_techniques(subject, QUICK):
        clock = Clock()
        tokens = technique.run(clock)
        assert len(clock.ticks) == 5
        assert clock.ticks == sorted(clock.ticks)
        assert tokens.shape == (technique.batch, 6 + 5)


def test_agreement_by_hand():
    assert agreement(torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]]), torch.tensor([[1, 2, 3, 4]])) == 0.75
    with pytest.raises(ValueError, match="got 2 and 3"):
        agreement(torch.zeros(1, 2), torch.zeros(1, 3))


def test_table_and_json_hold_every_row(rows, tmp_path):
    text = as_table(rows, reference=decode.REFERENCE)
    assert len(text.splitlines()) == len(rows) + 1
    assert "1.00x [1.00, 1.00]" in next(line for line in text.splitlines() if line.startswith(decode.REFERENCE))
    write_json(rows, tmp_path / "rows.json")
    objects = json.loads((tmp_path / "rows.json").read_text())
    wanted = {"technique", "model", "threads", "tokens_per_s", "samples", "bandwidth_share", "quality", "host"}
    assert len(objects) == len(rows) and all(wanted <= o.keys() for o in objects)
    assert objects[0]["tokens_per_s"] == sorted(objects[0]["samples"])[2]
    with pytest.raises(ValueError, match="reference technique 'abacus'"):
        as_table(rows, reference="abacus")


def test_rows_with_quality_become_drawable_records(rows, subject):
    record = as_record(rows[0], subject, QUICK)
    assert record.drawable and record.tokens_per_s == rows[0].tokens_per_s


def test_best_threads_are_measured_where_none_are_given(monkeypatch):
    monkeypatch.setattr(decode, "available_cores", lambda: 2)
    said = []
    calls = Technique("x", lambda clock: None)
    assert decode._best_threads(calls, said.append) in (1, 2)
    assert "x: " in said[0] and "1:" in said[0] and "2:" in said[0]


def test_speed_subject_says_that_its_weights_are_random():
    small = speed_subject(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=64, num_attention_heads=2
    )
    assert small.name.endswith("B Llama, random weights")
    assert small.bits_per_byte is None and small.tokenizer is None


def test_bench_command_prints_tables_writes_json_and_appends_to_the_ledger(
    monkeypatch, tmp_path, capsys, subject, rows
):
    monkeypatch.setattr("labutils.course.bench.decode.bench_decode", lambda subject, settings, say: rows)
    monkeypatch.setattr("labutils.course.bench.subject.trained_subject", lambda name: subject)
    monkeypatch.setattr("labutils.course.bench.subject.speed_subject", lambda **sizes: subject)
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    parser = ArgumentParser()
    bench.add_arguments(parser)
    path = tmp_path / "rows.json"
    options = [
        "decode",
        "--quick",
        "--no-compile",
        "--no-speed-model",
        "--threads",
        "1",
        "--ledger",
        "--json",
        str(path),
    ]
    assert bench.run(parser.parse_args(options)) == 0
    out = capsys.readouterr().out
    assert ledger.host_line() in out and "no cache" in out and "5 interleaved rounds" in out
    measured = [o for o in json.loads(path.read_text()) if o["quality"] is not None]
    assert [r.technique for r in ledger.read()] == [o["technique"] for o in measured]


def test_bench_bad_input_states_the_rule(subject):
    with pytest.raises(ValueError, match="new_tokens must be at least 2; got 1"):
        bench_decode(subject, Settings(new_tokens=1))
    with pytest.raises(ValueError, match="at least 5 repeats; got 3"):
        bench_decode(
            subject, Settings(new_tokens=2, rounds=3, threads=1, compile=False, peers=False), say=lambda line: None
        )


def test_command_modules_import_only_the_standard_library_at_their_top():
    import ast
    from pathlib import Path

    for node in ast.parse(Path(bench.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in sys.stdlib_module_names
