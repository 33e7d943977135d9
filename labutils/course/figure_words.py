"""The words that a module or a chapter writes into figures, found in its source: the messages of their translation."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

KEYWORDS = {"label", "xlabel", "ylabel", "title", "xticklabels", "yticklabels", "technique", "share_of"}
METHODS = {"annotate": 0, "legend": 0, "set_label": 0, "set_title": 0, "set_xlabel": 0, "set_ylabel": 0, "suptitle": 0}
METHODS |= {"set_xticks": 1, "set_yticks": 1, "text": 2}  # the place of the words among the arguments
PASSING = {"enumerate", "zip", "list", "tuple", "join", "items", "fromkeys", "sorted"}  # words go through these
NESTING = (ast.Tuple, ast.List, ast.Dict, ast.Starred, ast.comprehension, ast.GeneratorExp, ast.ListComp, ast.BinOp)


def figure_words(source: str) -> list[str]:
    r"""The messages of a source's figures, an f-string with numbered blanks and "[s]" for a plural that depends.

    >>> figure_words('gain = "more" if a else "less"\nax.set_title(f"{n} bits: {gain}")')
    ['less', 'more', '{0} bits: {1}']
    """
    tree = ast.parse(source)
    bound = _bindings(tree)
    waiting, seen, found = list(_drawn(tree)), set(), set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        found.update(_message(node))
        waiting += _within(node, bound)
    return sorted(message for message in found if re.search(r"[^\W\d_]{2}", re.sub(r"\{\d+\}|\[s\]", "", message)))


def _message(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.startswith("_"):
        yield node.value
    if isinstance(node, ast.JoinedStr):
        count, message = 0, ""
        for part in node.values:
            if isinstance(part, ast.Constant) or _is_plural(part):
                message += part.value if isinstance(part, ast.Constant) else "[s]"
            elif not message.endswith(f"{{{count - 1}}}"):  # two neighbours fill one blank: no text parts them
                message, count = message + f"{{{count}}}", count + 1
        yield message


def _is_plural(part: ast.AST) -> bool:
    return isinstance(part, ast.FormattedValue) and any(
        isinstance(node, ast.Constant) and node.value == "s" for node in ast.walk(part.value)
    )


def _drawn(tree: ast.AST) -> Iterator[ast.expr]:
    """What calls are handed as words to draw."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (word.value for word in node.keywords if word.arg in KEYWORDS)
            if _name(node.func).startswith(
                "draw_"
            ):  # the words of the functions in labutils.lab.plots are their arguments
                yield from [*node.args, *(word.value for word in node.keywords)]
            place = METHODS.get(getattr(node.func, "attr", ""))
            yield from node.args[place : place + 1] if place is not None else []


def _within(node: ast.AST, bound: dict[str, list[ast.AST]]) -> list[ast.AST]:
    """Where the words of an expression may come from."""
    if isinstance(node, ast.JoinedStr):
        return [v.value for v in node.values if isinstance(v, ast.FormattedValue) and not _is_plural(v)]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.Subscript):
        return [node.value]
    if isinstance(node, ast.Name | ast.Attribute):
        return bound[_name(node)]
    if isinstance(node, ast.Call):
        of = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return bound[_name(node.func)] + ([*of, *node.args] if _passes(_name(node.func)) else [])
    return list(ast.iter_child_nodes(node)) if isinstance(node, NESTING) else []


def _passes(name: str) -> bool:
    """Whether words go through a call: some functions', and every constructor's."""
    return name in PASSING or name[:1].isupper()


def _name(node: ast.AST) -> str:
    return getattr(node, "id", "") or getattr(node, "attr", "")


def _bindings(tree: ast.AST) -> dict[str, list[ast.AST]]:
    """What each name may stand for: what is assigned, looped over, returned or handed to a parameter."""
    bound: dict[str, list[ast.AST]] = defaultdict(list)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.For | ast.comprehension):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value if isinstance(node, ast.Assign) else node.iter
            for name in (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)):
                bound[name.id].append(value)
        elif isinstance(node, ast.Call) and _name(node.func) in functions:
            parameters = [argument.arg for argument in functions[_name(node.func)].args.args]
            for parameter, value in zip(parameters, node.args, strict=False):
                bound[parameter].append(value)
    for name, function in functions.items():
        bound[name] += [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
    return bound
