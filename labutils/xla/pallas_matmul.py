"""An int8 matrix product as a Pallas kernel, for the TPU's matrix unit, and for two interpreters without one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

from jaxtyping import Int8, Int32

from labutils.xla.lazy import Array, Lazy, jax, jnp

pl, pltpu = Lazy("jax.experimental.pallas"), Lazy("jax.experimental.pallas.tpu")
BLOCKS = (128, 128, 128)  # rows, columns, inner: int8 tiles are 32 × 128


def matmul_kernel(x_ref, w_ref, out_ref, sums_ref) -> None:
    """One step of the grid: adds the product of two int8 blocks to 32-bit sums that stay in fast memory (VMEM)."""
    inner_step = pl.program_id(2)

    @pl.when(inner_step == 0)
    def _clear() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)

    @pl.when(inner_step == pl.num_programs(2) - 1)
    def _write() -> None:
        out_ref[...] = sums_ref[...]


def block_specs(blocks: tuple[int, int, int] = BLOCKS) -> tuple:
    """Which block of x (rows, inner), w (inner, columns) and the result step (i, j, k) of the grid works on."""
    rows, columns, inner = blocks
    return (
        pl.BlockSpec((rows, inner), lambda i, j, k: (i, k)),
        pl.BlockSpec((inner, columns), lambda i, j, k: (k, j)),
        pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
    )


def vmem_bytes(blocks: tuple[int, int, int]) -> int:
    """Fast memory that the kernel needs: blocks come and go twice (one in use, one on its way), the sums once.

    bytes = 2 · (rows·inner + inner·columns + 4·rows·columns) + 4·rows·columns

    >>> vmem_bytes((2, 3, 4))
    112
    """
    rows, columns, inner = blocks
    return 2 * (rows * inner + inner * columns + 4 * rows * columns) + 4 * rows * columns


def int8_matmul(
    x: Int8[Array, "rows inner"],
    w: Int8[Array, "inner columns"],
    *,
    blocks: tuple[int, int, int] = BLOCKS,
    kernel: Callable = matmul_kernel,
    specs: Callable[..., tuple] = block_specs,
    parallel: tuple[bool, bool, bool] = (True, True, False),
    interpret=False,
) -> Int32[Array, "rows columns"]:
    """X · w in int32, exact. The grid walks rows, columns and, innermost, the axis that is summed over.

    Args:
        x: Codes, its sizes multiples of the blocks'.
        w: Codes.
        blocks: Rows, columns and inner size of a block.
        kernel: What a step does with its blocks.
        specs: Which blocks a step gets.
        parallel: Whether steps along rows, columns and the inner axis may run on different cores.
        interpret: True for the plain interpreter, `pltpu.InterpretParams()` for the one that simulates a TPU's memory.

    Raises:
        ValueError: If a size is no multiple of its block's.
    """
    sizes = (x.shape[0], w.shape[1], x.shape[1])
    if any(size % block for size, block in zip(sizes, blocks, strict=True)):
        raise ValueError(f"rows, columns, inner must be multiples of the blocks {blocks}; got {sizes}")
    x_spec, w_spec, out_spec = specs(blocks)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(sizes[:2], jnp.int32),
        grid=tuple(size // block for size, block in zip(sizes, blocks, strict=True)),
        in_specs=[x_spec, w_spec],
        out_specs=out_spec,
        scratch_shapes=[pltpu.VMEM(blocks[:2], jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple("parallel" if free else "arbitrary" for free in parallel)
        ),
        interpret=interpret,
    )(x, w)


def races(call: Callable[..., Array], *, cores: int = 2) -> tuple[Array, bool]:
    """Runs `call(interpret=…)` on a simulated TPU of several cores; returns its result, and whether two cores raced.

    The interpreter prints each race, and that is how it is noticed.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = call(interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores))
        jax.block_until_ready(result)
    return result, "RACE DETECTED" in printed.getvalue()
