"""Loading a causal language model: the course's own, a local folder, or a name on the Hugging Face hub."""

import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from labutils.lab.models.checkpoint import verify_checksums
from labutils.lab.models.lablm import SHAPES
from labutils.lab.paths import DATA


class LanguageModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class LoadError(RuntimeError):
    """A model could not be loaded; the message is one sentence that says why and what to do."""


def load_model(
    name_or_path: str | Path = "lablm", *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LanguageModel:
    """Loads "lablm" or "lablm-small" (shipped in data/), a local checkpoint folder, or a hub model such as "gpt2".

    Nothing is downloaded for the course's own models and for local folders, and no remote code is ever run.

    Args:
        name_or_path: what to load.
        dtype: floating-point type of the loaded weights; LabLM is stored in bfloat16.
        device: where the weights go.

    Raises:
        LoadError: for an unreachable hub, a missing file, an architecture that is no causal LM, corrupt weights, an
            adapter without its model, or tensors that are missing, unexpected or of another shape: the library would
            fill the gaps with random numbers.
    """
    own = DATA / str(name_or_path) if str(name_or_path) in SHAPES else Path(name_or_path)
    is_local = own.is_dir() or str(name_or_path) in SHAPES or _looks_like_a_path(str(name_or_path))
    source = str(own) if is_local else str(name_or_path)
    if is_local:
        _require_local_files(own)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=is_local)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise LoadError(f"the model must be a causal language model; {source} is of type {config.model_type!r}")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=is_local)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=is_local,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; `_require_every_tensor` refuses them by name
        )
        _require_every_tensor(source, list(model.state_dict()), info)
    except LoadError:
        raise
    except SafetensorError as error:
        raise LoadError(f"the weights in {source} must be readable safetensors; they are damaged: {error}") from error
    except Exception as error:  # a file from outside makes the library raise anything
        raise LoadError(_why(source, is_local, error)) from error
    return LanguageModel(model.to(device).eval(), tokenizer)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _require_local_files(folder: Path) -> None:
    if not folder.is_dir():
        raise LoadError(f"a local model must be a folder; {folder} does not exist")
    if (folder / "adapter_config.json").is_file():
        raise LoadError(
            f"a model must be whole; {folder} holds an adapter: merge it into its base model, then save that"
        )
    if not (folder / "config.json").is_file():
        raise LoadError(f"a model folder must hold config.json; {folder} does not")
    try:
        verify_checksums(folder)
    except ValueError as error:
        raise LoadError(str(error)) from error


def _require_every_tensor(source: str, names: list[str], info: dict) -> None:
    """Refuses a checkpoint whose tensors are not the model's own.

    Args:
        source: the checkpoint.
        names: the model's tensors, in order.
        info: what the library says of its loading; it leaves out what tied weights and old buffers excuse.
    """
    missing = [name for name in names if name in info["missing_keys"]] or sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"])
    if missing:
        instead = f" (it holds {unexpected[0]}, which the model does not have)" if unexpected else ""
        raise LoadError(
            f"the weights in {source} must hold every tensor of the model; {missing[0]} is missing{instead}"
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise LoadError(f"{name} must be {tuple(wanted)} by config.json; the weights in {source} have {tuple(found)}")
    if unexpected:
        raise LoadError(f"every tensor in {source} must belong to the model; {unexpected[0]} does not")


def _why(source: str, is_local: bool, error: Exception) -> str:
    """One sentence for the learner out of the library's many."""
    first_line = str(error).strip().split("\n")[0] or type(error).__name__
    for frame, _ in traceback.walk_tb(error.__traceback__):  # fused experts: the library names the tensor only in a log
        for name in getattr(frame.f_locals.get("loading_info"), "conversion_errors", ()):
            first_line = f"the parts of {name} are not all there, or differ in shape"
    if is_local:
        return f"the model in {source} could not be loaded: {first_line}"
    offline = "connect" in str(error).lower() or "offline" in str(error).lower()
    if offline:
        return f"the hub could not be reached for {source!r}: go online, or load 'lablm', which needs no network"
    return f"the hub has no usable model {source!r} (a misspelt, private or gated name?): {first_line}"
