#!/usr/bin/env bash
# In PyTorch a number over a tensor is not that quotient: it is the tensor's reciprocal times the number, rounded twice.
#
# Guess: 127 / x is the float32 that is nearest to the quotient, as NumPy and C give it, and as x / 127 is in PyTorch itself.
# Seen (torch 2.13.0, CPU): of 127 / x for the whole numbers x from 1 to 999, hundreds differ in the last bit from a tensor of
# 127s over x, which is exact. Whoever scales numbers for rounding by 127 / max|x| meets ties that exact division does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__)
x = torch.arange(1.0, 1000.0)
exact = torch.from_numpy(np.float32(127) / x.numpy())
number, tensor = 127 / x, torch.full_like(x, 127) / x
print("of 999 quotients differ from NumPy's: 127 / x", (number != exact).sum().item(), "full_like(x, 127) / x",
      (tensor != exact).sum().item(), "x.reciprocal() * 127", (x.reciprocal() * 127 != exact).sum().item())
assert torch.equal(tensor, exact) and torch.equal(x / 127, torch.from_numpy(x.numpy() / np.float32(127)))
assert torch.equal(number, x.reciprocal() * 127) and 100 < (number != exact).sum() < 900
PYTHON
