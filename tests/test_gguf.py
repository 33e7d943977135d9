"""GGUF: blocks worked by hand, the file read by the reference package, the rotary order proved by products."""

import copy
import json
import struct
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from labutils.course.cli import export
from labutils.lab.models import gguf as ours
from labutils.lab.models import gguf_blocks
from labutils.lab.models.gguf_tokenizer import pre_tokenizer_name, tokenizer_metadata
from labutils.lab.models.tokenizer import SPLIT_PATTERN, train_tokenizer
from labutils.quantization.integer_linear import use_integers_
from labutils.quantization.rotation import rotate_

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
    block = gguf_blocks.encode_q8_0(row)
    assert block.shape == (1, 34)
    assert block[0, :2].view("<f2").item() == 2.0
    assert block[0, 2:6].view(np.int8).tolist() == [127, -64, 1, 2]


def test_q4_0_block_by_hand():
    row = np.zeros((1, 32), np.float32)
    row[0, 0], row[0, 1], row[0, 16], row[0, 17] = 16.0, 3.0, -16.0, -1.0  # scale 16 / -8 = -2, the first largest wins
    block = gguf_blocks.encode_q4_0(row)
    assert block.shape == (1, 18)
    assert block[0, :2].view("<f2").item() == -2.0
    # q = floor(w / -2 + 8.5): 16 -> 0, 3 -> 7, -16 -> 16.5 cut to 15, -1 -> 9
    assert block[0, 2:5].tolist() == [0 | 15 << 4, 7 | 9 << 4, 8 | 8 << 4]


def test_a_block_of_zeros_stays_zero():
    for encode in (gguf_blocks.encode_q8_0, gguf_blocks.encode_q4_0):
        block = encode(np.zeros((1, 32), np.float32))  # the scale is 0: dividing by it would leave NaN
        assert block[0, :2].view("<f2").item() == 0.0
        assert set(block[0, 2:].tolist()) <= {0, 0x88}


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(["Q8_0", "Q4_0"]), st.floats(1e-3, 1e3))
def test_blocks_equal_the_reference_package(library_aside, seed, name, spread):
    gguf = library_aside("gguf")
    weight = np.float32(spread) * weights(seed)
    kind = gguf.GGMLQuantizationType[name]
    block = gguf_blocks.FORMATS[name].encode(weight)
    assert np.array_equal(block, gguf.quants.quantize(weight, kind))
    error = np.abs(gguf.quants.dequantize(block, kind) - weight).max()
    tiny = 128 * 2.0**-25  # float16's smallest steps are 2^-24: half of one for each of 128 levels
    assert error <= np.abs(weight).max() * {"Q8_0": 0.6 / 127, "Q4_0": 1.01 / 8}[name] + tiny


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


@pytest.mark.parametrize("name", list(gguf_blocks.FORMATS))
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
    ours.export_gguf(tiny_model("llama-gqa-tied", vocab_size=len(tokenizer)), tokenizer, path)
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
        stored = (gguf_blocks.encode_q4_0 if kind == 2 else gguf_blocks.encode_f32)(array).tobytes()
        assert kind == (2 if array.ndim == 2 else 0) and offset % 32 == 0
        assert raw[start + offset : start + offset + len(stored)] == stored


def test_typed_values_by_hand():
    assert ours.typed(True) == b"\x07\0\0\0\x01"
    assert ours.typed(258) == b"\x04\0\0\0\x02\x01\0\0"
    assert ours.typed(1.0) == b"\x06\0\0\0\0\0\x80\x3f"
    assert ours.typed([1, -1]) == struct.pack("<IIQii", 9, 5, 2, 1, -1)
    with pytest.raises(TypeError, match="got None"):
        ours.typed(None)


def test_export_command_writes_a_checkpoint_folder(tmp_path, capsys, tokenizer):
    model = tiny_model("llama-untied-bias", vocab_size=len(tokenizer))
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
    no_folder = ["--output", str(output / "tiny.gguf")]  # a file stands where its folder would be
    assert export.run(parser.parse_args(["gguf", str(tmp_path / "tiny"), *no_folder])) == 1
    assert "File exists" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda m, p: ours.export_gguf(m, None, p, format="Q5"), "one of F32, Q8_0, Q4_0; got 'Q5'"),
        (lambda m, p: ours.export_gguf(tiny_model("qwen2"), None, p), "model_type must be one of llama; got qwen2"),
        (lambda m, p: ours.export_gguf(tiny_model("llama3-rope"), None, p), "rope_type must be one of default; got"),
        (lambda m, p: ours.export_gguf(tiny_model("llama-gqa-tied", hidden_act="relu"), None, p), "silu; got relu"),
        (lambda m, p: pre_tokenizer_name({"type": "Whitespace"}), "llama.cpp has a name for"),
    ],
)
def test_gguf_bad_input_states_the_rule(model, tmp_path, call, rule):
    with pytest.raises(ValueError, match=rule):
        call(model, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_rows_that_no_block_fits_are_refused(tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=40, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="multiple of 32 weights; got 40 in token_embd.weight"):
        ours.export_gguf(LlamaForCausalLM(config), None, tmp_path / "x.gguf", format="Q8_0")


def test_without_a_tokenizer_the_file_says_none():
    assert tokenizer_metadata(None) == {"tokenizer.ggml.model": "none"}


def entries(tokenizer, **settings) -> dict[str, object]:
    found = tokenizer_metadata(tokenizer, **settings)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in found.items()}


def changed(tokenizer, part: str, value):
    """A copy whose pipeline has another part."""
    other = copy.deepcopy(tokenizer)
    setattr(other.backend_tokenizer, part, value)
    return other


def around(tokenizer, template: str):
    names = [("<|endoftext|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id), ("<|pad|>", 1)]
    return changed(tokenizer, "post_processor", processors.TemplateProcessing(single=template, special_tokens=names))


@pytest.mark.parametrize(
    ("template", "added"),
    [
        ("$A", (False, False)),
        ("<|endoftext|> $A", (True, False)),
        ("$A <|end|>", (False, True)),
        ("<|endoftext|> $A <|end|>", (True, True)),
    ],
)
def test_tokens_around_a_text_are_those_the_tokenizer_adds(tokenizer, template, added):
    found = entries(around(tokenizer, template))
    assert (found["add_bos_token"], found["add_eos_token"]) == added
    assert found["bos_token_id"] == 0 and found["eos_token_id"] == 2


def splits(*more, last=None):
    known = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([*more, known, last or pre_tokenizers.ByteLevel(False, use_regex=False)])


def with_token(tokenizer, **options):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<tool>", **options)])
    return other


def with_model(tokenizer, **options):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"] |= options
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    return other


REFUSED = {
    "prefix space": (
        lambda t: changed(t, "pre_tokenizer", splits(last=pre_tokenizers.ByteLevel(True, use_regex=False))),
        "ByteLevel must have add_prefix_space=False; got True",
    ),
    "prefix space, gpt-2": (
        lambda t: changed(t, "pre_tokenizer", pre_tokenizers.ByteLevel(True)),
        "ByteLevel must have add_prefix_space=False; got True",
    ),
    "two patterns": (
        lambda t: changed(t, "pre_tokenizer", splits(last=pre_tokenizers.ByteLevel(False, use_regex=True))),
        "must have use_regex=False; got True",
    ),
    "punctuation": (lambda t: changed(t, "pre_tokenizer", splits(pre_tokenizers.Punctuation())), "has a name for"),
    "digits": (lambda t: changed(t, "pre_tokenizer", splits(pre_tokenizers.Digits())), "has a name for"),
    "metaspace": (lambda t: changed(t, "pre_tokenizer", pre_tokenizers.Metaspace()), "has a name for"),
    "no pre-tokenizer": (lambda t: changed(t, "pre_tokenizer", None), "has a name for"),
    "behaviour": (
        lambda t: changed(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="removed"),
                    pre_tokenizers.ByteLevel(False, use_regex=False),
                ]
            ),
        ),
        "Split must have behavior=Isolated; got Removed",
    ),
    "lower case": (lambda t: changed(t, "normalizer", normalizers.Lowercase()), "not normalize.*got Lowercase"),
    "NFC": (lambda t: changed(t, "normalizer", normalizers.NFC()), "not normalize.*got NFC"),
    "pad in front": (lambda t: around(t, "<|pad|> $A"), r"BOS and EOS to a text, nothing else; got \[1, "),
    "EOS in front": (lambda t: around(t, "<|end|> $A"), r"nothing else; got \[2, "),
    "BOS twice": (lambda t: around(t, "<|endoftext|> <|endoftext|> $A"), r"nothing else; got \[0, 0, "),
    "strip": (lambda t: with_token(t, lstrip=True), "added token '<tool>' must have lstrip=False; got True"),
    "word": (lambda t: with_token(t, single_word=True), "must have single_word=False; got True"),
    "dropout": (lambda t: with_model(t, dropout=0.5), "BPE must have dropout=None; got 0.5"),
    "suffix": (lambda t: with_model(t, end_of_word_suffix="</w>"), "end_of_word_suffix=None; got </w>"),
    "whole words": (lambda t: with_model(t, ignore_merges=True), "ignore_merges must be False .* qwen2; got True"),
    "no end": (lambda t: PreTrainedTokenizerFast(tokenizer_object=t.backend_tokenizer), "must have eos_token"),
}


@pytest.mark.parametrize("part", REFUSED)
def test_parts_of_a_tokenizer_that_llama_cpp_lacks_are_refused(tokenizer, model, part, tmp_path):
    change, rule = REFUSED[part]
    with pytest.raises(ValueError, match=rule):
        ours.export_gguf(tiny_model("llama-gqa-tied", vocab_size=300), change(tokenizer), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_ids_are_compared_before_the_file_is_written(tokenizer, monkeypatch):
    split = copy.deepcopy(tokenizer)
    split.split_special_tokens = True  # no part of the pipeline says so, only the ids do
    with pytest.raises(ValueError, match="must cut .*<|endoftext|>.* into the tokenizer's ids"):
        tokenizer_metadata(split)
    for name in ("Ġ", "a"):
        assert name in entries(tokenizer)["tokens"]


def test_rows_without_a_token_are_filled_and_tokens_stand_at_their_ids(tokenizer):
    count = len(tokenizer)
    found = entries(tokenizer, rows=count + 2)
    assert found["tokens"][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert found["token_type"][count:] == [5, 5] and 5 not in found["token_type"][:count]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"].append(state["added_tokens"][0] | {"id": count + 3, "content": "<tool>"})
    state["model"]["vocab"]["<tool>"] = count + 3
    gaps = copy.deepcopy(tokenizer)
    gaps._tokenizer = Tokenizer.from_str(json.dumps(state))
    found = entries(gaps, rows=count + 4)
    assert found["tokens"][-1] == "<tool>" and found["token_type"][count:] == [5, 5, 5, 3]
    with pytest.raises(ValueError, match=f"row for every token; got {count + 3} rows for id {count + 3}"):
        tokenizer_metadata(gaps, rows=count + 3)


def test_fewer_rows_than_tokens_write_no_file(tokenizer, tmp_path):
    small = tiny_model("llama-gqa-tied", vocab_size=len(tokenizer) - 1)
    with pytest.raises(ValueError, match="must have a row for every token"):
        ours.export_gguf(small, tokenizer, tmp_path / "x.gguf")
    small.lm_head = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=f"output.weight must have vocab_size={len(tokenizer) - 1} rows; got 40"):
        ours.export_gguf(small, None, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_several_chat_templates_keep_their_names(tokenizer):
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": "{{ a }}", "tool_use": "{{ b }}", "with-dash": "{{ c }}"}
    found = entries(several)
    assert found["chat_template"] == "{{ a }}" and found["chat_template.tool_use"] == "{{ b }}"
    assert found["chat_template.with_dash"] == "{{ c }}" and found["chat_templates"] == ["tool_use", "with_dash"]


@pytest.mark.parametrize("layer", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "model.norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8, 1e-9])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_0"])
def test_numbers_out_of_range_name_their_tensor(layer, value, name, tmp_path):
    model = tiny_model("llama-gqa-tied")
    weight, path = model.get_submodule(layer).weight, tmp_path / "x.gguf"
    with torch.no_grad():
        if value == 1e-9:
            weight.fill_(value)
        weight.view(-1)[5] = value
    path.write_bytes(b"before")
    called = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(layer, "blk.1.ffn_down")
    if value not in (1e8, 1e-9):
        rule = f"{called}.weight must be finite; got inf or nan"
    elif name == "F32" or weight.ndim == 1:
        ours.export_gguf(model, None, path, format=name)
        return
    else:
        rule = f"{called}.weight must have scales .* that float16 holds in {name}; got a largest weight of 1e"
    with pytest.raises(ValueError, match=rule):
        ours.export_gguf(model, None, path, format=name)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"] and path.read_bytes() == b"before"


def test_replaced_layers_are_refused_by_their_name_in_the_file(tmp_path):
    def refuses(change, rule, name="llama-gqa-tied"):
        model = tiny_model(name)
        change(model)
        with pytest.raises(ValueError, match=rule):
            ours.export_gguf(model, None, tmp_path / "x.gguf")
        assert not list(tmp_path.iterdir())

    generator = torch.Generator().manual_seed(0)
    layers = "must be nn.Linear or PackedLinear; got"
    refuses(lambda m: rotate_(m, generator=generator), f"blk.0.ffn_down {layers} Sequential")
    refuses(use_integers_, f"blk.0.attn_q {layers} IntegerLinear")
    refuses(lambda m: setattr(m, "lm_head", nn.Linear(32, 97)), "output must have no bias")
    refuses(lambda m: setattr(m, "lm_head", nn.Identity()), f"output {layers} Identity")
    refuses(lambda m: setattr(m.model, "norm", nn.LayerNorm(32)), "output_norm must be RMSNorm; got LayerNorm")
    refuses(lambda m: delattr(m, "lm_head"), f"output {layers} nothing")
    refuses(lambda m: setattr(m.model, "embed_tokens", nn.Identity()), "token_embd must be nn.Embedding or Packed")
