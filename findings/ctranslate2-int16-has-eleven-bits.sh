#!/usr/bin/env bash
# CTranslate2's int16 weights use 11 of their 16 bits.
#
# Guess: like int8 (127 / max), int16 maps the largest weight to 32767, and is 256 times finer.
# Seen (ctranslate2 4.8.5): the largest weight becomes 1024, so int16 is 8 times finer than int8. One scale serves the whole
# matrix, where int8 has one a row: a small row beside a large one may come out coarser in int16 than in int8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ctranslate2==4.8.5
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from ctranslate2.specs.common_spec import LinearSpec

print("ctranslate2", version("ctranslate2"))


def stored(kind):
    weight = np.array([[3.0, -1.0, 0.4], [0.003, -0.001, 0.0004]], np.float32)
    spec = LinearSpec()
    spec.weight = weight.copy()
    spec.validate()
    spec.optimize(quantization=kind)
    codes, scale = spec.weight.numpy(), np.atleast_1d(spec.weight_scale.numpy())
    error = np.abs(codes / scale.reshape(-1, 1) - weight).max(axis=1) / np.abs(weight).max(axis=1)
    print(f"{kind}: codes {codes.tolist()}, scale {scale.tolist()}, largest error of each row {error.tolist()}")
    return codes, scale, error


codes, scale, coarse = stored("int16")
assert np.abs(codes).max() == 1024 and scale.size == 1
codes, scale, fine = stored("int8")  # the control
assert np.abs(codes).max() == 127 and scale.size == 2
assert coarse[1] > fine[1]
PYTHON
