#!/usr/bin/env bash
# torchao's float8 makes NaN of a pruned row.
#
# Guess: a row of zeros stays a row of zeros, as it does in torchao's int8 and int4: zeros are the easiest weights to round.
# Seen (torchao 0.18.0, torch 2.13.0, CPU): each row's scale is max |w| / 448 with no lower bound (`_choose_scale_float8` in
# quantization/quant_primitives.py), and 0 / 0 is NaN. `quantize_` says nothing; the neuron answers NaN from then on, and the
# next layer spreads it to all. Rows of zeros are made by structured pruning, by padded vocabularies and by layers that start
# at zero. The integer formats hold their scale above a smallest number.
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
from torch.nn.utils import prune
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

print("torchao", version("torchao"), "torch", torch.__version__, flush=True)
CONFIGS = {
    "float8": Float8WeightOnlyConfig(),
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}
seen = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 4, bias=False))
    prune.ln_structured(model[0], "weight", amount=1, n=2, dim=0)  # one of four neurons
    prune.remove(model[0], "weight")
    x = torch.ones(1, 64)
    exact = model(x)
    quantize_(model[0], config)
    hidden, answer = model[0](x), model(x)
    seen[name] = hidden.isnan().sum().item(), answer.isnan().sum().item()
    print(f"{name}: hidden {hidden.tolist()[0]}, answer {answer.tolist()[0]}, exact {exact.tolist()[0]}", flush=True)
assert exact.isfinite().all()
assert seen["int8"] == seen["int4"] == (0, 0)  # the control
assert seen["float8"] == (1, 4)
PYTHON
