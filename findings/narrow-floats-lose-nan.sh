#!/usr/bin/env bash
# NaN does not survive a cast to narrow floats: three libraries' casts turn it into an ordinary number.
#
# Guess: a value that is not a number stays NaN, or the cast refuses it.
# Seen (ml_dtypes 0.6.0, mlx 0.32.4): NaN becomes -0.0 in float4 and float6, which have no NaN, and +448, the largest
# number, in MLX's fp8, although E4M3 has a NaN. A broken weight then looks like a pruned or a huge one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0 mlx==0.32.4 mlx-cpu==0.32.4
"$folder/venv/bin/python" - <<'PYTHON'
import math
from importlib.metadata import version

import ml_dtypes
import mlx.core as mx
import numpy as np

print("ml_dtypes", version("ml_dtypes"), "mlx", version("mlx"))
nan = np.array([np.nan], np.float32)
seen = {}
for name in ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn"):
    seen[name] = float(nan.astype(getattr(ml_dtypes, name)).astype(np.float32)[0])
seen["mlx fp8 (E4M3)"] = mx.from_fp8(mx.to_fp8(mx.array(nan)), dtype=mx.float32).item()
for name, value in seen.items():
    print(f"NaN -> {name:<16} -> {value}")
for name in ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"):
    assert seen[name] == 0 and math.copysign(1, seen[name]) == -1, name
assert math.isnan(seen["float8_e4m3fn"])  # the control: this cast keeps it
assert seen["mlx fp8 (E4M3)"] == 448
PYTHON
