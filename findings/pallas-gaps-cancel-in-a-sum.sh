#!/usr/bin/env bash
# A ragged block of integers looks right in one of Pallas' interpreters.
#
# Guess: what a block holds beyond the array's end spoils a sum, so that a test in the interpreter shows a missing mask.
# Seen (jax 0.10.2): of int32, `interpret=True` fills the gap with -2^31, and two of these cancel: the sum is right. The simulated
# TPU memory (`InterpretParams`) fills with 2^31 - 1, and the sum is wrong by 2. Floats get NaN in both. Test in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

print("jax", jax.__version__)


def total(x_ref, out_ref):
    out_ref[...] = x_ref[...].sum(axis=0, keepdims=True)


def sums(dtype, interpret):
    """1 + 2 + 3 + 4, and 5 + 6 in a block of four rows."""
    specs = [pl.BlockSpec((rows, 1), lambda i: (i, 0)) for rows in (4, 1)]
    settings = {"grid": (2,), "in_specs": specs[:1], "out_specs": specs[1], "interpret": interpret}
    call = pl.pallas_call(total, out_shape=jax.ShapeDtypeStruct((2, 1), dtype), **settings)
    return call(jnp.arange(1, 7, dtype=dtype)[:, None]).ravel().tolist()


for name, interpret in (("interpret=True", True), ("InterpretParams()", pltpu.InterpretParams())):
    print(name, {d.__name__: sums(d, interpret) for d in (jnp.int32, jnp.float32)})
assert sums(jnp.int32, True) == [10, 11]
assert sums(jnp.int32, pltpu.InterpretParams()) == [10, 9]
assert all(sums(jnp.float32, way)[1] != 11 for way in (True, pltpu.InterpretParams()))
PYTHON
