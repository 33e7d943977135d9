#!/usr/bin/env bash
# XLA on a CPU reads denormal numbers as zero, and shows them all the same.
#
# Guess: IEEE 754 holds as in NumPy: 1e-40 + 1e-40 is 2e-40, and what prints as 1e-40 is not equal to 0.
# Seen (jax 0.10.2): inside a compiled function 1e-40 == 0 is true and the sum is 0, while the array still prints 1e-40. A guard
# `where(x == 0, 1, x)` differs from NumPy's, and so does a division by a tiny scale.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
x = np.float32(1e-40)
there = jnp.asarray(x)
twice, is_zero = jax.jit(lambda v: (v + v, v == 0))(there)
print(f"the number {float(there)}; XLA: twice {float(twice)}, equal to 0 {bool(is_zero)}; NumPy: {x + x}, {x == 0}")
assert float(there) > 0 and float(twice) == 0 and bool(is_zero)
assert x + x > 0 and x != 0  # the control
PYTHON
