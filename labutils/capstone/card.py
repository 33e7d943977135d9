"""A model card of a design, made from what was done and what was measured; what was not measured says so.

The headings follow Mitchell et al. 2019, Model Cards for Model Reporting (arXiv:1810.03993, figure 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from labutils.applications.scores import Difference
from labutils.capstone.designs import Design
from labutils.lab.models.model_card import Row, table
from labutils.measurement.energy import Energy
from labutils.measurement.ledger import host_line
from labutils.measurement.resources import NOT_MEASURED
from labutils.measurement.timing import Timing

SOURCES = {
    "lablm": "LabLM, trained from nothing by this course (data/MODEL_CARD.md)",
    "lablm-small": "LabLM-small, LabLM's distilled student (data/MODEL_CARD.md)",
}
LIMITS = (
    "The texts are made by a grammar: customers of one invented shop, in English and Chinese. Nothing here says how "
    "the model does on other texts, other languages, or real customers.",
    "It answers fluently where it is wrong: another order number passes every check of form.",
    "Intervals cover the choice of requests, not the choice of calibration text or training seed.",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a design; whatever is left out becomes "not measured" on the card.

    Attributes:
        weight_bytes: that one token reads.
        quality: rows with measure, value and perhaps low, high, items (`model_card.table`).
        groups: the difference to the uncompressed model, by group of requests.
        timing: of one token.
        energy: of a run, and how many tokens it made.
        tokens: of that run.
    """

    weight_bytes: int | None = None
    quality: tuple[Row, ...] = ()
    groups: Mapping[str, Difference] = field(default_factory=dict)
    timing: Timing | None = None
    energy: Energy | None = None
    tokens: int = 0


def steps_of(design: Design) -> list[str]:
    """What was done to the weights, in the order in which it is done.

    >>> steps_of(Design(bits=8))
    ['int8: one scale a row, rounded to nearest, the output layer included']
    """
    steps = []
    if design.pruned:
        steps.append(f"Wanda set {design.pruned:.0%} of the weights of each row to zero, the output layer excluded")
    if design.bits:
        scale = "a row" if design.bits == 8 else f"for {design.group_size} weights"
        chosen = "codes chosen by GPTQ" if design.calibrated else "rounded to nearest"
        steps.append(f"int{design.bits}: one scale {scale}, {chosen}, the output layer included")
    if design.pruned or design.calibrated:
        steps.append("calibrated on 16 rows of code and 16 rows of dialogues, 256 tokens each, of the training split")
    if design.draft_tokens:
        steps.append(f"prompt lookup guesses {design.draft_tokens} tokens ahead; the answers stay the same")
    return steps or ["nothing: the weights as they were trained"]


def model_card(design: Design, measured: Measured) -> str:
    """The card as Markdown."""
    size = NOT_MEASURED if measured.weight_bytes is None else f"{measured.weight_bytes / 1e6:.2f} MB read for a token"
    quality = table(list(measured.quality)) if measured.quality else NOT_MEASURED
    sections = {
        "Made from": SOURCES[design.model],
        "What was done": _listed(steps_of(design)),
        "Size": size,
        "Quality": quality,
        "Loss by group": _by_group(measured.groups),
        "Speed": NOT_MEASURED if measured.timing is None else f"{measured.timing}; {host_line()}",
        "Energy": _energy(measured),
        "Limits": _listed(LIMITS),
        "Licence": "MIT, as the course and its models",
    }
    return "\n\n".join([f"# {design}", *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def _listed(items) -> str:
    return "\n".join(f"* {item}" for item in items)


def _by_group(groups: Mapping[str, Difference]) -> str:
    if not groups:
        return NOT_MEASURED
    rows = [
        f"| {name} | {gap.mean:+.3f} | {gap.low:+.3f} to {gap.high:+.3f} | {gap.items} |"
        for name, gap in groups.items()
    ]
    note = f"\n\nOf {len(groups)} intervals of 95%, {0.05 * len(groups):.1f} miss by chance."
    head = "| group | difference | 95% interval | items |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + note


def _energy(measured: Measured) -> str:
    spent = measured.energy
    if spent is None or spent.above_idle_joules is None or not measured.tokens:
        return NOT_MEASURED if spent is None or not spent.why else str(spent)
    return f"{spent.above_idle_joules / measured.tokens:.4f} J a token above idle; {spent}"
