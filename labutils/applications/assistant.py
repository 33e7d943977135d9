"""Tools that an assistant may call: their grammar, a strict reading of calls, and a desk that carries them out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from labutils.decoding.grammar import choice, literal


@dataclass(frozen=True)
class Tool:
    """A function that may be called: its name, and a regular expression for each argument, in order."""

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A call that was read: always of a known tool, with each of its arguments in its form."""

    tool: str
    arguments: Mapping[str, str]

    def json(self) -> str:
        """The one way to write it.

        >>> Call("track", {"order_id": "A12345"}).json()
        '{"tool": "track", "order_id": "A12345"}'
        """
        return json.dumps({"tool": self.tool, **self.arguments}, ensure_ascii=False)


def call_pattern(tools: Sequence[Tool], values: Mapping[str, Sequence[str]]) -> str:
    r"""The pattern of a JSON call of any tool whose arguments all have a value, in the language of `automaton.py`.

    Args:
        tools: What may be called.
        values: The values each argument may take here: those that the user has said.

    >>> call_pattern([Tool("stop", {"id": "[0-9]"}), Tool("help")], {"id": ["1", "2"]})
    '(\\{"tool": "stop", "id": ("1"|"2")\\}|\\{"tool": "help"\\})'

    Raises:
        ValueError: If no tool can be called with these values.
    """
    calls = []
    for tool in tools:
        if all(values.get(name) for name in tool.arguments):
            parts = [literal(f'"tool": {json.dumps(tool.name)}')]
            parts += [
                literal(f"{json.dumps(name)}: ")
                + choice([json.dumps(value, ensure_ascii=False) for value in values[name]])
                for name in tool.arguments
            ]
            calls.append(r"\{" + ", ".join(parts) + r"\}")
    if not calls:
        raise ValueError(f"some tool must be callable with the values of {sorted(values)}; got none")
    return "(" + "|".join(calls) + ")"


def read_call(text: str, tools: Sequence[Tool]) -> Call | None:
    """The call that a text is; None if it is anything else, or anything more.

    The name must be a tool's, the arguments exactly its own, and every value must match its whole form.

    >>> read_call('{"tool": "stop", "id": "7"}', [Tool("stop", {"id": "[0-9]"})])
    Call(tool='stop', arguments={'id': '7'})
    >>> read_call('{"tool": "stop", "id": "7", "all": "yes"}', [Tool("stop", {"id": "[0-9]"})]) is None
    True
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    tool = next((tool for tool in tools if tool.name == fields.get("tool")), None)
    if tool is None or list(fields) != ["tool", *tool.arguments]:
        return None
    values = {name: fields[name] for name in tool.arguments}
    fits = all(isinstance(v, str) and re.fullmatch(tool.arguments[name], v) for name, v in values.items())
    return Call(tool.name, values) if fits else None


class Desk:
    """Carries out calls for one customer and keeps a log; what is not this customer's is refused.

    Args:
        tools: What may be called.
        owned: For each argument that names a thing, the things that are this customer's.
        results: From a call to what the tool says; by default that it is done.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        owned: Mapping[str, frozenset[str]],
        results: Callable[[Call], str] = lambda call: "done",
    ) -> None:
        self.tools, self.owned, self.results = tools, owned, results
        self.log: list[Call] = []

    def carry_out(self, text: str) -> str:
        """What the tool says, or why it was not called."""
        call = read_call(text, self.tools)
        if call is None:
            return "refused: no call of a known tool"
        for name, value in call.arguments.items():
            if name in self.owned and value not in self.owned[name]:
                return f"refused: {name} {value} is not this customer's"
        self.log.append(call)
        return self.results(call)
