#!/usr/bin/env bash
# The mean of a thousand ones is 0.256 in NumPy when they are bfloat16.
#
# Guess: as for float16, whose mean NumPy takes in float32; or as for a dot product of the same array, which is right.
# Seen (numpy 2.4.6, ml_dtypes 0.6.0): `sum`, `mean`, `std`, `cumsum` and `trace` add in the array's own type. With 8 bits of
# precision 256 + 1 is 256, so the sum stands still there; in float8 it stops at 16 or 8, and int4 wraps to -8, while int8 is
# widened. NumPy's `_mean` knows float16 by name and no other narrow type. `astype(float32)` first, or `dtype=` in the call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np

print("numpy", version("numpy"), "ml_dtypes", version("ml_dtypes"))
seen = {}
for kind in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int4"):
    ones = np.ones(1000, getattr(ml_dtypes, kind, kind))
    seen[kind] = [float(ones.sum()), float(ones.mean()), float(ones.mean(dtype=np.float32))]
    print(f"1000 ones in {kind}: sum {seen[kind][0]}, mean {seen[kind][1]:.4f}, mean with dtype=float32 {seen[kind][2]}")
ones = np.ones(1000, ml_dtypes.bfloat16)
print("bfloat16: ones @ ones", ones @ ones, "std", ones.std())
assert seen["float16"] == [1000, 1, 1] and seen["int8"] == [1000, 1, 1]  # the control
assert seen["bfloat16"] == [256, 0.255859375, 1] and ones @ ones == 1000 and ones.std() > 0.5
assert seen["float8_e4m3fn"] == [16, 0.015625, 1] and seen["float8_e5m2"] == [8, 0.0078125, 1]
assert seen["int4"] == [-8, 0, 1]
PYTHON
