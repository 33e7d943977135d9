"""Figures of chapter 11: who was computed when, and who holds which block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labutils.lab.plots.style import PALETTE

COLOURS = {"free": "white", "cached": PALETTE[5], "owned": PALETTE[4], "shared": PALETTE[3]}


@dataclass(frozen=True)
class StepTimes:
    """When a step of an engine began and ended, in seconds, and how many tokens of which request it computed."""

    begin_s: float
    end_s: float
    tokens: Mapping[int, int]


def slots_of(steps: Sequence[StepTimes]) -> dict[int, int]:
    """The slot of each request: the lowest one that was free when it was first computed.

    >>> slots_of([StepTimes(0, 1, {7: 3, 8: 1}), StepTimes(1, 2, {8: 1}), StepTimes(2, 3, {8: 1, 9: 4})])
    {7: 0, 8: 1, 9: 0}
    """
    last = {request: index for index, step in enumerate(steps) for request in step.tokens}
    slots: dict[int, int] = {}
    for index, step in enumerate(steps):
        for request in step.tokens:
            if request not in slots:
                busy = {slot for other, slot in slots.items() if last[other] >= index}
                slots[request] = next(slot for slot in range(len(busy) + 1) if slot not in busy)
    return slots


def draw_timeline(axes, steps: Sequence[StepTimes]) -> None:
    """Draws a row for each slot and a bar for each request's part of a step; hatched where several tokens were read."""
    slots = slots_of(steps)
    for step in steps:
        for request, tokens in step.tokens.items():
            axes.barh(
                slots[request],
                step.end_s - step.begin_s,
                left=step.begin_s,
                color=PALETTE[request % (len(PALETTE) - 1)],
                hatch="///" if tokens > 1 else "",
                edgecolor="black" if tokens > 1 else "none",
                linewidth=0.3,
            )
    for request, slot in slots.items():
        begin = next(step.begin_s for step in steps if request in step.tokens)
        label = axes.text(begin, slot, str(request), va="center", fontsize=8)
        label.set_bbox({"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "pad": 0.1})
    axes.set(xlabel="time (s)", ylabel="slot", yticks=range(max(slots.values(), default=0) + 1))
    axes.invert_yaxis()


def block_states(references: Sequence[int], cached: Sequence[int]) -> list[str]:
    """What each block is: free, cached, owned by one table, or shared by several, with their number.

    >>> block_states([0, 1, 2, 0], [3])
    ['free', 'owned', 'shared 2', 'cached']
    """
    kept = set(cached)
    names = {0: "free", 1: "owned"}
    return ["cached" if b in kept else names.get(n, f"shared {n}") for b, n in enumerate(references)]


def draw_blocks(axes, states: Sequence[str], *, columns: int = 16) -> None:
    """Draws every block as a square in its state's colour; digits say how many tables share one."""
    for block, state in enumerate(states):
        row, column = divmod(block, columns)
        kind, _, holders = state.partition(" ")
        axes.barh(row, 0.9, left=column, height=0.9, color=COLOURS[kind], edgecolor="black", linewidth=0.6)
        axes.text(column + 0.45, row, {"cached": "c"}.get(kind, holders), ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.1, columns), xticks=[], yticks=[], aspect="equal")
    axes.invert_yaxis()
    handles = [axes.barh(0, 0, color=colour, edgecolor="black") for colour in COLOURS.values()]
    axes.legend(handles, COLOURS, ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0))
