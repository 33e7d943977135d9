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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from labutils.lab.layers.architecture import is_tied, require_layer, require_llama, require_norm
from labutils.lab.models.gguf_blocks import BLOCK, FORMATS, PackedRows, encoded, format_of
from labutils.lab.models.gguf_tokenizer import tokenizer_metadata
from labutils.lab.paths import written_whole
from labutils.quantization.packed import PackedEmbedding, PackedLinear

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def export_gguf(model: nn.Module, tokenizer, path: Path, *, format: str = "F32", name: str = "model") -> None:
    """Writes a Llama-architecture model and its tokenizer as one GGUF file.

    Matrices take the format, vectors (norms, biases) stay F32, packed layers keep their codes and name the format. The
    file gets its name when it is whole: an error leaves nothing, or the file that stood there.

    Args:
        model: a `LlamaForCausalLM`.
        tokenizer: its byte-level BPE tokenizer; None for a model that is fed token ids only.
        path: the file to write.
        format: "F32", "Q8_0" or "Q4_0".
        name: shown by llama.cpp.

    Raises:
        ValueError: for another format or architecture, a layer that was replaced, rows that are no multiple of 32,
            weights that are not finite or out of the format's range, or a tokenizer that llama.cpp would not match.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    require_llama(model.config, families=("llama",), ropes=("default",))
    tensors, name_of_type = list(named_tensors(model)), format
    for tensor_name, tensor in tensors:
        if isinstance(tensor, PackedRows):
            try:
                name_of_type = tensor.format
            except ValueError as error:
                raise ValueError(f"{tensor_name}: {error}") from error
    rows = _require_rows(dict(tensors), model.config.vocab_size)
    metadata = model_metadata(model.config, format=name_of_type, name=name) | tokenizer_metadata(tokenizer, rows=rows)
    for tensor_name, tensor in tensors:
        if tensor.ndim == 2 and tensor.shape[1] % BLOCK:
            raise ValueError(f"rows must be a multiple of {BLOCK} weights; got {tensor.shape[1]} in {tensor_name}")
    with written_whole(Path(path)) as new, open(new, "wb") as file:
        _write(file, metadata, tensors, format)


def _write(
    file: BinaryIO, metadata: dict[str, object], tensors: Sequence[tuple[str, torch.Tensor | PackedRows]], chosen: str
) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(string(key) + typed(value))
    _write_index(file, tensors, chosen)
    for name, tensor in tensors:
        _pad(file)
        file.write(encoded(name, tensor, chosen).tobytes())


def _require_rows(tensors: dict[str, torch.Tensor | PackedRows], vocab_size: int) -> int:
    """The rows of the embedding, which the head and the configuration must have too."""
    for name in {"token_embd.weight", "output.weight"} & tensors.keys():
        if tensors[name].shape[0] != vocab_size:
            raise ValueError(f"{name} must have vocab_size={vocab_size} rows; got {tensors[name].shape[0]}")
    return vocab_size


def model_metadata(config, *, format: str, name: str) -> dict[str, object]:
    """The entries that tell llama.cpp which architecture this is, and its sizes.

    Raises:
        ValueError: for another architecture or activation or scaled rotary embeddings, which this export would get
            wrong.
    """
    known = require_llama(config, families=("llama",), ropes=("default",))
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": known.layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": known.heads,
        "attention.head_count_kv": known.kv_heads,
        "attention.key_length": known.head_dim,
        "attention.value_length": known.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": known.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    general = {"general.architecture": "llama", "general.name": name, "general.file_type": FORMATS[format].file_type}
    return general | {"general.quantization_version": 2} | {f"llama.{key}": value for key, value in sizes.items()}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's names and the model's tensors, queries and keys reordered for llama.cpp's rotary embedding.

    Raises:
        ValueError: naming a layer that was replaced by another kind, or a head with a bias.
    """
    head = dict(parameters_of(getattr(model, "lm_head", None), "output"))
    if "output.bias" in head:
        raise ValueError("output must have no bias: llama.cpp adds none; got one")
    config, body = model.config, model.model
    require_layer(body.embed_tokens, "token_embd", nn.Embedding, PackedEmbedding)
    yield from parameters_of(body.embed_tokens, "token_embd")
    if not is_tied(model):
        yield from head.items()
    yield from gain_of(body.norm, "output_norm")
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield from gain_of(layer.input_layernorm, f"blk.{i}.attn_norm")
        yield from gain_of(layer.post_attention_layernorm, f"blk.{i}.ffn_norm")
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
            yield from parameters_of(linear, f"blk.{i}.{name}", heads=heads)


def gain_of(module: nn.Module, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The gain of an RMSNorm under its name.

    Raises:
        ValueError: for another kind of norm.
    """
    require_norm(module, name)
    yield f"{name}.weight", module.weight


def parameters_of(
    layer: nn.Module | None, name: str, *, heads: int | None = None
) -> Iterator[tuple[str, torch.Tensor | PackedRows]]:
    """A layer's weight and bias under its name, packed or not, reordered where it has heads.

    Raises:
        ValueError: for a layer that was replaced by another kind, naming it.
    """
    if not isinstance(layer, (nn.Embedding, PackedEmbedding)):
        require_layer(layer, name, nn.Linear, PackedLinear)

    def reorder(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if heads is None else interleave_halves(tensor, heads=heads)

    packed = getattr(layer, "packed", None)
    weight = layer.weight if packed is None else PackedRows(packed, reorder(torch.arange(packed.out_features)))
    yield f"{name}.weight", weight if packed is not None else reorder(weight)
    if getattr(layer, "bias", None) is not None:
        yield f"{name}.bias", reorder(layer.bias)


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
        stored = format_of(tensor, chosen)
        dimensions = tuple(reversed(tensor.shape))
        file.write(string(name) + struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *dimensions))
        file.write(struct.pack("<IQ", stored.tensor_type, offset))
        size = tensor.numel() * stored.block_bytes // BLOCK
        offset += size + -size % ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
