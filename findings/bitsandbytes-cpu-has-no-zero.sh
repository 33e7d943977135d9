#!/usr/bin/env bash
# In bitsandbytes' 8 bits a zero comes back as a small positive number on a CPU.
#
# Guess: its table of 256 values has an exact 0, so zeros stay zeros: of a pruned weight, of an optimizer's state.
# Seen (bitsandbytes 0.50.2, float32, bfloat16 and float16): 0 becomes code 131, which stands for 2.1e-5 of the block's largest
# value. The CPU code (`quantize_cpu_impl`) cuts -1 … 1 into equal cells and looks up one code a cell; near 0 the table's values
# lie closer together than the cells. The nearest of the 256 values is 0, and 4 bits (NF4) keep every zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 packaging==26.4
"$folder/venv/bin/pip" install --quiet --no-deps bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise

print("bitsandbytes", version("bitsandbytes"), "torch", version("torch"))
table = create_dynamic_map()
print("codes of the table that stand for 0:", (table == 0).nonzero().flatten().tolist())
pruned = torch.zeros(4096)
pruned[::64] = 1.0  # one number in 64 is left, in blocks of 64
seen = {}
for kind in (torch.float32, torch.bfloat16, torch.float16):
    codes, state = quantize_blockwise(pruned.to(kind), blocksize=64)
    back = dequantize_blockwise(codes, state).float()
    seen[kind] = codes[1].item(), (back == 0).sum().item(), back[1].item()
    print(f"{kind}: code of 0 {seen[kind][0]}, {seen[kind][1]} of 4032 zeros left, 0 reads as {seen[kind][2]:.3g}")
assert (table == 0).nonzero().flatten().tolist() == [127]
assert dequantize_4bit(*quantize_4bit(pruned, blocksize=64, quant_type="nf4")).count_nonzero() == 64  # the control
assert all(code == 131 and left == 0 and 2e-5 < value < 3e-5 for code, left, value in seen.values())
PYTHON
