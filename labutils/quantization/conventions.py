"""What other libraries store, one row a library and format, as their own code was seen to do it.

conventions.json beside this file is written by tests/formats_of_others.py, which quantizes small rows of numbers with
each library and names the rule that explains what came back. A slow test observes it all again.
"""

import json
from pathlib import Path

COLUMNS = ("scale", "codes", "zero point", "rounding", "groups", "nibbles", "in float", "surprise")
NOT_OBSERVED = "not observed"
HEAD = """# What other libraries store

*Written by `python -m labutils build` from what `tests/formats_of_others.py` observed; a slow test observes it again.
Each row comes from small rows of numbers, quantized by the package at the version named, on a CPU: the rule is the only
one of a list that explains all scales seen, and the rounding is one that explains all ties seen. "not observed" means
that nothing was tried.*

Chapter 03, section 14, explains the words. w is a weight, d a scale, "nibbles" are the two halves of a byte.
"""


def observed() -> dict[str, dict]:
    """What was seen of each library: its version, rows of cells by format, and casts."""
    return json.loads(Path(__file__).with_name("conventions.json").read_text(encoding="utf-8"))


def conventions_table(*columns: str) -> str:
    """The rows as a Markdown table; all columns by default.

    Raises:
        ValueError: for a column that is not in `COLUMNS`.

    >>> print(conventions_table("zero point").splitlines()[0])
    | library | format | zero point |
    """
    columns = columns or COLUMNS
    if unknown := set(columns) - set(COLUMNS):
        raise ValueError(f"columns must be of {', '.join(COLUMNS)}; got {', '.join(sorted(unknown))}")
    seen = observed().items()
    rows = [(f"{library} {found['version']}", *row) for library, found in seen for row in found["rows"].items()]
    cells = [[library, form, *(row.get(c, NOT_OBSERVED) for c in columns)] for library, form, row in rows]
    return _markdown(["library", "format", *columns], cells)


def casts_table() -> str:
    """What becomes of numbers that a narrow type does not hold, as a Markdown table."""
    casts = {
        f"{library} {found['version']}": found["casts"] for library, found in observed().items() if "casts" in found
    }
    numbers = list(dict.fromkeys(number for cells in casts.values() for number in cells))
    rows = [[n, *(cells.get(n, NOT_OBSERVED) for cells in casts.values())] for n in numbers]
    return _markdown(["cast", *casts], rows)


def formats_page() -> str:
    """notebooks/FORMATS.md."""
    values, places = conventions_table(*COLUMNS[:4]), conventions_table(*COLUMNS[4:])
    parts = ("Scales, codes, zero points and rounding", values), ("Groups, bytes and defaults", places)
    return HEAD + "".join(f"\n## {title}\n\n{table}\n" for title, table in (*parts, ("Casts", casts_table())))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
