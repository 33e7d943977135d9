"""GGUF, the file format of llama.cpp: one file with the weights, the shape of the model and its tokenizer.

    header   "GGUF", version 3, number of tensors, number of metadata entries
    metadata key, type, value          (shape of the model, tokenizer)
    index    name, dimensions, type, offset of every tensor
    data     the tensors, each at a multiple of 32 bytes

Everything is little-endian; a string is its byte count (uint64) and its UTF-8. Dimensions count from the innermost,
so a weight (out_features, in_features) is listed as [in_features, out_features].
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and, for the blocks, ggml-quants.c.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from labutils.models.gguf_tokenizer import tokenizer_metadata
from labutils.quantization.packed import PackedLinear, PackedWeight

ALIGNMENT = 32
BLOCK = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


class Format(NamedTuple):
    """How matrices are stored: ggml's tensor type, llama.cpp's file type, bytes of a row's 32 weights, encoder."""

    tensor_type: int
    file_type: int
    block_bytes: int
    encode: Callable[[np.ndarray], np.ndarray]


def encode_f32(weight: Float[np.ndarray, "*shape bytes"]) -> UInt8[np.ndarray, "*shape four_bytes"]:
    """Returns the weights' own bytes."""
    return np.ascontiguousarray(weight, dtype="<f4").view(np.uint8)


def encode_q8_0(weight: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows bytes"]:
    """Blocks of 32: a float16 scale and 32 int8, w ≈ scale · q.

    scale = max|w| / 127, q = round(w / scale), halves away from zero. 34 bytes for 32 weights: 8.5 bits each.

    >>> block = encode_q8_0(np.array([[127.0, -63.5] + [0.0] * 30], dtype=np.float32))
    >>> block[0, :2].view("<f2").item(), block[0, 2:4].view(np.int8).tolist()
    (1.0, [127, -64])
    """
    blocks = _blocks(weight)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _join(weight, scale.astype("<f2").view(np.uint8), q.view(np.uint8))


def encode_q4_0(weight: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows bytes"]:
    """Blocks of 32: a float16 scale and 32 four-bit q in 0 … 15, w ≈ scale · (q − 8).

    The weight of largest magnitude, sign kept, becomes −8: scale = w_max / −8, q = min(15, ⌊w / scale + 8.5⌋). Byte j
    holds weight j in its low half and weight j + 16 in its high half. 18 bytes for 32 weights: 4.5 bits each.

    >>> block = encode_q4_0(np.array([[-8.0, 3.0] + [0.0] * 14 + [7.0] + [0.0] * 15], dtype=np.float32))
    >>> block[0, :2].view("<f2").item(), [hex(byte) for byte in block[0, 2:5]]
    (1.0, ['0xf0', '0x8b', '0x88'])
    """
    blocks = _blocks(weight)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / np.float32(-8)
    q = np.minimum(np.trunc(blocks * _inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return _join(weight, scale.astype("<f2").view(np.uint8), q[..., :16] | (q[..., 16:] << 4))


FORMATS = {
    "F32": Format(tensor_type=0, file_type=0, block_bytes=128, encode=encode_f32),
    "Q8_0": Format(tensor_type=8, file_type=7, block_bytes=34, encode=encode_q8_0),
    "Q4_0": Format(tensor_type=2, file_type=2, block_bytes=18, encode=encode_q4_0),
}

PACKED = {8: "Q8_0", 4: "Q4_0"}  # the format that holds our symmetric codes in groups of 32


@dataclass(frozen=True)
class PackedRows:
    """A packed weight, its rows in the order in which they are to be written; stands in for a matrix."""

    weight: PackedWeight
    rows: torch.Tensor
    ndim: int = 2

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.rows), self.weight.in_features

    def numel(self) -> int:
        """Number of weights."""
        return len(self.rows) * self.weight.in_features

    @property
    def format(self) -> str:
        """The format with the same values.

        Raises:
            ValueError: where GGUF has none: other groups, zero points, or scales that float16 does not hold.
        """
        w = self.weight
        exact = torch.equal(w.scales, w.scales.half().float())
        if w.group_size != BLOCK or w.zeros is not None or not exact:
            rule = f"GGUF holds symmetric groups of {BLOCK} with scales exact in float16 (pack with half_scales=True)"
            raise ValueError(f"{rule}; got {w}, {'exact' if exact else 'inexact'} scales")
        return PACKED[w.bits]

    def encode(self) -> UInt8[np.ndarray, "rows bytes"]:
        """Our codes and scales as blocks: nothing is rounded again."""
        codes, scales, _ = self.weight.unpack(self.rows)
        codes = codes.numpy().reshape(len(self.rows), -1, BLOCK)
        scale = scales.numpy()[..., None].astype("<f2").view(np.uint8)
        if self.weight.bits == 8:
            return _join(codes, scale, codes.astype(np.int8).view(np.uint8))
        q = (codes + 8).astype(np.uint8)
        return _join(codes, scale, q[..., :16] | (q[..., 16:] << 4))


def export_gguf(model: nn.Module, tokenizer, path: Path, *, format: str = "F32", name: str = "model") -> None:
    """Writes a Llama-architecture model and its tokenizer as one GGUF file.

    Matrices take the format, vectors (norms, biases) stay F32, packed layers keep their codes and name the format.

    Args:
        model: a `LlamaForCausalLM`.
        tokenizer: its byte-level BPE tokenizer; None for a model that is fed token ids only.
        path: the file to write.
        format: "F32", "Q8_0" or "Q4_0".
        name: shown by llama.cpp.

    Raises:
        ValueError: for another format, another architecture, or rows that are no multiple of 32.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    tensors = list(named_tensors(model))
    for tensor_name, tensor in tensors:
        if isinstance(tensor, PackedRows):
            try:
                format = tensor.format
            except ValueError as error:
                raise ValueError(f"{tensor_name}: {error}") from error
    metadata = model_metadata(model.config, format=format, name=name) | tokenizer_metadata(tokenizer)
    for tensor_name, tensor in tensors:
        if tensor.ndim == 2 and tensor.shape[1] % BLOCK:
            raise ValueError(f"rows must be a multiple of {BLOCK} weights; got {tensor.shape[1]} in {tensor_name}")
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(string(key) + typed(value))
        _write_index(file, tensors, format)
        for _, tensor in tensors:
            _pad(file)
            file.write(_encoded(tensor, format).tobytes())


def model_metadata(config, *, format: str, name: str) -> dict[str, object]:
    """The entries that tell llama.cpp which architecture this is, and its sizes.

    Raises:
        ValueError: for another architecture or scaled rotary embeddings, which this export would get wrong.
    """
    rope = config.rope_parameters or {}
    if config.model_type != "llama" or rope.get("rope_type") != "default":
        raise ValueError(f"export takes llama with default rope; got {config.model_type} with {rope.get('rope_type')}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    general = {"general.architecture": "llama", "general.name": name, "general.file_type": FORMATS[format].file_type}
    return general | {"general.quantization_version": 2} | {f"llama.{key}": value for key, value in sizes.items()}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's names and the model's tensors, queries and keys reordered for llama.cpp's rotary embedding."""
    config, body = model.config, model.model
    ((_, head),) = parameters_of(model.lm_head, heads=None)
    yield "token_embd.weight", head if config.tie_word_embeddings else body.embed_tokens.weight
    if not config.tie_word_embeddings:
        yield "output.weight", head
    yield "output_norm.weight", body.norm.weight
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight
        linears = {
            "attn_q": (attention.q_proj, config.num_attention_heads),
            "attn_k": (attention.k_proj, config.num_key_value_heads),
            "attn_v": (attention.v_proj, None),
            "attn_output": (attention.o_proj, None),
            "ffn_gate": (mlp.gate_proj, None),
            "ffn_up": (mlp.up_proj, None),
            "ffn_down": (mlp.down_proj, None),
        }
        for name, (linear, heads) in linears.items():
            for kind, tensor in parameters_of(linear, heads=heads):
                yield f"blk.{i}.{name}.{kind}", tensor


def parameters_of(linear: nn.Module, *, heads: int | None) -> Iterator[tuple[str, torch.Tensor | PackedRows]]:
    """A linear layer's "weight" and "bias", packed or not, reordered where it has heads."""

    def reorder(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if heads is None else interleave_halves(tensor, heads=heads)

    if not isinstance(linear, PackedLinear):
        yield from ((kind, reorder(tensor)) for kind, tensor in linear.named_parameters())
        return
    packed = linear.packed
    yield "weight", PackedRows(packed, reorder(torch.arange(packed.out_features)))
    if linear.bias is not None:
        yield "bias", reorder(linear.bias)


def interleave_halves(tensor: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Reorders each head's rows from halves to neighbours: row i + d/2 moves next to row i.

    transformers rotates the pair (i, i + d/2), llama.cpp's Llama rotates (2i, 2i + 1). Queries and keys move alike, so
    their products stay.

    >>> interleave_halves(torch.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def string(text: str) -> bytes:
    """A GGUF string: byte count, then UTF-8.

    >>> len(string("ab")), string("ab")[-2:]
    (10, b'ab')
    """
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def typed(value: object) -> bytes:
    """A metadata value behind its type: bool, int (uint32), float (float32), str, or a list of ints or strings.

    Raises:
        TypeError: for any other type.
    """
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + string(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(string, value))
    if isinstance(value, list) and value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    raise TypeError(f"metadata holds bool, int, float, str and lists of int or str; got {value!r:.60}")


def _write_index(file: BinaryIO, tensors: Sequence[tuple[str, torch.Tensor | PackedRows]], chosen: str) -> None:
    offset = 0
    for name, tensor in tensors:
        stored = _format(tensor, chosen)
        dimensions = tuple(reversed(tensor.shape))
        file.write(string(name) + struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *dimensions))
        file.write(struct.pack("<IQ", stored.tensor_type, offset))
        size = tensor.numel() * stored.block_bytes // BLOCK
        offset += size + -size % ALIGNMENT


def _format(tensor: torch.Tensor | PackedRows, chosen: str) -> Format:
    if isinstance(tensor, PackedRows):
        return FORMATS[tensor.format]
    return FORMATS[chosen if tensor.ndim == 2 else "F32"]


def _encoded(tensor: torch.Tensor | PackedRows, chosen: str) -> UInt8[np.ndarray, "..."]:
    return tensor.encode() if isinstance(tensor, PackedRows) else _format(tensor, chosen).encode(_array(tensor))


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _blocks(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float32).reshape(len(weight), -1, BLOCK)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _join(weight: np.ndarray, scales: np.ndarray, quants: np.ndarray) -> np.ndarray:
    return np.concatenate([scales, quants], axis=-1).reshape(len(weight), -1)
