"""Draws the rooms of `labutils`, and who imports whom, into CONTRIBUTING.md: `python tests/house_map.py`."""

import re
from pathlib import Path

from test_architecture import FLOORS, MODULES, floor_of, imported_rooms, room

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"(?<=<!-- map -->\n).*(?=<!-- /map -->)", re.DOTALL)
FLOOR_NAMES = ("tools of all topics", "topics", "models, texts, and all topics together", "teaching", "command line")


def imports() -> dict[str, set[str]]:
    """For each room the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        if floor_of(room(path)) is not None:
            found.setdefault(room(path), set()).update(set(imported_rooms(path)) - {room(path)})
    return found


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the edges that a longer way implies: who imports a and b, where b imports a, is drawn to b alone.

    >>> reduced({"c": {"a", "b"}, "b": {"a"}, "a": set()})
    {'c': {'b'}, 'b': {'a'}, 'a': set()}
    """

    def below(name: str) -> set[str]:
        return edges[name].union(*map(below, edges[name])) if edges[name] else set()

    return {name: {to for to in ways if not any(to in below(other) for other in ways)} for name, ways in edges.items()}


def mermaid() -> str:
    """The graph, floor by floor, the highest first."""
    lines = ["```mermaid", "graph TD"]
    for level in reversed(range(len(FLOORS))):
        inside = "; ".join(sorted(FLOORS[level]))
        lines.append(f'  subgraph floor{level}["{FLOOR_NAMES[level]}"]\n    {inside}\n  end')
    ways = reduced(imports())
    lines += [f"  {name} --> {to}" for name in sorted(ways) for to in sorted(ways[name])]
    return "\n".join([*lines, "```"]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: mermaid(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
