#!/usr/bin/env bash
# PyTorch's fake quantization and its quantization round halves differently when the zero point is odd.
#
# Guess: quantization-aware training sees the codes that the converted model will have: that is what it is for.
# Seen (torch 2.13.0, CPU): `fake_quantize_per_tensor_affine` rounds x / scale and then adds the zero point; `quantize_per_tensor`
# adds it first. Halves go to the even code, so an odd zero point turns every one of them the other way: a whole step between
# training and conversion. Data that lie on a grid (pixels, powers of two) are full of halves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)
x = torch.arange(-8, 8) / 2
seen = {}
for zero_point in (0, 1, 2, 3):
    trained = torch.fake_quantize_per_tensor_affine(x, 1.0, zero_point, -128, 127)
    converted = torch.quantize_per_tensor(x, 1.0, zero_point, torch.qint8).dequantize()
    seen[zero_point] = (trained - converted).abs()
    print(f"zero point {zero_point}: {(seen[zero_point] > 0).sum()} of {len(x)} differ, by at most {seen[zero_point].max()}")
    if zero_point == 1:
        print(f"  of {x[1::2][:3].tolist()}")
        print(f"  training sees {trained[1::2][:3].tolist()}, the converted tensor has {converted[1::2][:3].tolist()}")
assert not seen[0].any() and not seen[2].any()  # the control
for odd in (1, 3):
    assert (seen[odd] > 0).tolist() == (x % 1 != 0).tolist() and seen[odd].max() == 1
PYTHON
