"""The class's leaderboard: hand-ins are data, are checked against their own raw samples, and ties share a rank.

A file can show that its numbers follow from its samples, not that anybody measured them; and the speeds of two machines
cannot be compared. So a teacher lets the table be measured anew on one machine (`judged_here`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from labutils.capstone.budget import ITEMS, Budget, Judgement, TooNoisy, judge, require_quiet
from labutils.capstone.designs import Design
from labutils.lab.data import service
from labutils.lab.paths import written_whole
from labutils.measurement.ledger import host_line
from labutils.measurement.timing import check_repeats

VERSION, MOST_BYTES, MOST_ROUNDS = 1, 64_000, 500
SAMPLES = ("baseline", "again", "design")
KEYS = {"version", "name", "host", "design", *(f.name for f in fields(Judgement)), "medians_s", "score"}


class HandInError(ValueError):
    """A file that is no hand-in; the message is one sentence."""


@dataclass(frozen=True)
class HandIn:
    """One learner's design with its judgement and the machine that it was judged on."""

    name: str
    host: str
    design: Design
    judgement: Judgement

    def to_json(self) -> str:
        """The file's text: what was measured, and the numbers that follow from it."""
        head = {"version": VERSION, "name": self.name, "host": self.host, "design": asdict(self.design)}
        return json.dumps(head | asdict(self.judgement) | _derived(self.judgement), indent=1) + "\n"


def _derived(judgement: Judgement) -> dict:
    medians = {name: statistics.median(judgement.samples_s[name]) for name in SAMPLES}
    return {"medians_s": medians, "score": judgement.score(Budget())}


def write_hand_in(path: Path, name: str, design: Design, judgement: Judgement) -> HandIn:
    """Writes a judged design as a file to hand in.

    Raises:
        HandInError: For a name that a table cannot show.
    """
    hand_in = HandIn(_line(name, "name", 40), host_line()[:200], design, judgement)
    with written_whole(path) as new:
        new.write_text(hand_in.to_json(), encoding="utf-8")
    return hand_in


def read_hand_in(path: Path) -> HandIn:
    """Reads a file and believes none of it: types, ranges, and that every number follows from the raw samples.

    Raises:
        HandInError: With the first rule that is broken.
    """
    if path.stat().st_size > MOST_BYTES:
        raise HandInError(f"a hand-in has at most {MOST_BYTES:,} bytes; got {path.stat().st_size:,}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HandInError(f"a hand-in is a JSON file; got {type(error).__name__}") from error
    if not isinstance(found, dict) or set(found) != KEYS or found["version"] != VERSION:
        raise HandInError(f"a hand-in of version {VERSION} has the keys {', '.join(sorted(KEYS))} and no other")
    judgement = _judgement(found)
    derived = _derived(judgement)
    for key, value in derived.items():
        if found[key] != value:
            raise HandInError(
                f"{key} must follow from the raw samples, which give {value}; got {str(found[key])[:200]}"
            )
    try:
        require_quiet(judgement)
    except TooNoisy as error:
        raise HandInError(f"a hand-in needs a quiet control: {error}") from error
    return HandIn(_line(found["name"], "name", 40), _line(found["host"], "host", 200), _design(found), judgement)


def _line(text: object, what: str, most: int) -> str:
    if not isinstance(text, str) or not text.isprintable() or not 1 <= len(text.strip()) <= len(text) <= most:
        raise HandInError(f"the {what} must be 1 to {most} printable characters; got {str(text)[:most]!r}")
    return text


def _design(found: dict) -> Design:
    given, known = found["design"], asdict(Design())
    if not isinstance(given, dict) or set(given) != set(known):
        raise HandInError(f"a design has the fields {', '.join(known)} and no other")
    for name, default in known.items():
        kinds = (int, type(None)) if name == "bits" else (int, float) if name == "pruned" else (type(default),)
        if type(given[name]) not in kinds:
            raise HandInError(f"{name} of a design must be like {default!r}; got {str(given[name])[:50]!r}")
    try:
        return Design(**given)
    except ValueError as error:
        raise HandInError(str(error)) from error


def _judgement(found: dict) -> Judgement:
    items = ITEMS * len(service.TASKS)
    scores = [_numbers(found[name], name, 0, 1) for name in ("scores", "baseline_scores")]
    if any(len(each) != items for each in scores):
        raise HandInError(f"scores must be of the {items} requests; got {' and '.join(str(len(s)) for s in scores)}")
    samples = found["samples_s"]
    if not isinstance(samples, dict) or set(samples) != set(SAMPLES):
        raise HandInError(f"samples_s must hold {', '.join(SAMPLES)} and nothing else")
    samples = {name: _numbers(samples[name], f"samples_s of {name}", 1e-9, 3600) for name in SAMPLES}
    if len({len(each) for each in samples.values()}) != 1 or len(samples["design"]) > MOST_ROUNDS:
        raise HandInError(f"samples come from the same rounds, at most {MOST_ROUNDS}")
    try:
        check_repeats(len(samples["design"]))
    except ValueError as error:
        raise HandInError(str(error)) from error
    (weight_bytes,) = _numbers([found["weight_bytes"]], "weight_bytes", 1, 1e12)
    (steps_per_token,) = _numbers([found["steps_per_token"]], "steps_per_token", 1e-3, 1)
    return Judgement(int(weight_bytes), steps_per_token, *scores, samples)


def _numbers(values: object, what: str, least: float, most: float) -> tuple[float, ...]:
    is_list = isinstance(values, list)
    if not is_list or not all(type(v) in (int, float) and least <= v <= most for v in values):
        raise HandInError(f"{what} must be numbers from {least} to {most}; got {str(values)[:80]}")
    return tuple(values)


def read_folder(folder: Path) -> tuple[list[HandIn], dict[str, str]]:
    """All hand-ins of a folder, and for each file that is none, by name, why."""
    hand_ins, refused = [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            hand_ins.append(read_hand_in(path))
        except (HandInError, OSError) as error:
            refused[path.name] = str(error)
    return hand_ins, refused


def judged_here(hand_ins: Sequence[HandIn], *, rounds: int = 31) -> list[HandIn]:
    """The same designs, measured anew on this machine.

    Raises:
        TooNoisy: See `judge`.
    """
    host = host_line()[:200]
    return [HandIn(each.name, host, each.design, judge(each.design, rounds=rounds)) for each in hand_ins]


def ranked(hand_ins: Sequence[HandIn], budget: Budget) -> list[tuple[int | None, HandIn]]:
    """Best score first; who is not told apart from the first of a rank shares it, and who misses a limit has none.

    Two designs are not told apart if the intervals of their speed-up overlap.
    """
    ordered = sorted(hand_ins, key=lambda each: (-each.judgement.score(budget), each.name))
    rows: list[tuple[int | None, HandIn]] = []
    rank, lowest = 0, float("inf")
    for place, each in enumerate(ordered, start=1):
        if each.judgement.misses(budget):
            rows.append((None, each))
            continue
        if each.judgement.speedup.high < lowest:
            rank, lowest = place, each.judgement.speedup.low
        rows.append((rank, each))
    return rows


def table(hand_ins: Sequence[HandIn], budget: Budget | None = None) -> str:
    """The leaderboard as text, with a line on each limit that was missed and on machines that differ."""
    budget, notes = budget or Budget(), []
    lines = [f"{'rank':<5}{'name':<24}{'faster':<22}{'bytes':>10}  {'score, paired':<26}design"]
    for rank, each in ranked(hand_ins, budget):
        judged = each.judgement
        numbers = f"{judged.speedup!s:<22}{judged.weight_bytes:>10,}  {judged.quality!s:<26}"
        lines.append(f"{rank or '-':<5}{each.name:<24}{numbers}{each.design}")
        notes += [f"no rank for {each.name}: {reason}" for reason in judged.misses(budget)]
    hosts = {each.host for each in hand_ins}
    if len(hosts) > 1:
        notes.append(
            f"{len(hosts)} machines: their speeds cannot be compared; --judge measures all designs on this one"
        )
    return "\n".join(lines + notes)
