"""How JAX starts in this process, which programs it compiles, and how to wait for it."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from labutils.xla.lazy import jax

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
COMPILED = "/jax/core/compile/backend_compile_duration"


def has_jax() -> bool:
    """Tells whether JAX and what exporting needs are installed, without importing them."""
    return all(importlib.util.find_spec(name) for name in ("jax", "flatbuffers"))


def start(*, devices: int = 4) -> list:
    """Starts JAX with this many simulated devices on the CPU, one thread each operation, and returns them.

    On an accelerator (a Colab TPU) the real devices are returned. A JAX that runs already with fewer devices is
    started anew: arrays made before stay readable, compiled programs are compiled again. The thread count is fixed by
    the first start in a process. One thread keeps PyTorch and XLA from fighting over the same cores.

    Raises:
        ValueError: If `devices` is below 1.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1; got {devices}")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {ONE_THREAD}".strip()
    try:
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:  # it runs already
            if jax.default_backend() == "cpu" and len(jax.devices()) < devices:
                from jax.extend.backend import clear_backends

                clear_backends()
                jax.config.update("jax_num_cpu_devices", devices)
        return jax.devices()
    finally:
        os.environ["XLA_FLAGS"] = flags
        if not flags:
            del os.environ["XLA_FLAGS"]


@dataclass(frozen=True)
class Compilation:
    """A program that XLA compiled, and how long that took."""

    name: str
    seconds: float


@contextmanager
def compilations(name: str = "") -> Iterator[list[Compilation]]:
    """Lists the programs compiled inside the block whose function's name holds `name`.

    JAX itself announces each compilation; a call that finds its program in the cache announces none.
    """
    seen: list[Compilation] = []

    def listen(event: str, seconds: float, **about: str) -> None:
        if event == COMPILED and name in about.get("fun_name", ""):
            seen.append(Compilation(about.get("fun_name", ""), seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
