#!/usr/bin/env bash
# FAISS' 8-bit quantizer brings the largest number back larger, and 0 as something else.
#
# Guess: trained on a minimum and a maximum, a scalar quantizer gives both back exactly, like any min-max scheme of 256 levels.
# Seen (faiss-cpu 1.15.1): encoding cuts x · 255 down to a whole code, decoding reads (code + 0.5) / 255. So 0 and 1 come back as
# 0.002 and 1.002, and in 4 bits as 0.033 and 1.033: beyond the range, where the largest number has a step of its own. A vector
# of zeros gets a length, and a normalized one grows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 faiss-cpu==1.15.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import faiss
import numpy as np

print("faiss-cpu", version("faiss-cpu"))
vectors = np.linspace(0, 1, 1001, dtype=np.float32)[:, None].repeat(8, 1)
back = {}
for name in ("QT_8bit", "QT_8bit_uniform", "QT_4bit", "QT_fp16"):
    quantizer = faiss.ScalarQuantizer(8, getattr(faiss.ScalarQuantizer, name))
    quantizer.train(vectors)
    back[name] = quantizer.decode(quantizer.compute_codes(vectors))
    print(f"{name}: 0 comes back as {back[name][0, 0]:.5f}, 1 as {back[name][-1, 0]:.5f}")
for name, steps in (("QT_8bit", 255), ("QT_8bit_uniform", 255), ("QT_4bit", 15)):
    assert np.allclose(back[name][[0, -1], 0], [0.5 / steps, 1 + 0.5 / steps], atol=1e-5)
assert back["QT_fp16"][[0, -1], 0].tolist() == [0, 1]  # the control
PYTHON
