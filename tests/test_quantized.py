"""Saving, loading and exporting quantized models: the same codes, the same values, or a clear error."""

import copy
import json
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from aside import install_aside
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, random_ids, tiny_model
from transformers import BertConfig, BertForSequenceClassification

from labutils.course.bench.child import start
from labutils.course.bench.subject import speed_subject
from labutils.generation.decode import forward_logits, generate_cached
from labutils.lab.models import gguf
from labutils.lab.models.checkpoint import CHECKSUMS
from labutils.lab.models.load import LoadError
from labutils.lab.models.quantized import (
    SCHEMES,
    WEIGHTS,
    fast_packed_llama,
    load_quantized,
    packed_layers,
    save_quantized,
)
from labutils.measurement.limits import status_bytes
from labutils.quantization.affine import Scheme
from labutils.quantization.kernels import find_kernels
from labutils.quantization.packed import PackedEmbedding, PackedLinear, PackedWeight, pack_model_, replace_packed_

needs_kernels = pytest.mark.skipif(find_kernels()[0] is None, reason="no C compiler")
GROUP_32 = Scheme(4, granularity="group", group_size=32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", [Scheme(8, symmetric=False), GROUP_32], ids=["int8", "int4"])
def test_a_saved_model_comes_back_with_the_same_logits(name, scheme, tmp_path):
    model, ids = pack_model_(tiny_model(name), scheme), random_ids(9)
    save_quantized(model, None, tmp_path / "saved", method="rtn")
    loaded = load_quantized(tmp_path / "saved")
    assert loaded.tokenizer is None and type(loaded.model) is type(model)
    assert torch.equal(forward_logits(loaded.model, ids), forward_logits(model, ids))
    assert torch.equal(generate_cached(loaded.model, ids, 5), generate_cached(model, ids, 5))
    embedding = loaded.model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        assert embedding.packed is loaded.model.get_output_embeddings().packed


def fast_tokens(model, ids, count=6):
    return fast_packed_llama(model, max_length=ids.shape[1] + count).generate(ids, count)


@needs_kernels
def test_what_was_changed_stays_changed_and_the_file_may_go(tmp_path):
    """Two decoders of one model, a change in between, and the file gone."""
    model, ids = pack_model_(tiny_model("llama-gqa-tied"), Scheme(8)), random_ids(9)
    save_quantized(model, None, tmp_path / "saved", method="rtn")
    before = (tmp_path / "saved" / WEIGHTS).read_bytes()
    loaded = load_quantized(tmp_path / "saved").model
    for changed in (model, loaded):
        changed.model.layers[0].mlp.down_proj.packed.scales.mul_(3)
        changed.model.layers[0].mlp.down_proj.packed.codes[::2] = 7
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == before
    shutil.rmtree(tmp_path / "saved")
    first, expected = fast_packed_llama(loaded, max_length=15), fast_tokens(model, ids)
    assert torch.equal(fast_tokens(loaded, ids), expected) and torch.equal(first.generate(ids, 6), expected)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(fast_tokens(copy.deepcopy(loaded), ids), expected)


@needs_kernels
@pytest.mark.parametrize("scheme", [Scheme(8, symmetric=False), GROUP_32], ids=["int8", "int4"])
def test_weights_are_read_to_where_a_decoder_wants_them(scheme, tmp_path):
    save_quantized(pack_model_(tiny_model("llama-gqa-tied"), scheme), None, tmp_path, method="rtn")
    model = load_quantized(tmp_path).model
    codes = [layer.packed.codes for layer in packed_layers(model).values()]
    fast_packed_llama(model, max_length=8)
    after = [layer.packed.codes for layer in packed_layers(model).values()]
    assert [a.data_ptr() for a in codes] == [b.data_ptr() for b in after]  # nothing was copied once more


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(status_bytes("VmHWM") is None, reason="the high-water mark is Linux'")
def test_decoding_holds_one_copy_of_the_weights(tmp_path):
    subject = speed_subject(num_hidden_layers=3)
    save_quantized(pack_model_(subject.model, Scheme(8)), None, tmp_path, method="rtn")
    size = (tmp_path / WEIGHTS).stat().st_size
    with ExitStack() as stack:
        told = {"folder": str(tmp_path), "threads": 1, "packed": True}
        child = start("ours", told, 1, stack)
        peak = child.ask({"do": "timed", "prompts": subject.token_ids.tolist(), "count": 8})["peak_bytes"]
    assert size > 6e7 and peak < 1.5 * size  # 16 MB are the first model's of a process, whatever its size


def test_layers_may_have_schemes_of_their_own_and_some_stay_float(tmp_path):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(9)
    for name, scheme in (("model.layers.0.mlp.up_proj", GROUP_32), ("model.layers.1.self_attn.q_proj", Scheme(8))):
        replace_packed_(model, name, PackedLinear.from_layer(model.get_submodule(name), scheme))
    save_quantized(model, None, tmp_path, method="mixed")
    described = json.loads((tmp_path / SCHEMES).read_text(encoding="utf-8"))
    assert described["method"] == "mixed"
    assert {name: layer["bits"] for name, layer in described["layers"].items()} == {
        "model.layers.0.mlp.up_proj": 4,
        "model.layers.1.self_attn.q_proj": 8,
    }
    assert torch.equal(forward_logits(load_quantized(tmp_path).model, ids), forward_logits(model, ids))


def test_models_that_are_no_language_models_come_back_too(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=97, **sizes)).eval()
    pack_model_(model, Scheme(8))
    save_quantized(model, None, tmp_path, method="rtn")
    ids = random_ids(9)
    assert torch.equal(load_quantized(tmp_path).model(ids).logits, model(ids).logits)


def test_the_file_is_as_small_as_the_codes(tmp_path):
    model = pack_model_(tiny_model("llama-gqa-tied"), GROUP_32)
    save_quantized(model, None, tmp_path, method="rtn")
    packed = sum(layer.packed.nbytes for layer in packed_layers(model).values())
    gains = sum(parameter.nbytes for parameter in model.parameters())
    header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert (tmp_path / WEIGHTS).stat().st_size == 8 + header + packed + gains


@pytest.fixture
def saved(tmp_path):
    save_quantized(pack_model_(tiny_model("llama-gqa-tied"), Scheme(8)), None, tmp_path, method="rtn")
    (tmp_path / CHECKSUMS).unlink()  # so that each test meets the check behind the checksums
    return tmp_path


def edit(folder, change):
    described = json.loads((folder / SCHEMES).read_text(encoding="utf-8"))
    change(described)
    (folder / SCHEMES).write_text(json.dumps(described), encoding="utf-8")


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda d: d.update(version=2), "must be of version 1; got 2"),
        (lambda d: d.update(architecture="Adder"), "must be a model of transformers; got 'Adder'"),
        (lambda d: d.update(architecture="torch"), "must be a model of transformers; got 'torch'"),
        (lambda d: d["layers"][LAYER].update(in_features=64), r"must be \(64, 32\) by config.json; .* says \(64, 64\)"),
        (lambda d: d["layers"][LAYER].update(bits=4), "must fit config.json and quantization.json; size mismatch"),
        (lambda d: d["layers"][LAYER].update(bits=3), "packed weights take 4 or 8 bits; got 3"),
        (lambda d: d["layers"][LAYER].update(with_zeros=True), "must fit .*Missing key.*up_proj.packed.zeros"),
        (lambda d: d["layers"][LAYER].update(group_size=16), "group_size must be a multiple of 32"),
        (lambda d: d["layers"][LAYER].update(colour="red"), "could not be loaded: .*colour"),
        (lambda d: d["layers"].pop(LAYER), "must fit .*up_proj"),
        (lambda d: d["layers"].update({"model.norm": d["layers"][LAYER]}), "names model.norm, which must be a linear"),
        (lambda d: d.pop("layers"), "could not be loaded: 'layers'"),
    ],
)
def test_a_mismatch_is_one_clear_sentence(saved, change, rule):
    edit(saved, change)
    with pytest.raises(LoadError, match=rule):
        load_quantized(saved)


@pytest.mark.parametrize("name", ["config.json", SCHEMES, WEIGHTS])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    save_quantized(pack_model_(tiny_model("llama-gqa-tied"), Scheme(8)), None, tmp_path, method="rtn")
    content = (tmp_path / name).read_bytes()
    for wrong in (content[:-1] + bytes([content[-1] ^ 1]), bytes([content[0] ^ 1]) + content[1:], content[:-1]):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(LoadError, match=f"{name} in .* must have SHA-256"):
            load_quantized(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(LoadError, match=f"must hold {name}"):
        load_quantized(tmp_path)


def test_weights_of_another_type_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors | {f"{LAYER}.packed.codes": tensors[f"{LAYER}.packed.codes"].to(torch.int8)}, saved / WEIGHTS)
    with pytest.raises(LoadError, match=r"up_proj.packed.codes in .* must be of torch.uint8; got torch.int8"):
        load_quantized(saved)


def test_torn_weights_are_a_clear_error(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(LoadError, match="could not be loaded"):
        load_quantized(saved)


def test_saving_a_float_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have packed layers; got none"):
        save_quantized(tiny_model("llama-gqa-tied"), None, tmp_path, method="rtn")


def values(block_bytes: np.ndarray, bits: int) -> np.ndarray:
    """What ggml's dequantize_row_q8_0 and dequantize_row_q4_0 make of blocks, by their definition."""
    rows = len(block_bytes)
    blocks = block_bytes.reshape(rows, -1, 2 + 4 * bits)
    scale = blocks[..., :2].copy().view("<f2").astype(np.float32)
    if bits == 8:
        return (scale * blocks[..., 2:].view(np.int8)).reshape(rows, -1)
    q = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.int32)
    return (scale * (q - 8)).astype(np.float32).reshape(rows, -1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.floats(1e-6, 100))
def test_packed_blocks_hold_the_same_values_as_ours(seed, bits, spread):
    weight = spread * torch.randn(10, 96, generator=torch.Generator().manual_seed(seed))
    weight[3] = 0
    packed = PackedWeight.from_float(weight, Scheme(bits, granularity="group", group_size=32), half_scales=True)
    rows = torch.tensor([9, 3, 0])
    assert np.array_equal(values(gguf.PackedRows(packed, rows).encode(), bits), packed.dequantize(rows).numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_export_of_a_packed_model_writes_its_own_values(bits, tmp_path):
    model = tiny_model("llama-gqa-tied")
    pack_model_(model, Scheme(bits, granularity="group", group_size=32), half_scales=True)
    gguf.export_gguf(model, None, tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    up = model.model.layers[2].mlp.up_proj.packed
    key = model.model.layers[1].self_attn.k_proj.packed
    order = gguf.interleave_halves(torch.arange(16), heads=2)
    for weight, rows in ((up, torch.arange(64)), (key, order), (model.lm_head.packed, torch.arange(97))):
        assert gguf.PackedRows(weight, rows).encode().tobytes() in data
    matrices = sum(layer.packed.out_features * layer.packed.in_features for layer in packed_layers(model).values())
    assert len(data) < 12_000 + matrices * (4 * bits + 2) / 32 + sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_llama_cpp_reads_a_packed_model_and_writes_the_same_tokens(tmp_path, monkeypatch):
    install_aside(tmp_path / "aside", ["xllamacpp==2026.10.11549"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "aside"))
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    pack_model_(model, Scheme(8, granularity="group", group_size=32), half_scales=True)
    gguf.export_gguf(model, None, tmp_path / "model.gguf")
    with ExitStack() as stack:
        child = start("llama", {"path": str(tmp_path / "model.gguf"), "fork": "llama.cpp", "threads": 1}, 1, stack)
        tokens = child.ask({"do": "timed", "prompts": ids.tolist(), "count": 8})["tokens"]
    assert (torch.tensor(tokens) == generate_cached(model, ids, 8)[:, 6:]).float().mean() > 0.8


@pytest.mark.parametrize(
    ("scheme", "half_scales"),
    [(Scheme(8), True), (Scheme(4, symmetric=False, granularity="group", group_size=32), True), (GROUP_32, False)],
)
def test_gguf_refuses_what_it_cannot_hold(scheme, half_scales, tmp_path):
    model = pack_model_(tiny_model("llama-gqa-tied"), scheme, half_scales=half_scales)
    with pytest.raises(ValueError, match="token_embd.weight: GGUF holds symmetric groups of 32"):
        gguf.export_gguf(model, None, tmp_path / "model.gguf")
