"""Keep the names of one answer from another: after each check, the kernel is again as the course left it.

Runs inside a hand-in's own process (see `labutils.course.guard`). Before an EXERCISE cell it takes note of
the notebook's names, of Python's and torch's settings, and of every function and class of every module. After the
CHECK cell it puts all of that back, then runs the course's own answer, so that what follows sees the course's
names. Objects that an answer changes inside (a list, a model's weights) stay changed.
"""

import contextlib
import functools
import io
import os
import random
import re
import sys
import warnings
from collections.abc import Callable

from labutils.course.checks.shadows import bound_names
from labutils.course.exercises import marker

IPYTHONS_OWN = re.compile(r"In|Out|_{1,3}|_i{1,3}|_ih|_oh|_dh|_i?\d+")


class Isolation:
    """Restores a kernel after each exercise.

    Args:
        names: The notebook's namespace.
        answers: The course's EXERCISE cells by name. Blank ones, as in a hand-out kit, cannot be run; there the
            learner's own version of the names that the cell is to define lives on.
        is_solution: Whether the answers are solutions.
    """

    def __init__(self, names: dict, answers: dict[str, str], is_solution: bool):
        self._names, self._answers, self._is_solution = names, answers, is_solution
        self._restore: list[Callable[[], None]] = []

    def before_cell(self, source: str) -> None:
        """Take note of everything before an EXERCISE cell."""
        if _kind(source) == "EXERCISE":
            self._restore = [_names_of(self._names), _functions(), *_settings()]

    def after_cell(self, source: str) -> None:
        """Put everything back after a CHECK cell."""
        if _kind(source) != "CHECK":
            return
        answer = self._answers.get(marker(_cell(source))[1], "")
        bound = [*bound_names(source), *([] if self._is_solution else bound_names(answer))]
        kept = {name: self._names[name] for name in bound if name in self._names}  # the CHECK cell's own: `ch00`
        for restore in self._restore:
            with contextlib.suppress(Exception):
                restore()
        self._restore = []
        self._names.update(kept)
        self._forget()
        if self._is_solution:
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(answer, "<the course's answer>", "exec"), self._names)

    def _forget(self) -> None:
        """Take the answer out of IPython's list of cells: a later check must not find a name redefined there."""
        cells = self._names.get("In", [])
        for index in [index for index, text in enumerate(cells) if _kind(text) == "EXERCISE"]:
            cells[index] = ""


def _cell(source: str) -> dict:
    return {"cell_type": "code", "source": source}


def _kind(source: str) -> str:
    return (marker(_cell(source)) or ("",))[0]


def _names_of(names: dict) -> Callable[[], None]:
    before = {name: value for name, value in names.items() if not IPYTHONS_OWN.fullmatch(str(name))}

    def restore() -> None:
        for name in [n for n in names if n not in before and not IPYTHONS_OWN.fullmatch(str(n))]:
            del names[name]
        names.update(before)

    return restore


def _functions() -> Callable[[], None]:
    """Functions and classes that stand in modules: an answer may have put another in place, or added a builtin."""
    torch = sys.modules.get("torch")
    closed = [sys.modules["builtins"], *([torch.Tensor, torch.nn.Module] if torch else [])]  # nothing is added to these
    holders = [holder for holder in [*sys.modules.values(), *closed] if hasattr(holder, "__dict__")]
    before = [(holder, {k: v for k, v in vars(holder).items() if callable(v)}) for holder in holders]
    modules, closed_names = dict(sys.modules), [(holder, set(vars(holder))) for holder in closed]

    def restore() -> None:
        sys.modules.update(modules)
        for holder, functions in before:
            now = vars(holder)
            for name in [name for name, value in functions.items() if now.get(name) is not value]:
                setattr(holder, name, functions[name])
        for holder, names in closed_names:
            for name in vars(holder).keys() - names:
                delattr(holder, name)

    return restore


def _settings() -> list[Callable[[], None]]:
    """What changes how other code runs: random numbers, torch's and NumPy's defaults, folders, warnings."""
    pairs = [(os.chdir, os.getcwd()), (sys.setrecursionlimit, sys.getrecursionlimit())]
    pairs += [(random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy"):
        pairs += [(numpy.random.set_state, numpy.random.get_state()), (lambda now: numpy.seterr(**now), numpy.geterr())]
    if torch := sys.modules.get("torch"):
        pairs += [
            (torch.set_default_dtype, torch.get_default_dtype()),
            (_set_device, torch.get_default_device()),
            (torch.set_grad_enabled, torch.is_grad_enabled()),
            (torch.set_num_threads, torch.get_num_threads()),
            (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
            (torch.set_rng_state, torch.get_rng_state()),
        ]
    return [*(functools.partial(setter, value) for setter, value in pairs), _lists()]


def _lists() -> Callable[[], None]:
    environ, path, filters = dict(os.environ), list(sys.path), list(warnings.filters)

    def restore() -> None:
        for key in os.environ.keys() - environ.keys():
            del os.environ[key]
        os.environ.update(environ)
        sys.path[:] = path
        warnings.simplefilter("default")  # makes the module look at its filters again
        warnings.filters[:] = filters

    return restore


def _set_device(device) -> None:
    import torch

    torch.set_default_device(None if device.type == "cpu" else device)  # None is free, "cpu" slows every call
