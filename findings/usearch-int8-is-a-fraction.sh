#!/usr/bin/env bash
# In USearch an int8 is a fraction of 127, whatever the index stores and whatever the metric.
#
# Guess: int8 vectors in a float32 index keep their numbers; floats in an int8 index are rounded, and their lengths count.
# Seen (usearch 2.26.6): the first are divided by 127 (100 is stored as 0.787), so a query of floats is compared at another
# scale, and the wrong vector is the nearest. In the second each vector is brought to length 1, as the README says of int8;
# `Index` takes the metrics "ip" and "l2sq" all the same, without a word, and the order of the answers is that of cosines.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 usearch==2.26.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from usearch.index import Index

print("usearch", version("usearch"))
codes = np.array([[100, 0, 0, 0, 0, 0, 0, 0], [30, 0, 0, 0, 0, 0, 0, 0]], np.int8)
found = {}
for kind in (np.float32, np.int8):
    index = Index(ndim=8, metric="l2sq", dtype="f32")
    index.add(np.arange(2), codes.astype(kind))
    stored = [index.get(key)[0].item() for key in (0, 1)]
    found[kind] = stored, index.search(codes[1].astype(np.float32), 1).keys.tolist()
    print(f"a float32 index from {kind.__name__}: 100 and 30 are stored as {stored}; nearest to 30.0 is number {found[kind][1]}")
assert found[np.float32] == ([100, 30], [1])  # the control
assert np.allclose(found[np.int8][0], [100 / 127, 30 / 127]) and found[np.int8][1] == [0]
vectors = np.array([[0.9] * 8, [1.0] + [0.0] * 7], np.float32)
first = {}
for kind in ("f32", "i8"):
    index = Index(ndim=8, metric="ip", dtype=kind)
    index.add(np.arange(2), vectors)
    first[kind] = index.search(np.array([2.0, 1.0] + [0.0] * 6, np.float32), 2).keys.tolist()
exact = (vectors @ np.array([2.0, 1.0] + [0.0] * 6)).tolist()
print(f"inner products {exact}; order by f32 {first['f32']}, by i8 {first['i8']}")
assert first == {"f32": [0, 1], "i8": [1, 0]}
PYTHON
