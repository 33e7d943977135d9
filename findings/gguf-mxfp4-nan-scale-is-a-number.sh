#!/usr/bin/env bash
# A NaN among MXFP4's shared exponents is read as a huge number by gguf.
#
# Guess: the exponent code 255, which the MX standard reserves for NaN, makes the block's 32 weights NaN.
# Seen (gguf 0.19.0): it counts as 2^128, so the code for 1 reads as infinity, that for 0.5 as 1.7e38, and that for 0 as 0. A
# reader that follows the standard and one that follows ggml differ, and a check for NaN passes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 gguf==0.19.0 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

print("gguf", version("gguf"))
block = np.array([[255] + [0x10, 0x12] * 8], np.uint8)  # codes 0 and 1 (zero and 0.5), 2 and 1
weights = dequantize(block, GGMLQuantizationType.MXFP4)[0]
print("exponent 255:", weights[[0, 1, 16]].tolist())
standard = np.array([255], np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0]
print("the same byte as E8M0 in ml_dtypes:", standard)
assert np.isnan(standard)  # the control
assert not np.isnan(weights).any() and weights[0] == 0 and weights[16] > 1e38
PYTHON
