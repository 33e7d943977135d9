#!/usr/bin/env bash
# Casting floats to ml_dtypes' int4 neither rounds nor saturates.
#
# Guess: like a quantizer's last step, the cast rounds to the nearest code and clamps to -8 ... 7.
# Seen (ml_dtypes 0.6.0): it cuts the fraction off (7.6 -> 7, -0.6 -> 0), keeps the lowest four bits of what does not fit
# (8 -> -8, 100 -> 4), and makes 0 of NaN. Round and clamp first, then cast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np

print("ml_dtypes", version("ml_dtypes"))
values = np.array([7.6, -0.6, 8.0, 100.0, -9.0, np.nan], np.float32)
codes = values.astype(ml_dtypes.int4).astype(np.int32).tolist()
print(values.tolist(), "->", codes)
assert codes == [7, 0, -8, 4, 7, 0]
PYTHON
