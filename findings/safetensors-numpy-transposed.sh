#!/usr/bin/env bash
# safetensors' NumPy writer stores a transposed array as other numbers, without a word.
#
# Guess: what `save` was given is what `load` returns, or `save` refuses an array that is not contiguous.
# Seen (safetensors 0.8.0): the shape is the view's, the bytes are those of the array behind it. `ascontiguousarray` first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

print("safetensors", version("safetensors"))
weight = np.arange(6, dtype=np.float32).reshape(2, 3)
back = load(save({"transposed": weight.T}))["transposed"]
print("saved:", weight.T.tolist())
print("loaded:", back.tolist())
assert back.shape == weight.T.shape and not np.array_equal(back, weight.T)
assert np.array_equal(load(save({"copy": np.ascontiguousarray(weight.T)}))["copy"], weight.T)  # the control
PYTHON
