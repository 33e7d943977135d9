"""GGUF: blocks worked by hand, the file read by the reference package, the rotary order proved by products."""

import struct
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from labutils.cli import export
from labutils.models import gguf as ours
from labutils.models.gguf_tokenizer import pre_tokenizer_name, tokenizer_metadata
from labutils.models.tokenizer import train_tokenizer

seeds = st.integers(0, 2**31)


def weights(seed: int, *, rows: int = 3, columns: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-untied-bias")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 20 + ["hällo 世界"], vocab_size=290, max_positions=64)


def test_q8_0_block_by_hand():
    row = np.zeros((1, 32), np.float32)
    row[0, :4] = 254.0, -127.0, 1.0, 3.0  # scale 2: 127, -63.5, 0.5, 1.5, halves away from zero
    block = ours.encode_q8_0(row)
    assert block.shape == (1, 34)
    assert block[0, :2].view("<f2").item() == 2.0
    assert block[0, 2:6].view(np.int8).tolist() == [127, -64, 1, 2]


def test_q4_0_block_by_hand():
    row = np.zeros((1, 32), np.float32)
    row[0, 0], row[0, 1], row[0, 16], row[0, 17] = 16.0, 3.0, -16.0, -1.0  # scale 16 / -8 = -2, the first largest wins
    block = ours.encode_q4_0(row)
    assert block.shape == (1, 18)
    assert block[0, :2].view("<f2").item() == -2.0
    # q = floor(w / -2 + 8.5): 16 -> 0, 3 -> 7, -16 -> 16.5 cut to 15, -1 -> 9
    assert block[0, 2:5].tolist() == [0 | 15 << 4, 7 | 9 << 4, 8 | 8 << 4]


def test_a_block_of_zeros_stays_zero():
    for encode in (ours.encode_q8_0, ours.encode_q4_0):
        block = encode(np.zeros((1, 32), np.float32))  # the scale is 0: dividing by it would leave NaN
        assert block[0, :2].view("<f2").item() == 0.0
        assert set(block[0, 2:].tolist()) <= {0, 0x88}


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(["Q8_0", "Q4_0"]), st.floats(1e-3, 1e3))
def test_blocks_equal_the_reference_package(library_aside, seed, name, spread):
    gguf = library_aside("gguf")
    weight = np.float32(spread) * weights(seed)
    kind = gguf.GGMLQuantizationType[name]
    block = ours.FORMATS[name].encode(weight)
    assert np.array_equal(block, gguf.quants.quantize(weight, kind))
    error = np.abs(gguf.quants.dequantize(block, kind) - weight).max()
    assert error <= np.abs(weight).max() * {"Q8_0": 0.6 / 127, "Q4_0": 1.01 / 8}[name]


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_interleaved_heads_rotated_by_neighbours_give_transformers_products(seed):
    heads, d, positions = 2, 8, 5
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(heads * d, positions, generator=generator) for _ in range(2)
    )  # rows as weights, columns as inputs
    angles = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(0, d, 2) / d)

    def by_halves(x):
        x = x.reshape(heads, d, positions).transpose(1, 2)[None]
        cos, sin = angles.repeat(1, 2).cos()[None], angles.repeat(1, 2).sin()[None]
        return apply_rotary_pos_emb(x, x, cos, sin)[0][0]

    def by_neighbours(x):
        x = ours.interleave_halves(x, heads=heads).reshape(heads, d, positions).transpose(1, 2)
        even, odd = x[..., ::2], x[..., 1::2]
        turned = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
        return torch.stack(turned, dim=-1).flatten(-2)

    expected = by_halves(q) @ by_halves(k).transpose(1, 2)
    torch.testing.assert_close(by_neighbours(q) @ by_neighbours(k).transpose(1, 2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(ours.FORMATS))
def test_the_reference_reader_finds_every_tensor_and_entry(library_aside, name, model, tokenizer, tmp_path):
    gguf = library_aside("gguf")
    path = tmp_path / "model.gguf"
    ours.export_gguf(model, None, path, format=name)
    reader = gguf.GGUFReader(path)
    found = {t.name: t for t in reader.tensors}
    expected = dict(ours.named_tensors(model))
    assert found.keys() == expected.keys() and "output.weight" in found and "blk.2.attn_q.bias" in found
    for tensor_name, tensor in expected.items():
        stored = found[tensor_name]
        assert list(stored.shape) == list(reversed(tensor.shape))
        matrix = gguf.quants.dequantize(stored.data, stored.tensor_type)
        reference = tensor.detach().numpy()
        if tensor.ndim == 2 and name != "F32":
            assert stored.tensor_type == gguf.GGMLQuantizationType[name]
            assert 0 < np.abs(matrix - reference).mean() < 0.1 * reference.std()
        else:
            assert np.array_equal(matrix.reshape(reference.shape), reference)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert (
        reader.fields["general.file_type"].contents()
        == gguf.LlamaFileType[{"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")]
    )
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.rope.freq_base"].contents() == 10000.0


def test_the_tokenizer_survives(library_aside, model, tokenizer, tmp_path):
    gguf = library_aside("gguf")
    path = tmp_path / "model.gguf"
    ours.export_gguf(model, tokenizer, path)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "qwen2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert [tokenizer.convert_tokens_to_ids(t) for t in tokens] == list(range(len(tokenizer)))
    types = fields["tokenizer.ggml.token_type"]
    assert {t for t, kind in zip(tokens, types, strict=True) if kind == 3} == set(tokenizer.all_special_tokens) | {
        f"<|{role}|>" for role in ("system", "user", "assistant")
    }
    first = fields["tokenizer.ggml.merges"][0].split(" ")
    assert len(first) == 2 and "".join(first) in tokens
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_header_by_hand(tmp_path):
    path = tmp_path / "model.gguf"
    model = tiny_model("llama-gqa-tied")
    ours.export_gguf(model, None, path, name="x")
    raw = path.read_bytes()
    magic, version, tensors, _ = struct.unpack("<4sIQQ", raw[:24])
    assert (magic, version, tensors) == (b"GGUF", 3, 2 + 3 * 9)  # tied: no output.weight
    assert raw[24:].startswith(ours.string("general.architecture") + struct.pack("<I", 8) + ours.string("llama"))
    assert raw.endswith(model.model.layers[2].mlp.down_proj.weight.detach().numpy().tobytes())
    assert len(raw) % 32 == 0


def offsets(raw: bytes) -> dict[str, tuple[int, int]]:
    """Type and offset of every tensor, read by the specification alone; metadata is skipped by searching the index."""
    at = raw.index(ours.string("token_embd.weight"))
    found = {}
    while raw[at : at + 8] != b"\0" * 8 and len(found) < struct.unpack("<Q", raw[8:16])[0]:
        (length,) = struct.unpack("<Q", raw[at : at + 8])
        name = raw[at + 8 : at + 8 + length].decode()
        (dimensions,) = struct.unpack("<I", raw[at + 8 + length : at + 12 + length])
        at += 12 + length + 8 * dimensions
        found[name] = struct.unpack("<IQ", raw[at : at + 12])
        at += 12
    return found | {"data": (0, at + -at % 32)}


def test_every_tensor_lies_at_its_offset_even_behind_one_of_an_odd_size(tmp_path):
    model = tiny_model("llama-gqa-tied")  # 97 rows of one block of 18 bytes: no multiple of 32
    ours.export_gguf(model, None, tmp_path / "model.gguf", format="Q4_0")
    raw = (tmp_path / "model.gguf").read_bytes()
    index = offsets(raw)
    _, start = index.pop("data")
    for name, tensor in ours.named_tensors(model):
        kind, offset = index[name]
        array = tensor.detach().numpy()
        stored = (ours.encode_q4_0 if kind == 2 else ours.encode_f32)(array).tobytes()
        assert kind == (2 if array.ndim == 2 else 0) and offset % 32 == 0
        assert raw[start + offset : start + offset + len(stored)] == stored


def test_typed_values_by_hand():
    assert ours.typed(True) == b"\x07\0\0\0\x01"
    assert ours.typed(258) == b"\x04\0\0\0\x02\x01\0\0"
    assert ours.typed(1.0) == b"\x06\0\0\0\0\0\x80\x3f"
    assert ours.typed([1, -1]) == struct.pack("<IIQii", 9, 5, 2, 1, -1)
    with pytest.raises(TypeError, match="got None"):
        ours.typed(None)


def test_export_command_writes_a_checkpoint_folder(model, tmp_path, capsys, tokenizer):
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    parser = ArgumentParser()
    export.add_arguments(parser)
    output = tmp_path / "tiny.gguf"
    assert (
        export.run(parser.parse_args(["gguf", str(tmp_path / "tiny"), "--format", "Q8_0", "--output", str(output)]))
        == 0
    )
    assert output.read_bytes()[:4] == b"GGUF"
    assert "Q8_0" in capsys.readouterr().out
    assert export.run(parser.parse_args(["gguf", str(tmp_path / "nowhere")])) == 1


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda m, p: ours.export_gguf(m, None, p, format="Q5"), "one of F32, Q8_0, Q4_0; got 'Q5'"),
        (lambda m, p: ours.export_gguf(tiny_model("qwen2"), None, p), "llama with default rope; got qwen2"),
        (lambda m, p: ours.export_gguf(tiny_model("llama3-rope"), None, p), "got llama with llama3"),
        (lambda m, p: pre_tokenizer_name({"type": "Whitespace"}), "llama.cpp has a name for"),
    ],
)
def test_gguf_bad_input_states_the_rule(model, tmp_path, call, rule):
    with pytest.raises(ValueError, match=rule):
        call(model, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_rows_that_no_block_fits_are_refused(tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=40, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="multiple of 32 weights; got 40 in token_embd.weight"):
        ours.export_gguf(LlamaForCausalLM(config), None, tmp_path / "x.gguf", format="Q8_0")


def test_without_a_tokenizer_the_file_says_none():
    assert tokenizer_metadata(None) == {"tokenizer.ggml.model": "none"}
