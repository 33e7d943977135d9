"""Live progress of `dispatch`, node by node: bars in a notebook, or one line of text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

import ipywidgets as widgets

from labutils.distributed.settings import Report


def progress_line(report: Report, total: int) -> str:
    """Returns where a run stands, in one line.

    >>> progress_line(Report(answers=3, errors=2, retries=1), 10)
    '5 of 10 answered, 2 with an error, 1 retries, 0 nodes lost'
    """
    shares = "".join(f"; {node} {count}" for node, count in sorted(report.per_node.items()))
    done = f"{report.answers + report.errors} of {total} answered, {report.errors} with an error"
    return f"{done}, {report.retries} retries, {report.lost_nodes} nodes lost{shares}"


def print_progress(total: int, *, steps: int = 4, file: TextIO | None = None) -> Callable[[Report], None]:
    """Returns a callback for `dispatch(on_progress=…)` that prints a line `steps` times on the way."""
    file, printed = file or sys.stdout, [0]

    def show(report: Report) -> None:
        done = (report.answers + report.errors) * steps // max(total, 1)
        if done > printed[0]:
            printed[0] = done
            print(progress_line(report, total), file=file)

    return show


def dispatch_widget(total: int) -> widgets.VBox:
    """Returns an empty box with a line of text; hand it to `show_progress`."""
    return widgets.VBox([widgets.Label(f"0 of {total} answered")])


def show_progress(total: int, box: widgets.VBox) -> Callable[[Report], None]:
    """Returns a callback that keeps a bar per node and the line; `print_progress` is the plain alternative."""
    bars: dict[str, widgets.IntProgress] = {}

    def show(report: Report) -> None:
        for node, count in sorted(report.per_node.items()):
            if node not in bars:
                bars[node] = widgets.IntProgress(min=0, max=total, description=node)
                box.children = (box.children[0], *(bars[name] for name in sorted(bars)))
            bars[node].value = count
        box.children[0].value = progress_line(report, total)

    return show
