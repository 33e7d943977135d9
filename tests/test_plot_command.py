"""`plot` draws a ledger, and says in one sentence why it cannot."""

import pytest

from labutils.course.cli.main import main
from labutils.measurement.ledger import Record, append


@pytest.fixture(autouse=True)
def _inside(monkeypatch, tmp_path):
    monkeypatch.setattr("labutils.course.cli.environment.enter", lambda *args, **kwargs: None)
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path / "learner"))
    monkeypatch.chdir(tmp_path)


def record(technique, speed, **changes):
    values = {"model": "lablm", "device": "cpu", "dtype": "float32", "threads": 1, "prompt_tokens": 4}
    values |= {"output_tokens": 8, "samples": [speed] * 5, "bits_per_byte": 1.5} | changes
    return Record(technique=technique, **values)


def test_plot_draws_a_ledger_and_prints_the_table(tmp_path, capsys):
    ledger = tmp_path / "results.jsonl"
    append(record("slow", 10.0), ledger)
    append(record("fast", 40.0, bits_per_byte=1.6), ledger)
    append(record("other", 99.0, model="another"), ledger)
    assert main(["plot", "--ledger", str(ledger), "--model", "lablm", "--output", "plot.png"]) == 0
    printed = capsys.readouterr().out
    assert "fast" in printed and "slow" in printed and "other" not in printed and "2 records" in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_takes_a_tasks_score(tmp_path, capsys):
    append(record("own", 10.0, task="intent", task_score=0.9))
    assert main(["plot", "--task", "intent"]) == 0
    assert "0.9" in capsys.readouterr().out


def test_plot_says_that_there_is_nothing_to_draw(tmp_path, capsys):
    assert main(["plot"]) == 1
    assert "needs at least one record" in capsys.readouterr().out
    assert not (tmp_path / "speed_quality.png").exists()
