"""Names that folders of this package had before 2026-11-30, so that a learner's older notebooks still run."""

import importlib
import importlib.abc
import importlib.machinery
import sys

LAB = ("models", "data", "layers", "training", "plots", "widgets", "paths", "language", "hosts")
MOVED = {name: f"lab.{name}" for name in LAB} | {name: f"course.{name}" for name in ("checks", "bench", "cli")}


def today(name: str) -> str | None:
    """The present name of a module, if it had another one.

    >>> today("labutils.models.load"), today("labutils.quantization"), today("torch.cli")
    ('labutils.lab.models.load', None, None)
    """
    package, _, rest = name.partition(".")
    folder, dot, below = rest.partition(".")
    return f"labutils.{MOVED[folder]}{dot}{below}" if package == "labutils" and folder in MOVED else None


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module itself under its former name: one object, one state."""

    def find_spec(self, name, path=None, target=None):  # noqa: D102 (importlib's)
        return importlib.machinery.ModuleSpec(name, self) if today(name) else None

    def create_module(self, spec):  # noqa: D102
        module = importlib.import_module(today(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):  # noqa: D102
        module.__spec__ = module.__spec__.loader_state  # its own: the import system has just put the former name's here


def keep_old_names() -> None:
    """From now on former names import, too."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldNames())  # before a former folder that only holds a __pycache__ now
