#!/usr/bin/env bash
# PyTorch's second round of pruning ranks a layer's weights as they were in its last forward pass.
#
# Guess: `l1_unstructured` called again removes the smallest of the weights that the layer has now.
# Seen (torch 2.13.0): after the optimizer's step, or `load_state_dict`, `layer.weight` is still the old product of weights and
# mask: a hook renews it before each forward pass, and `BasePruningMethod.apply` reads it. So a rank of old values decides, and
# here the largest weight goes; `global_unstructured` does the same. Run one batch through the layer before pruning again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils import prune

print("torch", torch.__version__)


def of(weights):
    layer = nn.Linear(4, 1, bias=False)
    layer.load_state_dict({"weight": torch.tensor([weights])})
    return layer


def pruned_twice(rounds, before=lambda layer: None):
    layer, later = of([1.0, 2.0, 3.0, 4.0]), of([1.0, 40.0, 30.0, 2.0])
    rounds(layer)
    rounds(later)  # gives its checkpoint the same names: weight_orig and weight_mask
    layer.load_state_dict(later.state_dict())  # as after training: now 0, 40, 30, 2
    shown = layer.weight[0].tolist()
    before(layer)
    rounds(layer)
    return shown, layer.weight[0].tolist()


def one_by_layer(layer):
    prune.l1_unstructured(layer, "weight", amount=1)


def one_of_all(layer):
    prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=1)


seen = {"by layer": pruned_twice(one_by_layer), "globally": pruned_twice(one_of_all)}
seen["after a forward pass"] = pruned_twice(one_by_layer, lambda layer: layer(torch.ones(1, 4)))
for name, (shown, left) in seen.items():
    print(f"{name}: of 0, 40, 30, 2 the layer shows {shown}, and pruning one more leaves {left}")
assert seen["by layer"] == seen["globally"] == ([0, 2, 3, 4], [0, 0, 30, 2])
assert seen["after a forward pass"][1] == [0, 40, 30, 0]  # the control
PYTHON
