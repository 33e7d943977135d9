#!/usr/bin/env bash
# MLX's affine quantization has negative scales, and moves the far end of a group's range.
#
# Guess: scale = (max - min) / 15 > 0 and bias = min, so that both ends of a group are exact in 4 bits.
# Seen (mlx 0.32.4): the end with the larger magnitude becomes the bias; here that is the maximum, so the scale is negative.
# The scale is then changed until zero is exact, which costs the other end: -1 comes back as -1.09.
# A reader that assumes scale > 0, or that min is stored, decodes other weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 mlx==0.32.4 mlx-cpu==0.32.4
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
weight = mx.array(np.linspace(-1, 3, 64, dtype=np.float32)[None])
codes, scales, biases = mx.quantize(weight, group_size=64, bits=4)
back = np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=4))[0]
print("scale", scales.item(), "bias", biases.item(), "ends", back[0], back[-1])
assert scales.item() < 0 and biases.item() == 3 and back[-1] == 3
assert abs(back[0] + 1.0909) < 1e-3 and 0.0 in back
PYTHON
