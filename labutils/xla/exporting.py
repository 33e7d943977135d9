"""One compiled-for-anywhere artefact: a traced function as bytes, with the platforms that it may run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labutils.xla.lazy import jax

PLATFORMS = ("tpu", "cpu")


def export_bytes(function: Callable, *arguments, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Traces a jitted function for these arguments' shapes and returns it as StableHLO in bytes.

    No device of the platforms is needed: what is exported is the program before compilation. The weights are arguments
    and stay outside.
    """
    from jax import export

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return bytes(export.export(function, platforms=list(platforms))(*shapes).serialize())


def load_exported(artefact: bytes, *, platform: str | None = None) -> Callable:
    """Returns the exported function, to be compiled here at its first call.

    Args:
        artefact: What `export_bytes` returned.
        platform: Where it will run; by default JAX's own backend.

    Raises:
        ValueError: If the artefact was not exported for that platform.
    """
    from jax import export

    exported = export.deserialize(bytearray(artefact))
    platform = platform or jax.default_backend()
    if platform not in exported.platforms:
        raise ValueError(f"this artefact runs on {', '.join(exported.platforms)}; got platform {platform!r}")
    return jax.jit(exported.call)
