#!/usr/bin/env bash
# A block of zeros gets the scale 2^-127 in PyTorch's E8M0, and NaN in ml_dtypes'.
#
# Guess: E8M0 has no 0 and no sign, E4M3 no infinity, and both have a NaN: what does not fit becomes NaN, in either library.
# Seen (torch 2.13.0, ml_dtypes 0.6.0, whose types are JAX's): PyTorch drops the sign and has nothing below 2^-127, so 0
# becomes that and -2 becomes 2 (`fp8e8m0fnu_from_fp32_value`); in ml_dtypes both are NaN, and NaN times the block's zeros is
# NaN. PyTorch's E4M3 makes 448 of infinity (`fp8e4m3fn_from_fp32_value`) where ml_dtypes has NaN; its E5M2 keeps it, its
# E4M3FNUZ makes NaN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
numbers = np.array([0.0, -2.0, 2.0, np.inf], np.float32)
cast = {}
for kind in ("float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
    theirs = torch.from_numpy(numbers).to(getattr(torch, kind)).float().tolist()
    cast[kind] = theirs, numbers.astype(getattr(ml_dtypes, kind)).astype(np.float32).tolist()
    print(f"{kind}: {numbers.tolist()} become {cast[kind][0]} in PyTorch, {cast[kind][1]} in ml_dtypes")
print("a block of zeros, codes times scale:", [0.0 * scales[0] for scales in cast["float8_e8m0fnu"]])
nan = float("nan")
same = np.testing.assert_array_equal
same(cast["float8_e8m0fnu"], ([2.0**-127, 2, 2, nan], [nan, nan, 2, nan]))
same(cast["float8_e4m3fn"], ([0, -2, 2, 448], [0, -2, 2, nan]))
same(cast["float8_e5m2"], ([0, -2, 2, np.inf], [0, -2, 2, np.inf]))  # the control
same(cast["float8_e4m3fnuz"], ([0, -2, 2, nan], [0, -2, 2, nan]))
PYTHON
