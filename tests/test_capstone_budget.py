"""Budgets and the leaderboard: limits by hand, noise refused, files that are believed nothing."""

import json
from argparse import Namespace
from dataclasses import asdict

import pytest

from labutils.applications.scores import paired_difference
from labutils.capstone import budget as budgets
from labutils.capstone.budget import (
    READ_BYTES,
    REFERENCE,
    Budget,
    Examined,
    Judgement,
    TooNoisy,
    examine,
    judge,
    require_quiet,
    service_task,
)
from labutils.capstone.designs import Design
from labutils.capstone.leaderboard import HandIn, HandInError, ranked, read_folder, read_hand_in, table, write_hand_in
from labutils.course.cli import leaderboard
from labutils.quantization.kernels import find_kernels

RIGHT = (1.0,) * 150 + (0.0,) * 10
needs_kernels = pytest.mark.skipif(find_kernels()[0] is None, reason="packed weights need a C compiler")


def judgement(*, speed=4.0, weight_bytes=1_000_000, scores=RIGHT, again=1.0, spread=0.0):
    base = [1.0 + 0.01 * i for i in range(9)]
    design = [(1 + spread * (-1) ** i) * value / speed for i, value in enumerate(base)]
    samples = {"baseline": base, "again": [again * value for value in base], "design": design}
    return Judgement(weight_bytes, 0.9, scores, RIGHT, {name: tuple(each) for name, each in samples.items()})


def test_score_is_the_lower_end_of_the_speed_up_or_nothing():
    assert judgement().score(Budget()) == pytest.approx(4.0) == judgement().speedup.low
    wide = judgement(spread=0.2)
    assert wide.score(Budget()) == wide.speedup.low < wide.speedup.value
    assert judgement(weight_bytes=1_300_001).score(Budget()) == 0
    assert judgement(speed=1.9).score(Budget()) == 0
    assert judgement(scores=(1.0,) * 140 + (0.0,) * 20).score(Budget()) == 0
    assert judgement(scores=(1.0,) * 140 + (0.0,) * 20).score(Budget(margin=0.2)) == pytest.approx(4.0)


def test_each_missed_limit_has_its_sentence():
    assert judgement().misses(Budget()) == []
    all_missed = judgement(speed=1.0, weight_bytes=2_000_000, scores=(0.0,) * 160).misses(Budget())
    assert [sentence.split()[1] for sentence in all_missed] == ["weights", "quality", "answer"]
    unsure = judgement(scores=(1.0,) * 144 + (0.0,) * 16)  # -0.0375 ± 0.0294 does not keep 0.06
    assert "'unsure'" in unsure.misses(Budget())[0]
    assert str(unsure.quality) == str(paired_difference(unsure.scores, RIGHT))


def test_read_bytes_by_hand():
    assert Examined(1000, 0.8, RIGHT, RIGHT).read_bytes == 800


@pytest.mark.parametrize("again", [0.85, 1.05, 1.2])
def test_a_noisy_control_gives_no_verdict(again):
    with pytest.raises(TooNoisy, match="too noisy now: the baseline against itself is .* try again"):
        require_quiet(judgement(again=again))
    require_quiet(judgement())


def test_judge_refuses_noise_and_times_in_turns(monkeypatch):
    served = []
    monkeypatch.setattr(budgets, "_baseline", lambda: (None, RIGHT))
    monkeypatch.setattr(budgets, "_built", lambda design: (None, Examined(10, 1.0, RIGHT, RIGHT)))
    monkeypatch.setattr(budgets, "_serve", lambda decoder, prompt, draft: served.append(draft))
    monkeypatch.setattr(budgets, "NOISE", 1e9)
    monkeypatch.setattr(budgets, "require_quiet", lambda judged: None)
    judged = judge(Design(model="lablm-small", draft_tokens=7), rounds=5)
    assert {name: len(s) for name, s in judged.samples_s.items()} == {"baseline": 5, "again": 5, "design": 5}
    assert served.count(7) == 5 + 2 and served.count(0) == 2 * (5 + 2)  # two warm-up calls each

    def refuse(_):
        raise TooNoisy("x")

    monkeypatch.setattr(budgets, "require_quiet", refuse)
    with pytest.raises(TooNoisy):
        judge(Design(model="lablm-small"), rounds=5)
    with pytest.raises(ValueError, match="at least 5 repeats"):
        judge(Design(model="lablm-small"), rounds=4)


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"weight_bytes": 0}, "weight_bytes must be at least 1"),
        ({"latency_ratio": 0}, "latency_ratio must be above 0"),
        ({"latency_ratio": 1.5}, "latency_ratio must be above 0"),
        ({"margin": 0.01}, "margin must be at least 0.019"),
        ({"margin": 1}, "margin must be at least"),
    ],
)
def test_impossible_budgets_are_refused(change, rule):
    with pytest.raises(ValueError, match=rule):
        Budget(**change)


@pytest.mark.slow
@needs_kernels
def test_the_reference_design_meets_the_budget_and_its_neighbours_do_not():
    found = examine(REFERENCE)
    assert found.misses(Budget()) == [] and found.weight_bytes == 1_260_544
    assert found.read_bytes < READ_BYTES < examine(Design(model="lablm-small", bits=4, calibrated=True)).weight_bytes
    assert len(found.scores) == len(service_task().prompts) == 160
    rounded = examine(Design(model="lablm-small", bits=3))
    assert len(rounded.misses(Budget())) == 2


def hand_in(folder, name="Ada", **change):
    return write_hand_in(folder / f"{name}.json", name, REFERENCE, judgement(**change))


def test_a_hand_in_survives_writing_and_reading(tmp_path):
    written = hand_in(tmp_path)
    assert read_hand_in(tmp_path / "Ada.json") == written


def changed(fields, path, value):
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value


@pytest.mark.parametrize(
    "path, value, rule",
    [
        (["score"], 9.0, "score must follow from the raw samples"),
        (["medians_s", "design"], 0.01, "medians_s must follow from the raw samples"),
        (["samples_s", "design", 4], 0.001, "medians_s must follow"),
        (["samples_s", "design", 0], float("nan"), "samples_s of design must be numbers"),
        (["samples_s", "design", 0], True, "samples_s of design must be numbers"),
        (["samples_s", "design"], [1.0] * 8, "the same rounds"),
        (["samples_s", "extra"], [1.0], "samples_s must hold"),
        (["scores"], [1.0] * 3, "of the 160 requests"),
        (["scores", 0], 2.0, "scores must be numbers from 0 to 1"),
        (["weight_bytes"], "small", "weight_bytes must be numbers"),
        (["design", "bits"], 5, "bits must be 8, 4, 3 or None"),
        (["design", "draft_tokens"], "4", "draft_tokens of a design must be like 0"),
        (["design", "calibrated"], 1, "calibrated of a design"),
        (["design"], {"model": "lablm"}, "a design has the fields"),
        (["name"], "a\nb", "the name must be 1 to 40 printable"),
        (["name"], "x" * 41, "the name must be"),
        (["version"], 2, "has the keys"),
        (["code"], "print(1)", "has the keys"),
    ],
)
def test_what_does_not_follow_is_refused(tmp_path, path, value, rule):
    hand_in(tmp_path)
    fields = json.loads((tmp_path / "Ada.json").read_text())
    changed(fields, path, value)
    (tmp_path / "Ada.json").write_text(json.dumps(fields))
    with pytest.raises(HandInError, match=rule):
        read_hand_in(tmp_path / "Ada.json")


def test_a_noisy_control_is_refused_in_a_file_too(tmp_path):
    hand_in(tmp_path, again=1.2)
    with pytest.raises(HandInError, match="quiet control"):
        read_hand_in(tmp_path / "Ada.json")


@pytest.mark.parametrize("text", ["", "{", "[" * 30_000, "[1]", "x" * 65_000, "\udcff"])
def test_a_file_that_is_no_hand_in_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(HandInError, match="a hand-in"):
        read_hand_in(tmp_path / "x.json")


def test_who_is_not_told_apart_shares_a_rank():
    entries = [
        HandIn(name, "here", REFERENCE, judged)
        for name, judged in {
            "late": judgement(speed=3),
            "first": judgement(speed=5, spread=0.02),
            "tied": judgement(speed=4.75, spread=0.08),
            "large": judgement(speed=9, weight_bytes=9_000_000),
        }.items()
    ]
    first, tied = (each.judgement.speedup for each in entries[1:3])
    assert tied.value < first.low < tied.high  # only the intervals overlap
    places = [(rank, each.name) for rank, each in ranked(entries, Budget())]
    assert places == [(1, "first"), (1, "tied"), (3, "late"), (None, "large")]
    shown = table(entries)
    assert "no rank for large: the weights take 9,000,000 bytes" in shown and "machines" not in shown
    elsewhere = HandIn("other", "elsewhere", REFERENCE, judgement())
    assert "2 machines: their speeds cannot be compared" in table([*entries, elsewhere])


def test_the_command_ranks_a_folder_and_says_what_it_refused(tmp_path, capsys, monkeypatch):
    hand_in(tmp_path, "Ada", speed=5)
    hand_in(tmp_path, "Bo", speed=3)
    (tmp_path / "bad.json").write_text("{")
    args = Namespace(folder=tmp_path, judge=False)
    assert leaderboard.run(args) == 0
    out, error = capsys.readouterr()
    assert leaderboard.run(Namespace(folder=tmp_path / "none", judge=False)) == 2
    assert "needs a folder" in capsys.readouterr().err
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["1", "Ada"], ["2", "Bo"]]
    assert "refused: bad.json: a hand-in is a JSON file" in error
    args.judge = True
    monkeypatch.setattr("labutils.capstone.leaderboard.judge", lambda design, rounds: judgement(speed=2.5))
    assert leaderboard.run(args) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["1", "1"]

    def refuse(design, rounds):
        raise TooNoisy("this machine is too noisy now")

    monkeypatch.setattr("labutils.capstone.leaderboard.judge", refuse)
    assert leaderboard.run(args) == 1 and "too noisy" in capsys.readouterr().err


def test_hand_ins_are_data(tmp_path):
    written = hand_in(tmp_path)
    fields = json.loads((tmp_path / "Ada.json").read_text())
    assert fields["design"] == asdict(REFERENCE) and fields["score"] == written.judgement.score(Budget())
    assert read_folder(tmp_path) == ([written], {})
