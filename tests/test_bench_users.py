"""`bench users`: the table by hand, and a whole search with two processes."""

import json
import math
from dataclasses import asdict

import pytest

from labutils.capstone.designs import Design
from labutils.capstone.users import Bracket, Crowd
from labutils.course.bench.users import RUNGS, Replicas, Rung, UsersRow, bench_users, p99, questions, table


def test_p99_is_the_nearest_rank():
    assert p99(Crowd(1, tuple(i / 100 for i in range(1, 101)))) == 0.99
    assert p99(Crowd(1, (0.5,) * 99 + (float("inf"),))) == 0.5
    assert p99(Crowd(1, (0.5,) * 98 + (float("inf"),) * 2)) is None


def test_table_shows_median_span_and_step():
    crowd = Crowd(10, (0.5,))
    rows = [
        UsersRow(rung, (Bracket(n, 2 * n, (crowd,)), Bracket(3 * n, 4 * n, ())))
        for rung, n in zip(RUNGS, (10, 40), strict=False)
    ]
    lines = table([row.to_json() for row in rows]).splitlines()
    assert lines[1].split() == ["float32,", "one", "at", "a", "time", "20", "[10,", "30]"]
    assert lines[2].endswith("80  [40, 120]        4.00  float32, one at a time")
    assert json.loads(json.dumps(rows[0].to_json()))["runs"] == [{"users": 10, "questions": 1, "late": 0, "p99_s": 0.5}]


def test_every_rung_changes_one_thing():
    by_name = {rung.name: rung for rung in RUNGS}
    for rung in RUNGS[1:]:
        base = by_name[rung.against]
        changed = {key for key, value in asdict(rung.design).items() if value != asdict(base.design)[key]}
        changed |= {key for key in ("running", "replicas") if getattr(rung, key) != getattr(base, key)}
        assert len(changed) == 1, (rung.name, changed)


@pytest.mark.slow
def test_two_replicas_answer_all_questions_of_their_users():
    crowds = Replicas(Rung("two", "", Design(model="lablm-small", bits=8), replicas=2))
    try:
        crowd = crowds(601, seed=1)
    finally:
        crowds.close()
    assert len(crowd.latency_s) == 2 * questions().count(301) and all(map(math.isfinite, crowd.latency_s))


@pytest.mark.slow
def test_a_whole_search(capsys):
    (row,) = bench_users(rounds=1, rungs=RUNGS[-2:-1])
    assert row.brackets[0].served > 0 and "LabLM-small" in capsys.readouterr().out
