"""`bench pruning`: the contestants compute what they should, the bytes are theirs, the bars can fail."""

import pytest
import torch

from labutils.course.bench import pruning
from labutils.course.bench.subject import speed_subject
from labutils.course.cli.main import main
from labutils.measurement.timing import Timing

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}


@pytest.fixture(scope="module")
def subject():
    return speed_subject(prompt_tokens=5, **SIZES)


@pytest.fixture(scope="module")
def decoders(subject):
    return pruning.contestants(subject.model, positions=6)


def test_packed_decodes_what_the_stored_zeros_decode(subject, decoders):
    zeros, packed = (
        pruning.decode_step(decoders[name], subject.token_ids)() for name in (pruning.ZEROS, pruning.PACKED)
    )
    assert torch.allclose(zeros, packed, atol=1e-4)
    dense = pruning.decode_step(decoders[pruning.DENSE], subject.token_ids)()
    assert not torch.allclose(zeros, dense, atol=1e-3)


def test_a_step_starts_from_the_same_position_each_time(subject, decoders):
    step = pruning.decode_step(decoders[pruning.HALF], subject.token_ids)
    first = step().clone()
    assert torch.equal(step(), first)


def test_bytes_are_those_of_the_matrices(decoders):
    read = {name: decoder.weight_bytes for name, decoder in decoders.items()}
    head = decoders[pruning.DENSE].head.nbytes
    gains = 5 * 64 * 4
    assert read[pruning.ZEROS] == read[pruning.DENSE]
    assert read[pruning.PACKED] - head - gains == (read[pruning.DENSE] - head - gains) * 34 / 64
    assert read[pruning.DENSE] - read[pruning.HALF] == 2 * 3 * 64 * 64 * 4


def timings(**medians):
    return {name: Timing(name, (s,) * 5, 1, "cpu", 1) for name, s in medians.items()}


@pytest.mark.parametrize(("packed", "half", "hold"), [(0.7, 0.5, [True, True]), (0.9, 0.56, [False, False])])
def test_bars_hold_or_fail(packed, half, hold):
    times = timings(dense=1.0, packed=packed, half=half)
    times = {pruning.DENSE: times["dense"], pruning.PACKED: times["packed"], pruning.HALF: times["half"]}
    found = pruning.bars(times, {pruning.DENSE: 100, pruning.HALF: 50})
    assert [bar.holds for bar in found] == hold
    assert str(found[0]).startswith("holds" if hold[0] else "FAILS")


def test_bench_pruning_has_a_row_for_each(subject):
    rows, bars = pruning.bench_pruning(subject, rounds=5)
    assert [row.technique for row in rows] == [pruning.DENSE, pruning.ZEROS, pruning.PACKED, pruning.HALF]
    assert all(len(row.samples) == 5 and row.tokens_per_s > 0 for row in rows) and len(bars) == 2


def test_command_line(capsys, tmp_path):
    assert main(["bench", "pruning", "--quick", "--rounds", "5", "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert "2:4 packed" in printed and "within 10%" in printed
    assert (tmp_path / "rows.json").stat().st_size > 100
