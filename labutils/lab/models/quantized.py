"""Quantized models as a whole: fast decoding, saving and loading.

A saved model is a folder in Hugging Face's manner (config.json, model.safetensors, the tokenizer's files) whose
quantization.json names each packed layer's scheme: bits, group, zero points, sizes.
"""

import ctypes
import json
import mmap
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from labutils.generation.fast_llama import FastLlama, Linear
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.checkpoint import verify_checksums, write_checksums, written_aside
from labutils.lab.models.load import LanguageModel, LoadError
from labutils.lab.training.loop import require_finite
from labutils.quantization.kernels import KernelError, find_kernels, float_weight
from labutils.quantization.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    replace_packed_,
    return_freed_memory,
)
from labutils.quantization.packed_steps import Arena, FewTokens, FusedPacked, arena_bytes

SCHEMES, WEIGHTS, VERSION = "quantization.json", "model.safetensors", 1
MAPPED = hasattr(mmap, "MADV_DONTNEED")  # elsewhere an open file could not be removed
_IN_FILE: WeakKeyDictionary[nn.Module, dict[int, torch.Tensor]] = WeakKeyDictionary()  # by id: what is mapped, not read


def fast_packed_llama(model: nn.Module, *, max_length: int, int8_cache: bool = False) -> FastLlama:
    """`FastLlama` on a model whose linear layers are all packed: the layers of a few tokens in one call into C.

    Where schemes differ among layers that read the same input, NumPy does what lies between the matrices. The model's
    packed weights move into one piece of memory and are shared, not copied; out of a file they move matrix by
    matrix, whose pages are given back. `int8_cache` rounds keys and values too.

    Raises:
        KernelError: without the C kernels; the model's own forward pass works all the same.
        ValueError: for an architecture that `FastLlama` does not know, or an int8 cache where steps in C do not fit.
    """
    library, in_file = _kernels(), _IN_FILE.pop(model, {})
    arena = Arena(arena_bytes(list(packed_layers(model).values())))

    def fuse(*layers: PackedLinear) -> FusedPacked:
        read = [buffer for layer in layers for buffer in layer.packed.buffers() if id(buffer) in in_file]
        fused = FusedPacked(library, arena, *layers)
        _forget_pages(read)
        return_freed_memory()
        return fused

    decoder = FastLlama(model, max_length=max_length, matvec="numpy", fuse=fuse, kinds=(PackedLinear,))
    if int8_cache or FewTokens.fits(decoder):
        decoder.few_tokens = FewTokens(library, decoder, int8_cache=int8_cache)
    return decoder


def _forget_pages(tensors: list[torch.Tensor]) -> None:
    """Gives back the memory of tensors in a mapped file, of which the system can read every page again."""
    for tensor in tensors if MAPPED else []:
        first = tensor.data_ptr() + -tensor.data_ptr() % mmap.PAGESIZE
        whole_pages = max(0, tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole_pages), mmap.MADV_DONTNEED)


def fast_llama(model: nn.Module, *, max_length: int) -> FastLlama:
    """The fastest decoder of a model, packed or float32: in C where the kernels can be built.

    Raises:
        KernelError: for packed layers without the C kernels; float32 goes through NumPy and PyTorch then.
        ValueError: for an architecture that `FastLlama` does not know.
    """
    in_float = fast_float_llama if find_kernels()[0] else FastLlama
    return (fast_packed_llama if packed_layers(model) else in_float)(model, max_length=max_length)


class FloatMatrix(Linear):
    """A fused float32 matrix in an arena, where C finds it; float32 layers' own weights become views of it."""

    def __init__(self, arena: Arena, *layers: nn.Linear) -> None:
        super().__init__(*layers)
        self.weight = arena.put([layer.weight.detach().float() for layer in layers])
        self.array = self.weight.numpy()
        for layer, view in zip(layers, self.weight.split([len(layer.weight) for layer in layers]), strict=True):
            if layer.weight.dtype == torch.float32:
                layer.weight.data = view
        self.parts = [(float_weight(self.array, self.bias), None)]
        return_freed_memory()  # of the layers' own matrices


def fast_float_llama(model: nn.Module, *, max_length: int) -> FastLlama:
    """`FastLlama` in float32, all in C: what `fast_packed_llama` gains by its steps, not its weights.

    The model's float32 weights move into one piece of memory, as packed ones do, and are shared.

    Raises:
        KernelError: without the C kernels.
        ValueError: for an architecture that `FastLlama` does not know.
    """
    library = _kernels()
    nbytes = sum(4 * weight_of(layer).numel() + 64 for _, layer in linear_layers(model, with_head=True))
    decoder = FastLlama(model, max_length=max_length, fuse=partial(FloatMatrix, Arena(nbytes)))
    if FewTokens.fits(decoder):
        decoder.few_tokens = FewTokens(library, decoder)
    return decoder


def _kernels() -> ctypes.CDLL:
    library, reason = find_kernels()
    if library is None:
        raise KernelError(reason)
    return library


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def save_quantized(model: PreTrainedModel, tokenizer, folder: Path, *, method: str) -> None:
    """Writes a model with packed layers; `load_quantized` gives back the same codes and the same logits.

    Args:
        model: any Hugging Face model in which linear layers were replaced by packed ones.
        tokenizer: saved beside it; None for a model that is fed token ids only.
        folder: made where it is missing; what it held stays until everything is written.
        method: what chose the codes ("rtn", "gptq" …), for the reader.

    Raises:
        ValueError: when no layer is packed.
        FloatingPointError: for a number that is none, with its tensor's name.
    """
    layers = packed_layers(model)
    if not layers:
        raise ValueError("a quantized model must have packed layers; got none")
    # A packed embedding is its head's weight, and `.clone()` takes a layer out of memory that it shares with others.
    skipped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedEmbedding))
    tensors = {k: t.contiguous().clone() for k, t in model.state_dict().items() if not k.startswith(skipped or "\0")}
    require_finite(tensors)
    described = {name: scheme_of(layer) for name, layer in layers.items()}
    head = {"version": VERSION, "architecture": type(model).__name__, "method": method}
    with written_aside(folder) as new:
        model.config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / SCHEMES).write_text(json.dumps(head | {"layers": described}, indent=1) + "\n", encoding="utf-8")
        write_checksums(new)


def scheme_of(layer: PackedLinear) -> dict[str, int | bool | None]:
    """What must be known of a packed layer to read its bytes."""
    w = layer.packed
    sizes = {"in_features": w.in_features, "out_features": w.out_features, "bits": w.bits, "group_size": w.group_size}
    return sizes | {"with_zeros": w.zeros is not None}


def load_quantized(folder: Path) -> LanguageModel:
    """Loads what `save_quantized` wrote; the tokenizer is None where none was saved.

    Weights are not read but mapped: a page comes into memory when it is used. The file must stay as it is meanwhile; it
    may be removed. On Windows weights are read.

    Raises:
        LoadError: with one sentence, when a file is missing or damaged, or when the scheme, the configuration and the
            weights do not fit one another.
    """
    folder = Path(folder)
    for name in ("config.json", SCHEMES, WEIGHTS):
        if not (folder / name).is_file():
            raise LoadError(f"a quantized model's folder must hold {name}; {folder} does not")
    try:
        verify_checksums(folder)
        described = json.loads((folder / SCHEMES).read_text(encoding="utf-8"))
        if described.get("version") != VERSION:
            raise LoadError(f"{SCHEMES} must be of version {VERSION}; got {described.get('version')}")
        model = _empty_model(folder, described["architecture"])
        floats = dict(linear_layers(model, with_head=True))
        for name, scheme in described["layers"].items():
            _pack_empty_(model, name, floats.get(name), scheme)
        _fill_(model, load_file(folder / WEIGHTS))
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise LoadError(f"the quantized model in {folder} could not be loaded: {error}") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    return LanguageModel(model.eval(), tokenizer)


def _empty_model(folder: Path, architecture: str) -> PreTrainedModel:
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise LoadError(f"the architecture must be a model of transformers; got {architecture!r}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with no_init_weights():  # so the float matrices, about to be replaced, are reserved but never written
        model = kind(config)
    model.tie_weights()
    return model


def _pack_empty_(model: nn.Module, name: str, layer: nn.Module | None, scheme: dict) -> None:
    if layer is None:
        raise LoadError(f"{SCHEMES} names {name}, which must be a linear layer of the model; it is none")
    shape = (scheme["out_features"], scheme["in_features"])
    if tuple(weight_of(layer).shape) != shape:
        raise LoadError(f"{name} must be {tuple(weight_of(layer).shape)} by config.json; {SCHEMES} says {shape}")
    with torch.device("meta"):
        packed = PackedWeight(**scheme)
    replace_packed_(model, name, PackedLinear(packed, layer.bias))


def _fill_(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, embedding in model.named_modules():
        if isinstance(embedding, PackedEmbedding):
            head = next(n for n, layer in packed_layers(model).items() if layer.packed is embedding.packed)
            prefix = f"{head}.packed."
            shared = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            tensors |= {f"{name}.packed.{k}": t for k, t in shared.items()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name in tensors and tensors[name].shape == buffer.shape:
            if tensors[name].dtype != buffer.dtype:
                raise LoadError(f"{name} in {WEIGHTS} must be of {buffer.dtype}; got {tensors[name].dtype}")
            mapped = tensors[name] if MAPPED else tensors[name].clone()
            model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], mapped)
    try:
        model.load_state_dict(tensors)  # a packed weight is there already: copied onto itself, it is not touched
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise LoadError(f"{WEIGHTS} must fit config.json and {SCHEMES}; {first[0].strip()[:300]}") from error
    packed = {id(buffer): buffer for buffer in model.buffers()}
    _IN_FILE[model] = {id(tensor): tensor for tensor in tensors.values() if id(tensor) in packed}
    _forget_pages([tensor for tensor in tensors.values() if id(tensor) not in packed])  # copied
