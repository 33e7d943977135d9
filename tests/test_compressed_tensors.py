"""compressed-tensors written and read: words by hand, bits of the package's packing, logits in transformers and vLLM.

vLLM needs a Python of its own: see tests/test_vllm.py.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aside import install_aside
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import random_ids, tiny_model

from labutils.lab.layers.linears import change_weights_, linear_layers, weight_of
from labutils.lab.models.compressed_tensors import (
    from_words,
    read_compressed_tensors,
    save_compressed_tensors,
    to_words,
)
from labutils.lab.models.load import LoadError
from labutils.quantization.affine import QParams, Scheme, choose_qparams, dequantize, quantize

PINS = ["compressed-tensors==0.20.0", "loguru==0.7.3"]
SCHEMES = {
    "int4, groups": Scheme(4, granularity="group", group_size=16),
    "int4, groups, zero points": Scheme(4, symmetric=False, granularity="group", group_size=16),
    "int8, rows": Scheme(8),
    "int8, rows, zero points": Scheme(8, symmetric=False),
    "int3 in 4 bits": Scheme(3, symmetric=False, granularity="group", group_size=32),
    "one scale": Scheme(8, granularity="tensor"),
}


def quantized(model, scheme):
    return {n: (quantize(w, q := choose_qparams(w, scheme)), q) for n, w in weights(model).items()}


def weights(model):
    return {name: weight_of(layer).detach() for name, layer in linear_layers(model)}


def test_words_by_hand():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [-8, -8, -8, -8, -8, -8, -8, 7]])
    words = to_words(codes, 4)
    assert [hex(w & 0xFFFFFFFF) for w in words.flatten().tolist()] == ["0xfedcba98", "0xf0000000"]
    assert to_words(codes[:, :5], 8).shape == (2, 2)  # 40 bits take two words


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**31))
def test_words_come_back(bits, count, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, count)))
    words = to_words(codes, bits)
    assert words.shape == (3, -(-count * bits // 32)) and torch.equal(from_words(words, bits, count), codes.int())
    turned = words.T.contiguous().T  # as zero points come: with an axis of length 1 its strides are odd
    assert torch.equal(from_words(turned, bits, count), codes.int())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_come_back(scheme, tmp_path):
    model = tiny_model("llama-gqa-tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = quantized(model, scheme)
    save_compressed_tensors(model, None, tmp_path / "m", layers)
    read = read_compressed_tensors(tmp_path / "m")
    assert read.keys() == layers.keys()
    for name, (codes, qparams) in read.items():
        assert torch.equal(codes, layers[name][0].to(torch.int8))
        torch.testing.assert_close(dequantize(codes, qparams), dequantize(*layers[name]), rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored


def test_zero_points_are_packed_down_the_outputs(tmp_path):
    model = tiny_model("llama-gqa-tied")
    save_compressed_tensors(model, None, tmp_path, quantized(model, SCHEMES["int4, groups, zero points"]))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    out, n = stored[f"{name}.weight_shape"].tolist()
    assert stored[f"{name}.weight_zero_point"].shape == (-(-out // 8), n // 16)
    assert stored[f"{name}.weight_packed"].shape == (out, n // 8)


def bad(model, change):
    name = "model.layers.1.self_attn.q_proj"
    codes, qparams = quantized(model, Scheme(4))[name]
    return change(name, codes, qparams)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda n, c, q: {"model.norm": (c, q)}, "an untied nn.Linear of the model; got 'model.norm'"),
        (lambda n, c, q: {"nowhere": (c, q)}, "got 'nowhere'"),
        (lambda n, c, q: {"lm_head": (c, q)}, "untied nn.Linear of the model; got 'lm_head'"),
        (lambda n, c, q: {n: (c[:1], q)}, "q_proj must have codes of shape"),
        (lambda n, c, q: {n: (c, QParams(q.scale, q.scale, -8, 7))}, "must be integers; got real numbers"),
        (lambda n, c, q: {n: (c + 20, q)}, "codes must lie in -7 … 7; got"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_a_file_is_written(change, rule, tmp_path):
    model = tiny_model("llama-gqa-tied")
    with pytest.raises(ValueError, match=rule):
        save_compressed_tensors(model, None, tmp_path / "m", bad(model, change))
    assert not (tmp_path / "m").exists()


def test_broken_checkpoints_are_one_sentence(tmp_path):
    model = tiny_model("llama-gqa-tied")
    save_compressed_tensors(model, None, tmp_path, quantized(model, Scheme(4)))
    path, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    whole, name = load_file(path), "model.layers.0.mlp.up_proj"
    save_file(whole | {f"{name}.weight_g_idx": torch.zeros(32, dtype=torch.int32)}, path)
    with pytest.raises(LoadError, match="up_proj must keep its inputs in order"):
        read_compressed_tensors(tmp_path)
    save_file(whole | {f"{name}.weight_shape": torch.tensor([5, 5])}, path)
    with pytest.raises(LoadError, match=r"up_proj must fit its shape \(5, 5\)"):
        read_compressed_tensors(tmp_path)
    save_file({k: t for k, t in whole.items() if k != f"{name}.weight_scale"}, path)
    with pytest.raises(LoadError, match="could not be read: .*weight_scale"):
        read_compressed_tensors(tmp_path)
    config["quantization_config"]["format"] = "int-quantized"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="the format must be pack-quantized; .* has 'int-quantized'"):
        read_compressed_tensors(tmp_path)
    with pytest.raises(LoadError, match="could not be read"):
        read_compressed_tensors(tmp_path / "nowhere")


LOADED = """
import sys, torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from labutils.lab.models.compressed_tensors import to_words

for bits in range(1, 9):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 40), dtype=torch.int8)
    assert torch.equal(to_words(codes, bits), pack_to_int32(codes, bits)), bits
    assert torch.equal(to_words(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0)), bits
for folder in sys.argv[1:]:
    ids, expected, symmetric = torch.load(folder + "/logits.pt")
    ways = [{"quantization_config": CompressedTensorsConfig(dequantize=True)}]
    ways += [{}] if symmetric else []  # kept packed, it makes no room for packed zero points (5.23)
    for way in ways:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **way)
        with torch.no_grad():
            logits = model(ids).logits
        print((logits - expected).abs().max().item())
"""


@pytest.mark.slow
def test_transformers_loads_it_with_our_logits(tmp_path):
    """The package packs as we do, and folders of each scheme, and of LabLM, load with the logits of our weights."""
    from labutils.lab.models.load import load_model

    install_aside(tmp_path / "aside", PINS)
    lablm = load_model("lablm")
    made = [(tiny_model("llama-gqa-tied"), None, scheme) for scheme in SCHEMES.values()]
    made += [(lablm.model, lablm.tokenizer, Scheme(4, granularity="group", group_size=64))]
    folders = []
    for index, (model, tokenizer, scheme) in enumerate(made):
        folder = tmp_path / str(index)
        save_compressed_tensors(model, tokenizer, folder, layers := quantized(model, scheme))
        change_weights_(model, lambda name, _, layers=layers: dequantize(*layers[name]))
        with torch.no_grad():
            torch.save((ids := random_ids(9), model(ids).logits, scheme.symmetric), folder / "logits.pt")
        folders.append(str(folder))
    paths = os.pathsep.join([str(tmp_path / "aside"), str(Path(__file__).resolve().parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", LOADED, *folders],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr[-2000:]
    said = [line.split() for line in run.stdout.splitlines() if line[:1].isdigit()]
    assert len(said) == len(folders) + sum(scheme.symmetric for _, _, scheme in made)
    assert all(float(distance) < 1e-4 for (distance,) in said), said


IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = LLM(model=folder, dtype="float16", max_model_len=64, enforce_eager=True, max_logprobs=-1, seed=0)
options = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
(found,) = model.generate({"prompt_token_ids": ids}, options)[0].outputs[0].logprobs
print(json.dumps([found[i].logprob for i in range(len(found))]))
"""


@pytest.mark.slow
@pytest.mark.skipif("LABUTILS_VLLM" not in os.environ, reason="LABUTILS_VLLM names no Python that has vLLM")
@pytest.mark.parametrize("symmetric", [True, False])
def test_vllm_loads_it_with_our_logits(symmetric, tmp_path):
    """Of every token. vLLM's CPU kernel for 4 bits knows no float32: float16 errs by no more than in PyTorch."""
    from labutils.lab.models.load import load_model

    model, tokenizer = load_model("lablm")
    layers = quantized(model, Scheme(4, symmetric=symmetric, granularity="group", group_size=64))
    save_compressed_tensors(model, tokenizer, tmp_path / "m", layers)
    ids = tokenizer("def add(a, b):\n    return", return_tensors="pt").input_ids
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [os.environ["LABUTILS_VLLM"], "-c", IN_VLLM, str(tmp_path / "m"), json.dumps(ids[0].tolist())]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    change_weights_(model, lambda name, _: dequantize(*layers[name]))
    with torch.no_grad():
        ours, in_half = (m(ids).logits[0, -1].float().log_softmax(-1) for m in (model, copy.deepcopy(model).half()))
    print(f"largest difference: vLLM {(theirs - ours).abs().max():.4f}, PyTorch {(in_half - ours).abs().max():.4f}")
    assert (theirs - ours).abs().max() < 2 * (in_half - ours).abs().max() < 0.06
    assert theirs.argmax() == ours.argmax()
