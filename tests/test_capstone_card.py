"""The model card: what was done and measured stands on it, and nothing else."""

import re

import pytest

from labutils.applications.scores import Difference
from labutils.capstone.card import Measured, model_card, steps_of
from labutils.capstone.designs import Design
from labutils.measurement.energy import Energy
from labutils.measurement.ledger import host_line
from labutils.measurement.timing import Timing

HEADINGS = ["Made from", "What was done", "Size", "Quality", "Loss by group", "Speed", "Energy", "Limits", "Licence"]


def section(card, name):
    return re.search(rf"^## {name}\n\n(.*?)(?=\n\n## |\Z)", card, re.MULTILINE | re.DOTALL)[1].strip()


def test_card_without_measurements_invents_nothing():
    card = model_card(Design(), Measured())
    assert re.findall("^## (.*)$", card, re.MULTILINE) == HEADINGS
    for name in ("Size", "Quality", "Loss by group", "Speed", "Energy"):
        assert section(card, name) == "not measured"
    assert not re.search(r"\d+ (MB|ms|J)\b", card)


def test_card_says_what_was_measured():
    quality = (
        {"measure": "answer", "value": 0.75, "low": 0.7, "high": 0.8, "items": 40},
        {"measure": "chrF", "value": None},
    )
    groups = {"en": Difference(-0.01, -0.04, 0.02, 40), "zh": Difference(-0.2, -0.3, -0.1, 40)}
    timing = Timing("token", (0.001,) * 5, warmup=2, device="cpu", threads=1)
    spent = Energy(30.0, "RAPL, 1 package, processor alone", 2.0, idle_w=5.0, every_s=1.0)
    measured = Measured(weight_bytes=3_617_792, quality=quality, groups=groups, timing=timing, energy=spent, tokens=100)
    card = model_card(Design(bits=4, calibrated=True), measured)
    assert card.startswith("# LabLM int4 GPTQ\n")
    assert section(card, "Size") == "3.62 MB read for a token"
    assert "| answer | 0.750 | 0.700 to 0.800 | 40 |" in card and "| chrF | not measured |  |" in card
    assert "| zh | -0.200 | -0.300 to -0.100 | 40 |" in card and "Of 2 intervals of 95%, 0.1 miss by chance" in card
    assert section(card, "Speed") == f"{timing}; {host_line()}"
    assert section(card, "Energy").startswith("0.2000 J a token above idle; 20.00 J above idle (30.00 J")


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        (Energy(why="no RAPL counter"), "not measured: no RAPL counter"),
        (Energy(30.0, "RAPL", 2.0), "not measured"),  # without idle power there is no share of this work
        (None, "not measured"),
    ],
)
def test_energy_without_a_counter_or_idle_power_is_not_stated(energy, words):
    assert section(model_card(Design(), Measured(energy=energy, tokens=10)), "Energy") == words


@pytest.mark.parametrize(
    ("design", "words"),
    [
        (Design(), ["nothing: the weights"]),
        (Design(bits=8), ["int8: one scale a row, rounded to nearest"]),
        (
            Design(bits=3, group_size=64, calibrated=True),
            ["int3: one scale for 64 weights, codes chosen by GPTQ", "calibrated on"],
        ),
        (Design(pruned=0.5, bits=4), ["Wanda set 50%", "int4: one scale for 32 weights", "calibrated on"]),
        (Design(draft_tokens=4), ["prompt lookup guesses 4 tokens"]),
    ],
)
def test_steps_are_those_of_the_design_in_order(design, words):
    steps = steps_of(design)
    assert len(steps) == len(words) and all(s.startswith(w) for s, w in zip(steps, words, strict=True))


def test_student_names_its_teacher():
    assert "distilled student" in section(model_card(Design(model="lablm-small"), Measured()), "Made from")
