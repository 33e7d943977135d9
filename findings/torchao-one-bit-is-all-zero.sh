#!/usr/bin/env bash
# torchao's one-bit weights are all zero, and in two bits -1 comes back as -1.33.
#
# Guess: one bit keeps the signs, as in binary networks, or is refused; the largest weight of a group comes back as it was.
# Seen (torchao 0.18.0): "symmetric", the default, maps -max … max to the type's whole range, so scale = 2 max / (2^bits - 1).
# In one bit the codes are -1 and 0 and the scale is 2 max: every weight is at most half a step, rounds to 0, and the layer
# answers 0. In two bits -max is -1.5 steps and rounds to -2. In four, ±max comes back as ±0.93 max. Another mapping,
# SYMMETRIC_NO_CLIPPING_ERR, divides by the largest code: exact in four bits, and NaN in one, whose largest code is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps torchao==0.18.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

print("torchao", version("torchao"), "torch", torch.__version__)


def back(kind, weights, **settings):
    layer = nn.Sequential(nn.Linear(32, 1, bias=False))
    layer[0].weight = nn.Parameter(weights.clone())
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(32), **settings))
    return layer[0].weight.dequantize().detach()


ends = torch.tensor([[1.0, -1.0] * 16])
KINDS = torch.int8, torch.int4, torch.int2, torch.int1
found = {kind: [round(w, 3) for w in back(kind, ends)[0, :2].tolist()] for kind in KINDS}
print("1 and -1 come back as", found)
normal = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
print("32 normal numbers in one bit:", back(torch.int1, normal).unique().tolist())
assert found[torch.int4] == [0.933, -0.933] and found[torch.int2] == [0.667, -1.333] and found[torch.int1] == [0, 0]
assert not back(torch.int1, normal).any()
unclipped = {"mapping_type": MappingType.SYMMETRIC_NO_CLIPPING_ERR}
assert back(torch.int4, ends, **unclipped).equal(ends)  # the control
assert back(torch.int1, ends, **unclipped).isnan().all()
PYTHON
