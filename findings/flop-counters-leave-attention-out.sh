#!/usr/bin/env bash
# Four FLOP counters find no attention in a model that attends through PyTorch's own function.
#
# Guess: `scaled_dot_product_attention` is counted like the two products that it stands for, 4 n² d; or the counter warns.
# Seen (torch 2.13.0 on a CPU, ptflops 0.7.5, thop 0.1.1, torchinfo 1.8.0): 0, without a word. PyTorch's counter knows the CUDA
# kernels' names (`flop_registry`) and not `_scaled_dot_product_flash_attention_for_cpu`; written as two matrix products the
# same attention counts in full. torchinfo also forgets the rows: it counts a linear layer's weights once for 512 tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps ptflops==0.7.5 thop==0.1.1.post2209072238 torchinfo==1.8.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import ptflops
import thop
import torch
import torchinfo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

print(*(f"{name} {version(name)}" for name in ("torch", "ptflops", "thop", "torchinfo")), sep=", ")
TOKENS, WIDTH = 512, 64


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused, self.project = fused, nn.Linear(WIDTH, WIDTH, bias=False)  # four heads of 16 numbers

    def forward(self, x):
        q = self.project(x).unflatten(-1, (4, 16)).transpose(1, 2)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, q, q)
        return (q @ q.mT / 4).softmax(-1) @ q


def counted(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    (macs, _) = ptflops.get_model_complexity_info(
        model, (TOKENS, WIDTH), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )
    return {
        "torch": counter.get_total_flops(),
        "ptflops": 2 * macs,
        "thop": 2 * int(thop.profile(model, (x,), verbose=False)[0]),
        "torchinfo": 2 * torchinfo.summary(model, input_data=x, verbose=0).total_mult_adds,
    }


x = torch.randn(1, TOKENS, WIDTH)
linear, attention = 2 * TOKENS * WIDTH * WIDTH, 4 * TOKENS * TOKENS * WIDTH
print(f"by hand: {linear:,} of the linear layer, {attention:,} of attention")
fused, products = Attention(True), Attention(False)
products.load_state_dict(fused.state_dict())
assert torch.allclose(fused(x), products(x), atol=1e-5)  # one function, written in two ways
found = counted(fused, x)
print("counted:", found)
assert found == {"torch": linear, "ptflops": linear, "thop": linear, "torchinfo": linear // TOKENS}
assert counted(products, x)["torch"] == linear + attention  # the control
PYTHON
