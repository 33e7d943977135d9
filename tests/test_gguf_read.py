"""GGUF read: blocks worked by hand, random and extreme blocks against the reference package, whole and broken files."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from labutils.lab.models.gguf import export_gguf, string, typed
from labutils.lab.models.gguf_blocks import encode_q4_0, encode_q8_0
from labutils.lab.models.gguf_read import TYPES, decode_mxfp4, decode_q4_0, decode_q4_k, decode_q6_k, read_gguf
from labutils.quantization.floats import E2M1, mxfp4_dequantize, mxfp4_quantize

BLOCKED = [kind for kind in TYPES.values() if kind.weights > 1]


def half(number):
    return list(np.array([number], "<f2").view(np.uint8))


def test_q4_0_by_hand_with_a_negative_scale():
    block = np.array([half(-0.5) + [0x0F, 0x80] + [0x88] * 14], np.uint8)
    weights = decode_q4_0(block)[0]
    assert weights[[0, 1, 16, 17, 2]].tolist() == [-3.5, 4.0, 4.0, 0.0, 0.0]  # 15 and 0 low, 0 and 8 high


def test_mxfp4_by_hand():
    block = np.array([[128] + [0x7F] + [0x21] * 15], np.uint8)  # 2^1; codes 15 and 7, then 1 and 2
    assert decode_mxfp4(block)[0, [0, 16, 1, 17]].tolist() == [-12.0, 12.0, 1.0, 2.0]


def test_mxfp4_equals_chapter_two_s():
    import torch

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    codes, exponents = mxfp4_quantize(x)
    packed = codes[:, :16] | codes[:, 16:] << 4
    block = torch.cat([exponents, packed], dim=1).numpy()
    assert np.array_equal(decode_mxfp4(block), mxfp4_dequantize(codes, exponents).numpy())
    assert E2M1.largest == 6


def test_q4_k_by_hand():
    # Scales 1 … 8 and minima 9 … 16 with the top bits set in the fifth: s₄ = 5 + 48 needs bits 6 and 7 of byte 0.
    s, m = [1, 2, 3, 4, 5 + 48, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 0]
    scales = [a | b >> 4 << 6 for a, b in zip(s[:4], s[4:], strict=True)]
    scales += [a | b >> 4 << 6 for a, b in zip(m[:4], m[4:], strict=True)]
    scales += [b & 15 | (c & 15) << 4 for b, c in zip(s[4:], m[4:], strict=True)]
    block = np.array([half(2.0) + half(0.5) + scales + [0x31] * 128], np.uint8)
    weights = decode_q4_k(block)[0].reshape(8, 32)
    for run in range(8):
        q = 3 if run % 2 else 1
        assert set(weights[run].tolist()) == {2.0 * s[run] * q - 0.5 * m[run]}


def test_q6_k_by_hand():
    low, high = [0x21] * 128, [0b11100100] * 64  # low bits 1 and 2; two high bits 0, 1, 2, 3
    block = np.array([low + high + [2] * 8 + [254] * 8 + half(0.5)], np.uint8)  # scales 2 and −2
    weights = decode_q6_k(block)[0].reshape(2, 4, 32)
    codes = [1, 1 + 16, 2 + 32, 2 + 48]
    assert [set(run.tolist()) for run in weights[0]] == [{float(q - 32)} for q in codes]
    assert [set(run.tolist()) for run in weights[1]] == [{float(32 - q)} for q in codes]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(BLOCKED), st.sampled_from(["random", "constant", "zero", "largest"]))
def test_any_bytes_decode_as_in_the_reference_package(library_aside, seed, kind, fill):
    gguf = library_aside("gguf")
    make = np.random.default_rng(seed)
    blocks = {
        "random": make.integers(0, 256, (5, kind.block_bytes)),
        "constant": np.full((2, kind.block_bytes), make.integers(0, 256)),
        "zero": np.zeros((1, kind.block_bytes)),
        "largest": np.full((1, kind.block_bytes), 255),
    }[fill].astype(np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
        read = kind.decode(blocks)
    assert (
        read.dtype == np.float32
        and np.array_equal(read.view(np.uint32), expected.view(np.uint32))
        or (np.isnan(expected).any() and np.array_equal(read, expected, equal_nan=True))
    )


@pytest.mark.parametrize("form", ["F32", "Q8_0", "Q4_0"])
def test_a_model_comes_back(tmp_path, form):
    model = tiny_model("llama-untied-bias")
    export_gguf(model, None, tmp_path / "m.gguf", format=form, name="ü")
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["general.name"] == "ü" and file.metadata["llama.block_count"] == 3
    assert file.types["output.weight"] == form and file.types["output_norm.weight"] == "F32"
    wanted = model.lm_head.weight.detach().numpy()
    encode = {"Q8_0": (encode_q8_0, 34), "Q4_0": (encode_q4_0, 18)}.get(form)
    if encode:
        kind = next(kind for kind in TYPES.values() if kind.name == form)
        wanted = kind.decode(encode[0](wanted).reshape(-1, encode[1])).reshape(wanted.shape)
    assert np.array_equal(file.tensors["output.weight"], wanted)


def test_a_file_of_the_reference_package_is_read(library_aside, tmp_path):
    gguf = library_aside("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "r.gguf"), "llama")
    writer.add_uint64("n", 2**40)
    writer.add_array("words", ["a", "世界"])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_custom_alignment(64)
    weight = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    q8 = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("half", weight.astype(np.float16))
    writer.add_tensor("eight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "r.gguf")
    assert (file.metadata["n"], file.metadata["words"], file.metadata["floats"]) == (2**40, ["a", "世界"], [0.5, 1.5])
    assert np.array_equal(file.tensors["half"], weight.astype(np.float16))
    assert np.array_equal(file.tensors["eight"], gguf.quants.dequantize(q8, gguf.GGMLQuantizationType.Q8_0))


def small_file(*, magic=b"GGUF", version=3, kind=0, dimensions=(32,), data=b"\0" * 128):
    header = magic + struct.pack("<IQQ", version, 1, 1) + string("general.alignment") + typed(32)
    index = string("w") + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, 0)
    return (header + index).ljust(-(-len(header + index) // 32) * 32, b"\0") + data


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"magic": b"GGML"}, "must begin with GGUF and version 2 or 3; got b'GGML'"),
        ({"version": 1}, "version 2 or 3; got b'GGUF', 1"),
        ({"kind": 10}, "w must be of type F32, F16, Q4_0, .*; got number 10"),
        ({"kind": 2, "dimensions": (40,)}, "Q4_0 takes rows of whole blocks of 32; w has 40"),
        ({"dimensions": (2**62,)}, "must be whole; it ends"),
        ({"dimensions": (1, 1, 1, 1, 1)}, "1 to 4 dimensions; got 5"),
    ],
)
def test_broken_files_state_the_rule(tmp_path, change, rule):
    (tmp_path / "w.gguf").write_bytes(small_file())
    assert read_gguf(tmp_path / "w.gguf").tensors["w"].tolist() == [0.0] * 32
    (tmp_path / "w.gguf").write_bytes(small_file(**change))
    with pytest.raises(ValueError, match=rule):
        read_gguf(tmp_path / "w.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = small_file()
    for length in range(len(whole)):
        (tmp_path / "w.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="must be whole"):
            read_gguf(tmp_path / "w.gguf")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("fill", [0.0, 0.1, -0.1, 65504 * 7.0, 1e-6, "one spike", "many"])
def test_blocks_written_of_constant_and_extreme_numbers_equal_the_reference_package(library_aside, name, fill):
    gguf = library_aside("gguf")
    weight = np.full((2, 64), 0.0 if isinstance(fill, str) else fill, np.float32)
    if fill == "one spike":
        weight[0, 40] = -3.0
    if fill == "many":  # enough that some lie within a float32's rounding of the next code
        weight = np.random.default_rng(0).normal(size=(4096, 1024)).astype(np.float32)
    encode = {"Q8_0": encode_q8_0, "Q4_0": encode_q4_0}[name]
    assert np.array_equal(encode(weight), gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name]))
