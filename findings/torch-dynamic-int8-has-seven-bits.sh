#!/usr/bin/env bash
# PyTorch's dynamic int8 rounds a layer's inputs to seven bits.
#
# Guess: `quantize_dynamic(…, dtype=torch.qint8)` gives inputs and weights 8 bits, so an input has 256 levels.
# Seen (torch 2.13.0, engine x86, which is used by default): 128 levels, and twice the rounding error. The layer asks for them
# (`reduce_range=True` in torch/ao/nn/quantized/dynamic/modules/linear.py) for the sake of CPUs whose 16-bit sums overflow, on
# every CPU, and its operator called without that has all 256. Comparing engines "at int8" compares 7 bits with 8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

print("torch", torch.__version__, "engines", torch.backends.quantized.supported_engines)
torch.backends.quantized.engine = "x86"
x, same = torch.linspace(0, 1, 10_001)[:, None], nn.Linear(1, 1, bias=False)
nn.init.ones_(same.weight)  # the layer's output is its rounded input
layer = quantize_dynamic(nn.Sequential(same), dtype=torch.qint8)
weight = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(torch.ones(1, 1), 1 / 127, 0, torch.qint8), None)
operator = torch.ops.quantized.linear_dynamic
outputs = {
    "the layer": layer(x),
    "its operator, reduce_range=True": operator(x, weight, reduce_range=True),
    "its operator": operator(x, weight),
}
levels = {name: y.unique().numel() for name, y in outputs.items()}
for name, y in outputs.items():
    print(f"{name}: {levels[name]} levels between 0 and 1, largest error {(y - x).abs().max():.4f}")
assert list(levels.values()) == [128, 128, 256]  # the last is the control
PYTHON
