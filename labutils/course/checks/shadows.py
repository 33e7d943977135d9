"""Find the name that an earlier cell has taken from an answer, such as `min = 0` above an answer that calls `min`."""

import ast
import builtins
import sys
from dataclasses import dataclass

from labutils.lab.language import translated


def bound_names(source: str) -> dict[str, bool]:
    r"""The names that a cell binds for the cells after it, and whether an import binds them.

    >>> bound_names("import numpy as np\ndef f(x):\n    y = x\nmin, z = 1, [k for k in (1, 2)]")
    {'np': True, 'f': False, 'min': False, 'z': False}
    """
    try:
        return dict(_bindings(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _bindings(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child.name, False
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.partition(".")[0], True) for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, False
        elif not isinstance(child, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            yield from _bindings(child)


@dataclass(frozen=True)
class Shadow:
    """A name that an answer uses, and the first line of the cell that gave it another meaning."""

    name: str
    cell: str

    def __str__(self) -> str:
        return translated(
            "an earlier cell of yours redefines `{name}` (the one that begins `{cell}`): choose another name there, "
            "restart the kernel and run the cells again",
            name=self.name,
            cell=self.cell,
        )


def find_shadow(exercise: str) -> Shadow | None:
    """The first name used by the answer that another cell has redefined in this kernel; None where there is none.

    A name counts when it is Python's own and a cell binds it, when a cell binds it anew after an import, or when an
    EXERCISE cell binds what the lesson had bound.
    """
    names = vars(sys.modules["__main__"])
    cells = [text for text in names.get("In", []) if isinstance(text, str)]
    own = next((text for text in reversed(cells) if _is_exercise(text, exercise)), "")
    binders: dict[str, list[tuple[str, bool]]] = {}
    for text in cells:
        for name, is_import in bound_names(text).items():
            binders.setdefault(name, []).append((text, is_import))
    own_names = bound_names(own)
    for name in sorted(_used(own) - own_names.keys()):
        *before, (last, is_import) = binders.get(name, [("", True)])
        lost = hasattr(builtins, name) or any(i for _, i in before)
        lost = lost or (_is_exercise(last) and any(not _is_exercise(text) for text, _ in before))
        if lost and not is_import and name in names and names[name] is not getattr(builtins, name, None):
            return Shadow(name, last.strip().splitlines()[0][:60])
    return None


def _is_exercise(source: str, name: str = "") -> bool:
    words = source.split(maxsplit=3)[:3]
    return words[:2] == ["#", "EXERCISE"] and words[2:] and name in ("", words[2])


def _used(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
