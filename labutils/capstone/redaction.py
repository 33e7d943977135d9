"""Redaction: values that point to a person leave a text before it is logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable

FORMS = {
    "email": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "card": r"(?:\d{4}[ -]){3}\d{4}|\d{4}[ -]\d{6}[ -]\d{5}|\d{13,19}",
    "tracking": r"TR\d{8}",
    "phone": r"555-\d{4}|(?:\+\d{1,3}[ -]?)?\(?\d{3}\)?[ -]\d{3}[ -]\d{4}|1\d{10}",
    "order_id": r"[A-Z]\d{5}",
}


def passes_luhn(number: str) -> bool:
    """Whether a card number's check digit is right (ISO/IEC 7812-1): every second digit from the right counts double.

    >>> passes_luhn("4111 1111 1111 1111"), passes_luhn("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(c) for c in number if c.isdecimal()][::-1]
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)]
    return bool(digits) and sum(doubled) % 10 == 0


def find_values(text: str, *, names: Collection[str] = ()) -> list[tuple[int, int, str]]:
    """(start, end, kind) of what is to go, in order and without overlap.

    Numbers are known by their form, card numbers by their check digit as well, and names by a list: nothing in the form
    of "Grace" says that it is one.

    >>> find_values("Order A12345 for Anna", names=["Anna"])
    [(6, 12, 'order_id'), (17, 21, 'name')]
    """
    found = []
    for kind, form in _patterns(names):
        for match in re.finditer(form, text):
            taken = any(match.start() < end and start < match.end() for start, end, _ in found)
            if not taken and (kind != "card" or passes_luhn(match[0])):
                found.append((match.start(), match.end(), kind))
    return sorted(found)


def redact(text: str, *, names: Collection[str] = ()) -> str:
    """The text with each value replaced by its kind; what is there already stays, so twice is as once.

    >>> redact("Anna paid order A12345 with 4111 1111 1111 1111.", names=["Anna"])
    '[name] paid order [order_id] with [card].'
    """
    for start, end, kind in reversed(find_values(text, names=names)):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text


class RedactingFormatter(logging.Formatter):
    """Redacts what a handler writes, tracebacks included: `handler.setFormatter(RedactingFormatter(names=names))`.

    A filter would not do: one of a logger does not see the records of the loggers below it, and one that changes a
    record changes it for every handler.
    """

    def __init__(self, form: str | None = None, *, names: Collection[str] = ()) -> None:
        super().__init__(form)
        self.names = tuple(names)

    def format(self, record: logging.LogRecord) -> str:
        """The whole line, redacted."""
        return redact(super().format(record), names=self.names)


def _patterns(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Each kind's form, between characters that do not go on with it; Chinese ones do not count as such."""
    for kind, form in FORMS.items():
        yield kind, rf"(?<![A-Za-z0-9])(?:{form})(?![A-Za-z0-9])"
    if listed := sorted(map(re.escape, names), key=len, reverse=True):
        yield "name", rf"(?<![A-Za-z])(?:{'|'.join(listed)})(?![A-Za-z])"
