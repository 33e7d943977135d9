"""Guesses: kept before a result, never after it, and scored."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.course.predictions import calibration, off_by, predict


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    return tmp_path


def kept(home):
    return json.loads((home / "predictions.json").read_text(encoding="utf-8"))


def test_a_guess_stands_beside_its_result_and_is_kept(home, capsys):
    predict("speed", 50, unit="tokens/s").compare(100.0)
    assert capsys.readouterr().out == (
        "your guess: 50 tokens/s\nyou guessed 50; the result is 100 tokens/s: off by 2x\n"
    )
    assert kept(home)["speed"] | {"at": ""} == {"guess": 50.0, "unit": "tokens/s", "at": "", "result": 100.0}


def test_a_guess_may_change_before_its_result_and_not_after(home, capsys):
    predict("speed", 10)
    predict("speed", 20).compare(40.0)
    late = predict("speed", 40)
    assert late.guess == 20
    late.compare(41.0)  # another run measures anew; the first result counts
    assert (kept(home)["speed"]["guess"], kept(home)["speed"]["result"]) == (20.0, 40.0)


def test_without_a_guess_nothing_is_kept_and_a_later_one_counts(home, capsys):
    predict("speed").compare(40.0)
    assert not (home / "predictions.json").exists()
    assert capsys.readouterr().out.endswith("no guess; the result is 40\n")
    predict("speed", 80).compare(40.0)
    assert kept(home)["speed"]["result"] == 40.0


def test_the_guess_of_an_earlier_session_is_found_again(capsys):
    predict("speed", 80)
    assert predict("speed").guess == 80.0


def test_calibration_counts_guesses_within_a_factor_of_two(capsys):
    calibration()
    assert "no guess has a result yet" in capsys.readouterr().out
    for question, guess, result in (("a", 1, 2.0), ("b", 30, 10.0), ("c", 100, 20.0)):  # off by 2, 3 and 5
        predict(question, guess).compare(result)
    predict("open", 7)
    capsys.readouterr()
    calibration()
    assert capsys.readouterr().out == "1 of your 3 guesses were within a factor of two; the median is off by 3x\n"


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_off_by_is_at_least_one_and_has_no_direction(a, b):
    assert off_by(a, b) == off_by(b, a) >= 1


@pytest.mark.parametrize("guess", [0, -1, float("nan"), float("inf"), "50"])
def test_a_guess_must_be_positive_and_a_refused_one_changes_nothing(home, guess):
    with pytest.raises(ValueError, match="a guess must be a positive number; got"):
        predict("speed", guess)
    assert not (home / "predictions.json").exists()
    with pytest.raises(ValueError, match="a result must be a positive number; got 0"):
        predict("speed", 3).compare(0)
    assert "result" not in kept(home)["speed"]


def test_a_torn_file_is_as_good_as_none(home, capsys):
    (home / "predictions.json").write_text('{"speed": {"gue', encoding="utf-8")
    predict("speed", 5).compare(5.0)
    assert kept(home)["speed"]["result"] == 5.0
