"""Checks of chapter 07, second half: the matrix unit, the Pallas kernel, its memory, and weights over a mesh."""

from functools import partial
from math import ceil

import numpy as np

from labutils.course.checks import cases_of, exercise, expect_equal, expect_function
from labutils.xla import pallas_matmul, sharding, systolic
from labutils.xla.lazy import jnp
from labutils.xla.pallas_matmul import pl, pltpu


def _utilisation(rows, inner, columns, size, *, up=ceil, load=1, drain=2, operations=1):
    tiles = up(inner / size) * up(columns / size)
    cycles = tiles * (load * size + rows + drain * size - (2 if drain else 0))
    return operations * rows * inner * columns / (size**2 * cycles)


@exercise("7.7")
def mxu_utilisation(answer):
    """Asked-for multiplications over cells times cycles."""
    expect_function(
        answer,
        systolic.mxu_utilisation,
        cases=cases_of("rows inner columns size", (1, 256, 256, 128), (100, 300, 20, 8), (64, 130, 257, 128)),
        mistakes=[
            (partial(_utilisation, up=lambda tiles: tiles), "there are no half tiles: round their number up"),
            (partial(_utilisation, load=0), "the time to load a tile is missing: size cycles before the first row"),
            (
                partial(_utilisation, drain=0),
                "the last row has to leave the array: 2·size − 2 cycles more for each tile",
            ),
            (partial(_utilisation, operations=2), "a cell's multiply-and-add counts as one here: cells, not FLOP"),
            (lambda **case: 1 / _utilisation(**case), "upside down: the share is work asked for over work possible"),
            (
                lambda rows, inner, columns, size: _utilisation(rows, inner, columns, size) * size,
                "the array has size × size cells: divide by size²",
            ),
        ],
    )


def _indices(x=("i", "k"), w=("k", "j"), out=("i", "j")):
    def block_indices(i, j, k):
        at = {"i": i, "j": j, "k": k}
        return tuple(tuple(at[name] for name in names) for names in (x, w, out))

    return block_indices


@exercise("7.8")
def block_indices(answer):
    """X at (i, k), w at (k, j), the result at (i, j)."""
    expect_function(
        answer,
        _indices(),
        cases=[{"i": 1, "j": 2, "k": 3}, {"i": 0, "j": 4, "k": 1}],
        mistakes=[
            (_indices(x=("k", "i")), "x is (rows, inner): its block is (i, k)"),
            (_indices(x=("i", "j")), "x has no columns of the result: along its second axis the sum runs, k"),
            (_indices(w=("j", "k")), "w is (inner, columns), not transposed: its block is (k, j)"),
            (_indices(w=("i", "j")), "w has no rows of the result: along its first axis the sum runs, k"),
            (_indices(out=("j", "i")), "the result is (rows, columns): its block is (i, j)"),
            (_indices(out=("i", "k")), "k is summed over: every k adds to the same block of the result, (i, j)"),
        ],
    )


def _kernel(*, clear=0, write=-1, add=True, wide=True):
    """The kernel with one thing gone wrong; `clear` and `write` are steps, None for never, "all" for each."""

    def kernel(x_ref, w_ref, out_ref, sums_ref):
        k, last = pl.program_id(2), pl.num_programs(2) - 1
        if clear is not None:

            @pl.when(k == clear if clear != "all" else k >= 0)
            def _clear():
                sums_ref[...] = jnp.zeros_like(sums_ref)

        product = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32 if wide else jnp.int8)
        sums_ref[...] = sums_ref[...] + product if add else product.astype(jnp.int32)
        if write is not None:

            @pl.when(k == (last if write == -1 else write))
            def _write():
                out_ref[...] = sums_ref[...]

    return kernel


def _run(kernel, x, w):
    """The product by this kernel, on a simulated TPU memory whose first content is anything but zero."""
    try:
        product = pallas_matmul.int8_matmul(
            jnp.asarray(x), jnp.asarray(w), blocks=(32, 128, 128), kernel=kernel, interpret=pltpu.InterpretParams()
        )
        return np.asarray(product)
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # an exception inside a kernel would leave it half done


@exercise("7.9")
def matmul_kernel(answer):
    """Exact in 32 bits, over several blocks of the sum."""
    numbers = np.random.default_rng(0)
    x, w = (numbers.integers(-128, 128, size).astype(np.int8) for size in ((64, 384), (384, 128)))
    wrong = [
        ({"wide": False}, "int8 sums overflow at 127: jnp.dot(…, preferred_element_type=jnp.int32)"),
        ({"clear": None}, "the sums begin with what was in memory: set them to zero in the first step along k"),
        ({"clear": "all"}, "only the last block is left: clear in the first step along k, not in each"),
        ({"add": False}, "only the last block is left: add to the sums, do not replace them"),
        ({"write": 0}, "the result was written after the first block: write in the last step along k"),
        ({"write": None}, "nothing was written: in the last step, out_ref[...] = sums_ref[...]"),
    ]
    expect_function(
        partial(_run, answer),
        lambda x, w: (x.astype(np.int64) @ w.astype(np.int64)).astype(np.int32),
        cases=[{"x": x, "w": w}],
        mistakes=[(partial(_run, _kernel(**settings)), hint) for settings, hint in wrong],
    )


def _memory(rows, columns, inner, *, blocks=2, out_bytes=4, in_bytes=1, sums=1):
    inputs = in_bytes * (rows * inner + inner * columns)
    return blocks * (inputs + out_bytes * rows * columns) + sums * 4 * rows * columns


@exercise("7.10")
def vmem_bytes(answer):
    """Blocks twice, sums once."""
    expect_function(
        answer,
        lambda rows, columns, inner: pallas_matmul.vmem_bytes((rows, columns, inner)),
        cases=cases_of("rows columns inner", (128, 256, 512), (2048, 2048, 1024)),
        mistakes=[
            (partial(_memory, blocks=1), "while one block is worked on the next is on its way: blocks count twice"),
            (partial(_memory, sums=2), "the sums stay where they are: they count once"),
            (partial(_memory, sums=0), "the sums need room too: 4 bytes for each number of the result's block"),
            (partial(_memory, out_bytes=1), "the result is int32: 4 bytes a number"),
            (partial(_memory, in_bytes=4), "x and w are int8: 1 byte a number"),
        ],
    )


@exercise("7.11")
def cuts(answer):
    """Megatron's: two all-reduces a layer."""
    right, every = sharding.MEGATRON, dict.fromkeys(sharding.MEGATRON)
    turned = {name: {"out": "in", "in": "out"}[cut] for name, cut in right.items()}
    expect_equal(
        answer,
        right,
        given="which axis of each matrix (out_features, in_features) is cut: 'out' or 'in'",
        mistakes=[
            (
                dict.fromkeys(every, "out"),
                "o and down read what is cut already: cut along their inputs, they need no gather",
            ),
            (dict.fromkeys(every, "in"), "q, k, v, gate, up read the whole hidden state: cut them along their outputs"),
            (turned, "turned round: first along the outputs (each device makes its own heads), then along the inputs"),
            (every, "nothing is cut: every device would hold and compute everything"),
            (right | {"o": "out"}, "o reads heads that lie on different devices: cut it along its inputs, like down"),
            (
                right | {"down": "out"},
                "down reads neurons that lie on different devices: cut it along its inputs, like o",
            ),
        ],
    )
