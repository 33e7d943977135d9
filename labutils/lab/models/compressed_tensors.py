"""compressed-tensors' `pack-quantized`, the checkpoints that vLLM and transformers read: written and read.

    weight_packed      int32 (out, in · bits / 32)      a row's codes + 2^(bits − 1), lowest bits first
    weight_scale       float (out, groups)              w ≈ scale · (code − zero point)
    weight_zero_point  int32 (out · bits / 32, groups)  packed the same way, but down the *outputs*; only where needed
    weight_shape       int64 (2,)                       (out, in): a last word may hold padding

Source: https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int, Int32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from labutils.lab.layers.architecture import is_tied
from labutils.lab.models.checkpoint import write_checksums, written_aside
from labutils.lab.models.load import LoadError
from labutils.lab.training.loop import require_finite
from labutils.quantization.affine import QParams
from labutils.quantization.packing import pack, unpack

FORMAT = "pack-quantized"
Quantized = tuple[Int[Tensor, "out n"], QParams]


def to_words(codes: Int[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Signed codes in 32-bit words, a row's first code in the lowest bits.

    >>> to_words(torch.tensor([[-8, -7, 7]]), 4).tolist()  # 0, 1 and 15 in the lowest, second and third four bits
    [[3856]]
    """
    packed = pack(codes.int() + 2 ** (bits - 1), bits)
    return pad(packed, (0, -packed.shape[-1] % 4)).view(torch.int32)


def from_words(words: Int32[Tensor, "rows words"], bits: int, count: int) -> Int[Tensor, "rows count"]:
    """The first `count` signed codes of each row.

    >>> from_words(torch.tensor([[3856]], dtype=torch.int32), 4, 3).tolist()
    [[-8, -7, 7]]
    """
    rows = words.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps odd strides where an axis is 1 long
    return unpack(rows.view(torch.uint8), bits, count).int() - 2 ** (bits - 1)


def save_compressed_tensors(model: PreTrainedModel, tokenizer, folder: Path, layers: Mapping[str, Quantized]) -> None:
    """Writes a model whose named linear layers are stored as codes; everything else keeps its dtype.

    `transformers` 5.23 loads zero points only with `CompressedTensorsConfig(dequantize=True)`. vLLM 0.32 on a CPU has
    kernels for 4 bits only, in float16 and bfloat16; it takes zero points as they are.

    Args:
        model: a Hugging Face model; it stays as it is.
        tokenizer: saved beside it; None for a model that is fed token ids only.
        folder: made where it is missing; what it held stays until everything is written.
        layers: codes and parameters of each layer, as `quantize` and `choose_qparams` give them.

    Raises:
        ValueError: for a name that is no `nn.Linear` of the model, a tied head, codes of another shape, zero points
            that are no integers, or codes that need more than 8 bits.
        FloatingPointError: for a number that is none, with its tensor's name.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    head = next((n for n, m in modules.items() if is_tied(model) and m is model.get_output_embeddings()), None)
    tensors.pop(f"{head}.weight", None)  # a tied head is the embedding
    groups: dict[tuple, list[str]] = {}
    for name, (codes, qparams) in layers.items():
        layer = modules.get(name)
        if type(layer) is not nn.Linear or name == head:
            raise ValueError(f"a layer must be an untied nn.Linear of the model; got {name!r}")
        if codes.shape != layer.weight.shape:
            raise ValueError(f"{name} must have codes of shape {tuple(layer.weight.shape)}; got {tuple(codes.shape)}")
        try:
            stored, scheme = _stored(codes, qparams)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in stored.items()}
        groups.setdefault(tuple(scheme.items()), []).append(name)
    require_finite(tensors)
    with written_aside(Path(folder)) as new:
        model.config.save_pretrained(new)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config |= {"dtype": str(model.dtype).removeprefix("torch."), "quantization_config": _config(groups)}
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        write_checksums(new)


def _stored(codes: Tensor, qparams: QParams) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A layer's tensors, and the scheme that describes them."""
    out, n = codes.shape
    bits = 4 if qparams.qmin >= -8 and qparams.qmax <= 7 else 8
    if qparams.zero_point.is_floating_point():
        raise ValueError("zero points must be integers; got real numbers")
    if codes.numel() and not qparams.qmin <= codes.min() <= codes.max() <= qparams.qmax:
        raise ValueError(f"codes must lie in {qparams.qmin} … {qparams.qmax}; got {codes.min()} … {codes.max()}")
    scale, zeros = (
        t.reshape(1, 1) if t.numel() == 1 else t.reshape(out, -1) for t in (qparams.scale, qparams.zero_point)
    )
    scale, zeros = scale.expand(out, -1).contiguous(), zeros.expand(out, -1)
    stored = {"weight_packed": to_words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([out, n])}
    symmetric = not bool(zeros.any())
    if not symmetric:
        stored["weight_zero_point"] = to_words(zeros.T, bits).T.contiguous()
    strategy = "channel" if qparams.group_size is None else "group"
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    return stored, scheme | {"group_size": qparams.group_size}


def _config(groups: dict[tuple, list[str]]) -> dict[str, object]:
    rest = {"input_activations": None, "output_activations": None}
    described = [{"targets": names, "weights": dict(scheme)} | rest for scheme, names in groups.items()]
    head = {"quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed", "ignore": []}
    return head | {"config_groups": {f"group_{i}": group for i, group in enumerate(described)}}


def read_compressed_tensors(folder: Path) -> dict[str, Quantized]:
    """Codes and parameters of each packed layer, whoever wrote them; `dequantize` makes weights of them.

    Bits and groups follow from the shapes, and zero points from whether they are there.

    Raises:
        LoadError: for a missing or damaged file, another format, or an order of the inputs (`weight_g_idx`).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        form = config.get("quantization_config", {}).get("format")
        if form != FORMAT:
            raise LoadError(f"the format must be {FORMAT}; {folder} has {form!r}")
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
        return {name: _read(name, tensors) for name in names}
    except (SafetensorError, ValueError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"the packed checkpoint in {folder} could not be read: {error}") from error


def _read(name: str, tensors: dict[str, Tensor]) -> Quantized:
    if f"{name}.weight_g_idx" in tensors:
        raise LoadError(f"{name} must keep its inputs in order; it holds weight_g_idx")
    words, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    out, n = tensors[f"{name}.weight_shape"].tolist()
    bits = next((b for b in (4, 8, 2, 3, 5, 6, 7) if -(-n * b // 32) == words.shape[1]), None)
    if bits is None or words.shape[0] != out or n % scale.shape[1]:
        raise LoadError(f"{name} must fit its shape ({out}, {n}); got {tuple(words.shape)}, {tuple(scale.shape)}")
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    if f"{name}.weight_zero_point" in tensors:
        zeros = from_words(tensors[f"{name}.weight_zero_point"].T, bits, out).T.contiguous()
    group_size = None if scale.shape[1] == 1 else n // scale.shape[1]
    scale, zeros = (t if group_size is None else t[..., None] for t in (scale, zeros))
    qparams = QParams(scale, zeros, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, group_size)
    return from_words(words, bits, n).to(torch.int8), qparams
