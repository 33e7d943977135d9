"""Saving a checkpoint with the SHA-256 of each of its files, and proving them when it is loaded."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHECKSUMS = "checksums.json"


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model (bf16, safetensors) and tokenizer in Hugging Face format, with checksums.json beside them."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """Records the SHA-256 of every file that loading reads."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".jinja"})
    sums = {name: sha256(folder / name) for name in names if name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(folder: Path) -> None:
    """Compares a checkpoint's files with its checksums.json; a folder without one passes.

    Raises:
        ValueError: when a recorded file is missing or differs.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    for name, expected in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {name}, which its {CHECKSUMS} records; it is missing")
        if sha256(folder / name) != expected:
            raise ValueError(f"{name} in {folder} must have SHA-256 {expected[:12]}…; it differs: get the file again")
