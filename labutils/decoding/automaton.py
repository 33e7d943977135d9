r"""A small language of patterns, and the byte automaton of each.

Built by derivatives (Brzozowski 1964): the derivative of an expression by a byte is what may still come after that
byte, so expressions are the automaton's states, and equal expressions are one state.

The language, a part of what `re` and llguidance understand: characters stand for themselves, `\` before a character
that means something else, `.` for any character but a line end, `[a-z_]` and `[^"]` (ASCII inside), `(…)`, `|`, `?`,
`*` and `+`. Characters are matched as the bytes of their UTF-8: tokens may end inside one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Well-formed UTF-8 of more than one byte (Unicode 15, table 3-7): a range for each byte.
TAIL = (0x80, 0xBF)
MULTIBYTE = (
    ((0xC2, 0xDF), TAIL),
    ((0xE0, 0xE0), (0xA0, 0xBF), TAIL),
    ((0xE1, 0xEC), TAIL, TAIL),
    ((0xED, 0xED), (0x80, 0x9F), TAIL),
    ((0xEE, 0xEF), TAIL, TAIL),
    ((0xF0, 0xF0), (0x90, 0xBF), TAIL, TAIL),
    ((0xF1, 0xF3), TAIL, TAIL, TAIL),
    ((0xF4, 0xF4), (0x80, 0x8F), TAIL, TAIL),
)


@dataclass(frozen=True)
class Bytes:
    """One byte out of a set."""

    values: frozenset[int]


@dataclass(frozen=True)
class Sequence:
    """One part after the other; without parts, the empty text."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Either:
    """One of the options; without options, nothing at all matches."""

    options: frozenset[Expression]


@dataclass(frozen=True)
class Many:
    """The body any number of times, perhaps never."""

    body: Expression


Expression = Bytes | Sequence | Either | Many
EMPTY, NOTHING = Sequence(()), Either(frozenset())


def sequence(parts: Iterable[Expression]) -> Expression:
    """The parts one after the other, in the one form that equal sequences share."""
    flat: list[Expression] = []
    for part in parts:
        flat += part.parts if isinstance(part, Sequence) else [part]
    if NOTHING in flat:
        return NOTHING
    return flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def either(options: Iterable[Expression]) -> Expression:
    """One of the options, in the one form that equal choices share."""
    flat: set[Expression] = set()
    for option in options:
        flat |= option.options if isinstance(option, Either) else {option}
    return flat.pop() if len(flat) == 1 else Either(frozenset(flat))


def matches_empty(e: Expression) -> bool:
    """Whether the text may end here."""
    match e:
        case Bytes():
            return False
        case Sequence(parts):
            return all(map(matches_empty, parts))
        case Either(options):
            return any(map(matches_empty, options))
        case Many():
            return True


def first_bytes(e: Expression) -> frozenset[int]:
    """The bytes that the text may go on with."""
    match e:
        case Bytes(values):
            return values
        case Sequence(parts):
            head = next((i for i, part in enumerate(parts) if not matches_empty(part)), len(parts))
            return frozenset().union(*map(first_bytes, parts[: head + 1]))
        case Either(options):
            return frozenset().union(*map(first_bytes, options))
        case Many(body):
            return first_bytes(body)


def derivative(e: Expression, byte: int) -> Expression:
    """What may still come after a byte.

    >>> derivative(parse("order|other"), ord("o")) == either([parse("rder"), parse("ther")])
    True
    """
    match e:
        case Bytes(values):
            return EMPTY if byte in values else NOTHING
        case Sequence(()):
            return NOTHING
        case Sequence((first, *rest)):
            after = sequence([derivative(first, byte), *rest])
            return either([after, derivative(sequence(rest), byte)]) if matches_empty(first) else after
        case Either(options):
            return either(derivative(option, byte) for option in options)
        case Many(body):
            return sequence([derivative(body, byte), e])


@dataclass(frozen=True)
class Automaton:
    """States and where each byte leads; state 0 is the start and the last one is dead: nothing leads out of it."""

    next_state: Int[Tensor, "states 256"]
    accepting: Bool[Tensor, " states"]

    @property
    def dead(self) -> int:
        """The state of texts that no continuation can save."""
        return len(self.next_state) - 1

    def walk(self, data: bytes, state: int = 0) -> int:
        """The state after some bytes."""
        for byte in data:
            state = int(self.next_state[state, byte])
        return state


def compile_pattern(pattern: str) -> Automaton:
    """The automaton of a pattern: all derivatives of its expression, numbered as they are met.

    >>> automaton = compile_pattern("ab|ac")
    >>> automaton.walk(b"ab"), automaton.accepting.tolist()
    (2, [False, False, True, False])

    Raises:
        ValueError: For a pattern outside the language, or one that nothing matches.
    """
    start = parse(pattern)
    number, rows = {start: 0}, []
    for state in (queue := [start]):
        row = {}
        for byte in first_bytes(state):
            after = derivative(state, byte)
            if after not in number:
                number[after] = len(queue)
                queue.append(after)
            row[byte] = number[after]
        rows.append(row)
    dead = len(queue)
    next_state = torch.full((dead + 1, 256), dead)
    for state, row in enumerate(rows):
        next_state[state, list(row)] = torch.tensor(list(row.values()), dtype=torch.long)
    return Automaton(next_state, torch.tensor([*map(matches_empty, queue), False]))


def parse(pattern: str) -> Expression:
    """The expression of a pattern.

    >>> parse("a?") == either([EMPTY, parse("a")])
    True

    Raises:
        ValueError: For a pattern outside the language.
    """
    expression, rest = _parse_either(pattern)
    if rest:
        raise ValueError(f"every ) needs a ( before it; got {pattern!r}")
    return expression


def _parse_either(text: str) -> tuple[Expression, str]:
    """Reads options up to a closing bracket or the end; returns what is left."""
    options, parts = [], []
    while text and text[0] != ")":
        if text[0] == "|":
            options.append(sequence(parts))
            parts, text = [], text[1:]
            continue
        part, text = _parse_one(text)
        for sign in re.match(r"[?*+]?", text)[0]:
            repeated = {"?": either([EMPTY, part]), "*": Many(part), "+": sequence([part, Many(part)])}
            part, text = repeated[sign], text[1:]
        parts.append(part)
    return either([*options, sequence(parts)]), text


def _parse_one(text: str) -> tuple[Expression, str]:
    char = text[0]
    if char == "(":
        inside, rest = _parse_either(text[1:])
        if not rest:
            raise ValueError(f"every ( needs a ) behind it; got {text!r}")
        return inside, rest[1:]
    if char == "[":
        return _parse_class(text)
    if char == ".":
        return _one_of(set(range(128)) - {ord("\n")}, multibyte=True), text[1:]
    if char in "?*+{}^$":
        raise ValueError(f"? * + need something before them, and {{ }} ^ $ a backslash; got {text!r}")
    if char == "\\":
        return _parse_escape(text)
    return sequence(Bytes(frozenset({byte})) for byte in char.encode()), text[1:]


def _parse_escape(text: str) -> tuple[Expression, str]:
    if len(text) < 2 or text[1].isalnum() or not text[1].isascii():
        raise ValueError(f"a backslash stands before a sign, such as \\. or \\{{; got {text[:2]!r}")
    return Bytes(frozenset({ord(text[1])})), text[2:]


def _parse_class(text: str) -> tuple[Expression, str]:
    found = re.match(r"\[(\^?)((?:\\[^\w\s]|[^\]\\])+)\]", text, re.ASCII)
    if not found or not found[2].isascii():
        raise ValueError(f"a class is ASCII between [ and ]; got {text!r}")
    chosen: set[int] = set()
    for low, high in re.findall(r"(\\.|[^\\])(?:-(\\.|[^\\]))?", found[2], re.DOTALL):
        chosen |= set(range(ord(low[-1]), ord((high or low)[-1]) + 1))
    if found[1]:
        return _one_of(set(range(128)) - chosen, multibyte=True), text[found.end() :]
    return _one_of(chosen, multibyte=False), text[found.end() :]


def _one_of(ascii_bytes: set[int], *, multibyte: bool) -> Expression:
    """One character: one of some ASCII ones or, perhaps, any longer one."""
    longer = (sequence(Bytes(frozenset(range(a, b + 1))) for a, b in ranges) for ranges in MULTIBYTE)
    return either([Bytes(frozenset(ascii_bytes)), *(longer if multibyte else ())])
