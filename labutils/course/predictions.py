"""A learner's guesses: stored before the measurement, shown beside its result, and scored at a chapter's end."""

import contextlib
import datetime
import json
import math
import statistics
from dataclasses import dataclass

from labutils.lab.language import marked, translated
from labutils.lab.paths import learner_dir, written_whole

NEAR = 2.0  # a guess within this factor of the result counts as near


@dataclass(frozen=True)
class Prediction:
    """A question and the learner's guess; None where nobody guessed."""

    question: str
    unit: str
    guess: float | None

    def compare(self, measured: float) -> None:
        """Prints guess and result side by side; the first result after a guess is kept for `calibration`.

        Raises:
            ValueError: If the result is not a positive number.
        """
        _require_positive("a result", measured)
        found = f"{measured:.3g} {self.unit}".strip()
        if self.guess is None:
            print(translated("no guess; the result is {found}", found=found))
            return
        state = _load()
        state.setdefault(self.question, {"guess": self.guess}).setdefault("result", float(measured))
        _store(state)
        words = {"said": f"{self.guess:.3g}", "found": found, "factor": f"{off_by(self.guess, measured):.2g}"}
        print(translated("you guessed {said}; the result is {found}: off by {factor}x", **words))


def predict(question: str, guess: float | None = None, *, unit: str = "") -> Prediction:
    """Stores a guess and returns it for the cell that measures. Once its result is known, the old guess stays.

    Raises:
        ValueError: If the guess is not a positive number.
    """
    state = _load()
    entry = state.get(question, {})
    if guess is None and not entry:
        print(translated("write your guess in place of None, and run this cell again"))
        return Prediction(question, unit, None)
    if guess is not None:
        _require_positive("a guess", guess)
        if "result" not in entry:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            state[question] = entry = {"guess": float(guess), "unit": unit, "at": now}
            _store(state)
    print(translated("your guess: {guess}", guess=f"{entry['guess']:.3g} {unit}".strip()))
    return Prediction(question, unit, entry["guess"])


def calibration() -> None:
    """Prints how near the guesses were that have a result: how many within a factor of two, and the median factor."""
    factors = [off_by(entry["guess"], entry["result"]) for entry in _load().values() if "result" in entry]
    if not factors:
        print(translated("no guess has a result yet: write one into a cell that says `predict`, then run what follows"))
        return
    near, middle = sum(factor <= NEAR for factor in factors), f"{statistics.median(factors):.2g}"
    said = marked("{near} of your {count} guesses were within a factor of two; the median is off by {middle}x")
    print(translated(said, near=near, count=len(factors), middle=middle))


def off_by(guess: float, result: float) -> float:
    """The factor, at least 1, between a guess and a result, both positive.

    >>> off_by(50.0, 100.0), off_by(100.0, 50.0)
    (2.0, 2.0)
    """
    return max(guess / result, result / guess)


def _require_positive(what: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{what} must be a positive number; got {value!r}")


def _load() -> dict[str, dict]:
    try:
        state = json.loads((learner_dir() / "predictions.json").read_text(encoding="utf-8"))
        return {question: entry for question, entry in state.items() if entry["guess"] > 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _store(state: dict[str, dict]) -> None:
    """A folder that cannot be written stops nobody."""
    with contextlib.suppress(OSError), written_whole(learner_dir() / "predictions.json") as new:
        new.write_text(json.dumps(state, indent=1, ensure_ascii=False, sort_keys=True), encoding="utf-8")
