#!/usr/bin/env bash
# JAX's cumsum of an int8 attention mask makes negative positions after 128 tokens.
#
# Guess: as in NumPy and PyTorch, and as `sum` does in JAX itself, small integers are added up in a wider type.
# Seen (jax 0.10.2): `jnp.cumsum` keeps int8 and uint8 and wraps, `jnp.sum` and `jnp.cumulative_sum` widen to int32; of
# booleans all three widen, so a boolean mask is right (`_cumulative_reduction` in jax/_src/numpy/reductions.py
# promotes booleans only). Positions are made this way, `cumsum(mask) - 1`: after 127 comes -128, and by a uint8 mask token 256
# stands at 0 again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
last = {}
for kind in ("bool", "int8", "uint8", "int32"):
    mask = np.ones(300, kind)
    there = jnp.asarray(mask)
    ways = jnp.cumsum(there)[-1], jnp.cumulative_sum(there)[-1], jnp.sum(there), np.cumsum(mask)[-1]
    last[kind] = tuple(int(n) for n in ways)
    print(f"300 ones of {kind}: cumsum {ways[0]}, cumulative_sum {ways[1]}, sum {ways[2]}, NumPy's cumsum {ways[3]}")
positions = {kind: (jnp.cumsum(jnp.ones(300, kind)) - 1).tolist() for kind in ("int8", "uint8", "bool")}
print("positions of tokens 126 to 129 by an int8 mask:", positions["int8"][126:130])
print("positions of tokens 254 to 257 by a uint8 mask:", positions["uint8"][254:258])
assert last["int8"] == last["uint8"] == (44, 300, 300, 300)
assert last["bool"] == last["int32"] == (300, 300, 300, 300)  # the control
assert positions["bool"] == list(range(300))
assert positions["int8"][126:130] == [126, 127, -128, -127] and positions["uint8"][254:258] == [254, 255, 0, 1]
PYTHON
