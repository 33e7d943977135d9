#!/usr/bin/env bash
# In transformers neither top_k=1 nor the smallest top_p is greedy when two logits tie.
#
# Guess: with one token left to draw from, sampling gives what greedy decoding gives, whatever the seed.
# Seen (transformers 5.23.0): `top_k=1` keeps every logit that equals the largest, and a draw decides; `top_p=1e-9` keeps one,
# the last of them, where greedy takes the first. Exact ties are no rarity: bfloat16 has steps of 1/8 between 16 and 32, and of
# 200 rows of 50,000 normal numbers in it 16 tie at the top.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import GPT2Config, GPT2LMHeadModel

print("torch", torch.__version__, "transformers", version("transformers"))
drawn = (torch.randn(200, 50_000, generator=torch.Generator().manual_seed(0)) * 5).bfloat16().float()
top = drawn.topk(2).values
print(f"rows of 50,000 normal numbers in bfloat16 whose two largest are equal: {(top[:, 0] == top[:, 1]).sum()} of 200")
sizes = {"vocab_size": 8, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=7)).eval()
model.lm_head.weight = torch.nn.Parameter(torch.zeros(8, 8))  # all logits equal: the plainest tie
start = torch.tensor([[0]])


def texts(**settings):
    found = set()
    for seed in range(20):
        torch.manual_seed(seed)
        ids = model.generate(start, max_new_tokens=4, pad_token_id=0, eos_token_id=None, **settings)
        found.add(tuple(ids[0, 1:].tolist()))
    return found


greedy = texts(do_sample=False)
top_k, top_p = texts(do_sample=True, top_k=1), texts(do_sample=True, top_k=0, top_p=1e-9)
print(f"20 seeds: greedy {greedy}, top_p=1e-9 {top_p}, top_k=1 {len(top_k)} texts")
assert greedy == {(0, 0, 0, 0)} and len(top_k) > 10 and len(top_p) == 1 and top_p != greedy
torch.nn.init.normal_(model.lm_head.weight)  # the control: no ties
assert texts(do_sample=True, top_k=1) == texts(do_sample=False)
PYTHON
