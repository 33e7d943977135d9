"""Text that appears as it is made, with live tokens/s: in the terminal, or in a notebook widget."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable
from typing import TextIO

import ipywidgets as widgets

from labutils.generation.stream import StreamedToken, StreamTimes
from labutils.lab.language import marked, translated


def speed_line(tokens: list[StreamedToken]) -> str:
    """Returns the live line: tokens so far, time to first token, and tokens/s from then on (median gap).

    >>> speed_line([StreamedToken(1, "a", 0.5), StreamedToken(2, "b", 0.1)])
    '2 tokens: the first after 0.500 s, then 10.0 tokens/s'
    """
    times = StreamTimes.of(tokens)
    if times.tokens_per_s is None:
        return translated("1 token: the first after {first:.3f} s", first=times.time_to_first_token_s)
    said = marked("{count} tokens: the first after {first:.3f} s, then {speed:.1f} tokens/s")
    return translated(said, count=len(tokens), first=times.time_to_first_token_s, speed=times.tokens_per_s)


def print_stream(tokens: Iterable[StreamedToken], *, file: TextIO | None = None) -> StreamTimes:
    """Prints text as it arrives and the speed at the end; on a terminal the window's title shows it live.

    Raises:
        ValueError: If the stream is empty.
    """
    file = file or sys.stdout
    seen: list[StreamedToken] = []
    for token in tokens:
        seen.append(token)
        title = f"\033]0;{speed_line(seen)}\007" if file.isatty() else ""
        file.write(title + token.text)
        file.flush()
    times = StreamTimes.of(seen)
    file.write(f"\n[{speed_line(seen)}]\n")
    return times


def stream_widget() -> widgets.VBox:
    """Returns an empty text box with a speed line; hand it to `show_stream`."""
    return widgets.VBox([widgets.HTML("<pre></pre>"), widgets.Label(translated("no token yet"))])


def show_stream(tokens: Iterable[StreamedToken], box: widgets.VBox) -> StreamTimes:
    """Fills the box token by token and returns the times; `print_stream` is the plain alternative.

    Raises:
        ValueError: If the stream is empty.
    """
    text, speed = box.children
    seen: list[StreamedToken] = []
    for token in tokens:
        seen.append(token)
        written = html.escape("".join(t.text for t in seen))
        text.value = f'<pre style="white-space: pre-wrap">{written}</pre>'
        speed.value = speed_line(seen)
    return StreamTimes.of(seen)
