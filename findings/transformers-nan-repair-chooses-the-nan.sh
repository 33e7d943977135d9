#!/usr/bin/env bash
# transformers' repair of NaN logits chooses the very token whose logit was NaN.
#
# Guess: `remove_invalid_values=True` takes the invalid values out, as its name says: such a token is not chosen.
# Seen (transformers 5.23.0): NaN becomes 0 (`InfNanRemoveLogitsProcessor`), and infinity the largest float. Where the other
# logits lie far below 0, 0 is the largest: greedy decoding and sampling give the broken token every time, and greedy gave it
# without the repair as well (PyTorch's argmax takes NaN for the largest). Where the others lie far above 0 it never comes. A
# constant added to all logits changes no probability, and here it changes the text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

print("torch", torch.__version__, "transformers", version("transformers"))
set_seed(0)
sizes = {"vocab_size": 8, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=7)).eval()
model.lm_head = torch.nn.Linear(8, 8)
BROKEN, NEW = 5, 20
share = {}
for shift in (-20.0, 20.0):  # the same probabilities
    with torch.no_grad():
        model.lm_head.bias.fill_(shift)
        model.lm_head.bias[BROKEN] = float("nan")
    for name, settings in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True})):
        ids = model.generate(
            torch.tensor([[0]]), max_new_tokens=NEW, pad_token_id=0, eos_token_id=None, remove_invalid_values=True, **settings
        )
        share[name, shift] = (ids[0, 1:] == BROKEN).sum().item()
        print(f"other logits near {shift:.0f}, {name}: {share[name, shift]} of {NEW} tokens are the broken one")
assert share["greedy", -20.0] == share["sampled", -20.0] == NEW
assert share["greedy", 20.0] == share["sampled", 20.0] == 0  # the control
PYTHON
