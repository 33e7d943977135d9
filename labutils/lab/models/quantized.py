"""Quantized models as a whole: fast decoding, saving and loading.

A saved model is a folder in Hugging Face's manner (config.json, model.safetensors, the tokenizer's files) whose
quantization.json names each packed layer's scheme: bits, group, zero points, sizes.
"""

import ctypes
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

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
from labutils.quantization.packed import PackedEmbedding, PackedLinear, PackedWeight, replace_packed_
from labutils.quantization.packed_steps import Arena, FewTokens, FusedPacked, arena_bytes

SCHEMES, WEIGHTS, VERSION = "quantization.json", "model.safetensors", 1
KINDS = ("codes", "scales", "zeros")


def fast_packed_llama(model: nn.Module, *, max_length: int, int8_cache: bool = False) -> FastLlama:
    """`FastLlama` on a model whose linear layers are all packed: the layers of a few tokens in one call into C.

    Where schemes differ among layers that read the same input, NumPy does what lies between the matrices. The model's
    packed weights move into one piece of memory and are shared, not copied; `load_quantized` has put them there.
    `int8_cache` rounds keys and values too.

    Raises:
        KernelError: without the C kernels; the model's own forward pass works all the same.
        ValueError: for an architecture that `FastLlama` does not know, or an int8 cache where steps in C do not fit.
    """
    library, arena = _kernels(), Arena(arena_bytes(list(packed_layers(model).values())))
    fuse = partial(FusedPacked, library, arena)
    decoder = FastLlama(model, max_length=max_length, matvec="numpy", fuse=fuse, kinds=(PackedLinear,))
    if int8_cache or FewTokens.fits(decoder):
        decoder.few_tokens = FewTokens(library, decoder, int8_cache=int8_cache)
    return decoder


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

    Weights are read once, each to where a decoder wants it, and hashed there before anything is made of them. The file
    may change or be removed afterwards.

    Raises:
        LoadError: with one sentence, when a file is missing or damaged, or when the scheme, the configuration and the
            weights do not fit one another.
    """
    folder = Path(folder)
    for name in ("config.json", SCHEMES, WEIGHTS):
        if not (folder / name).is_file():
            raise LoadError(f"a quantized model's folder must hold {name}; {folder} does not")
    try:
        try:
            described = json.loads((folder / SCHEMES).read_text(encoding="utf-8"))
            tensors, digest = _read_weights(folder / WEIGHTS, described.get("layers", ()))
        except (SafetensorError, ValueError):
            verify_checksums(folder)  # where a file was damaged, its name says more
            raise
        verify_checksums(folder, {WEIGHTS: digest})
        if described.get("version") != VERSION:
            raise LoadError(f"{SCHEMES} must be of version {VERSION}; got {described.get('version')}")
        model = _empty_model(folder, described["architecture"])
        floats = dict(linear_layers(model, with_head=True))
        for name, scheme in described["layers"].items():
            _pack_empty_(model, name, floats.get(name), scheme)
        _fill_(model, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise LoadError(f"the quantized model in {folder} could not be loaded: {error}") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    return LanguageModel(model.eval(), tokenizer)


def _read_weights(path: Path, layers: Iterable[str]) -> tuple[dict[str, torch.Tensor], str]:
    """A file's tensors and its SHA-256; packed weights lie in an arena, side by side where a decoder fuses them."""
    made = load_file(path)  # mapped, only to see where tensors lie: one behind the other, after the file's head
    made = {n: torch.empty_like(made[n], device="meta") for n in sorted(made, key=lambda name: made[name].data_ptr())}
    nbytes = [tensor.nbytes for tensor in made.values()]
    arena = Arena(sum(nbytes) + 64 * len(nbytes))
    siblings = [list(names) for _, names in groupby(layers, key=lambda name: name.rpartition(".")[0])]
    for key in [f"{name}.packed.{kind}" for names in siblings for kind in KINDS for name in names]:
        if key in made:
            made[key] = arena.take(made[key])
    made = {n: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor for n, tensor in made.items()}
    with path.open("rb") as file, ThreadPoolExecutor(1) as aside:
        digest = hashlib.sha256(file.read(path.stat().st_size - sum(nbytes)))
        for tensor in made.values():
            part = tensor.flatten().view(torch.uint8).numpy()
            file.readinto(part)
            aside.submit(digest.update, part)
    return made, digest.hexdigest()


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
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_meta and name in tensors and tensors[name].shape == buffer.shape:
            if tensors[name].dtype != buffer.dtype:
                raise LoadError(f"{name} in {WEIGHTS} must be of {buffer.dtype}; got {tensors[name].dtype}")
            model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], tensors[name])
    for name, embedding in model.named_modules():
        if isinstance(embedding, PackedEmbedding):  # whose weight is its head's
            tensors |= {f"{name}.packed.{kind}": buffer for kind, buffer in embedding.packed.named_buffers()}
    try:
        model.load_state_dict(tensors)  # a packed weight is there already: copied onto itself, it is not touched
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise LoadError(f"{WEIGHTS} must fit config.json and {SCHEMES}; {first[0].strip()[:300]}") from error
