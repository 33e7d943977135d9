"""Reading what XLA made: instructions, collectives, the compiler's own cost estimate, and what it leaves out."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\([^=]*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def operations(hlo: str) -> Counter[str]:
    r"""How often each operation stands in a program's text; the body of a loop stands there once.

    >>> operations("ENTRY %main {\n  %a = f32[2]{0} parameter(0)\n  ROOT %b = f32[2]{0} add(%a, %a)\n}")
    Counter({'parameter': 1, 'add': 1})
    """
    return Counter(INSTRUCTION.findall(hlo))


def collectives(hlo: str) -> Counter[str]:
    r"""How often each way in which devices talk to each other stands in the text; a pair start/done counts once.

    >>> collectives("  %s = f32[4]{0} all-reduce(%p), to_apply=%add\n  ROOT %t = f32[4]{0} copy(%s)")
    Counter({'all-reduce': 1})
    """
    names = Counter()
    for name, count in operations(hlo).items():
        if name.removesuffix("-start") in COLLECTIVES:
            names[name.removesuffix("-start")] += count
    return names


def trip_counts(hlo: str) -> list[int]:
    """How often each loop runs, where the compiler knows it.

    >>> trip_counts('while(%t), backend_config={"known_trip_count":{"n":"6"}}')
    [6]
    """
    return [int(n) for n in TRIPS.findall(hlo)]


@dataclass(frozen=True)
class Cost:
    """What the compiler says of a program. An estimate: the body of a loop is counted once, however often it runs."""

    flop: float
    bytes_accessed: float
    instructions: int


def cost_of(compiled: Any) -> Cost:
    """Reads the cost analysis of a compiled function (`jax.jit(f).lower(…).compile()`)."""
    analysis = compiled.cost_analysis()
    count = sum(operations(compiled.as_text()).values())
    return Cost(analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0), count)


def total_flop(one_layer: float, two_layers: float, layers: int) -> float:
    """FLOP of a model of `layers` layers from the counts of two unrolled ones, which no loop hides.

    total = one + (layers − 1) · (two − one): what is outside the layers counts once.

    >>> total_flop(15.0, 25.0, 6)
    65.0
    """
    return one_layer + (layers - 1) * (two_layers - one_layer)


def break_even_tokens(compile_s: float, slow_token_s: float, fast_token_s: float) -> float:
    """How many tokens until compilation has paid for itself; infinite where the compiled code is not faster.

    tokens = compile_s / (slow_token_s − fast_token_s)

    >>> break_even_tokens(3.0, 0.02, 0.01), break_even_tokens(3.0, 0.01, 0.01)
    (300.0, inf)
    """
    saved_s = slow_token_s - fast_token_s
    return compile_s / saved_s if saved_s > 0 else float("inf")
