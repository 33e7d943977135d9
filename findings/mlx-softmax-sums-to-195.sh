#!/usr/bin/env bash
# MLX's softmax of 50,000 equal bfloat16 logits sums to 195 on a CPU.
#
# Guess: whatever the type, softmax gives probabilities: their sum is 1, up to the rounding of each.
# Seen (mlx 0.32.4, x86-64): the sum of exponentials is added up in the array's own type. In bfloat16 it stands still at 256, so each
# of 50,000 equal tokens gets 1/256 and not 1/50,000; in float16 it stops at 2,048. Whoever samples, or takes the logarithm for a
# perplexity, gets other numbers. `precise=True` is right, and so is `logsumexp`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 mlx==0.32.4 mlx-cpu==0.32.4
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), mx.default_device())
drawn = mx.array(np.random.default_rng(0).normal(0, 3, 50_000).astype(np.float32))


def total(logits, precise=False):
    return mx.softmax(logits, precise=precise).astype(mx.float32).sum().item()


seen = {}
for kind in (mx.float32, mx.bfloat16, mx.float16):
    equal, normal = mx.zeros((50_000,), dtype=kind), drawn.astype(kind)
    seen[kind] = total(equal), total(normal), total(equal, True), total(normal, True)
    print(f"{kind}: {seen[kind][0]:.3f} equal, {seen[kind][1]:.3f} normal; precise {seen[kind][2]:.3f}, {seen[kind][3]:.3f}")
assert all(abs(each - 1) < 0.01 for kind in seen for each in seen[kind][2:] + seen[mx.float32])  # the control
assert 150 < seen[mx.bfloat16][0] < 200 and seen[mx.bfloat16][1] > 1.2 and 20 < seen[mx.float16][0] < 30
PYTHON
