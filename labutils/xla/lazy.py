"""JAX, imported at its first use: `labutils` stands without it, and the modules here read like other JAX code."""

import importlib
from typing import Any

INSTALL = 'JAX is needed here and is not installed: pip install "jax>=0.9" flatbuffers'
Array = Any  # a jax.Array, or what stands for one while JAX traces: Float[Array, "rows columns"]


class Lazy:
    """Stands for a module until somebody asks for one of its names.

    >>> Lazy("math").sqrt(9.0)
    3.0
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # doctest and copy ask for such: no reason to import anything
            raise AttributeError(attribute)
        try:
            return getattr(importlib.import_module(self._name), attribute)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(INSTALL, name=error.name) from error


jax, jnp, lax = Lazy("jax"), Lazy("jax.numpy"), Lazy("jax.lax")
