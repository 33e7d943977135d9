"""Saving a checkpoint with the SHA-256 of each of its files, and proving them when it is loaded."""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from labutils.lab.training.loop import require_finite

CHECKSUMS = "checksums.json"


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model (bf16, safetensors) and tokenizer in Hugging Face format, with checksums.json beside them.

    The model stays as it is; so does what the folder held, until everything is written.

    Raises:
        FloatingPointError: for a weight that is no number, named.
    """
    stored = copy.deepcopy(model).to(torch.bfloat16)
    require_finite(dict(stored.named_parameters()))
    with written_aside(folder) as new:
        stored.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_checksums(new)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write in, whose files take their places in `folder` once the block has ended well.

    An error in the block changes nothing. The checksums move first: a kill among the moves leaves a folder that
    `verify_checksums` refuses. What an earlier save recorded and this one did not write is removed.
    """
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as new:
            yield Path(new)
            written = {str(path.relative_to(new)) for path in Path(new).rglob("*") if path.is_file()}
            earlier = _recorded(folder)
            for name in sorted(written, key=lambda name: name != CHECKSUMS):
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(new) / name, folder / name)
            for name in earlier.keys() - written:
                (folder / Path(name).name).unlink(missing_ok=True)
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _recorded(folder: Path) -> dict[str, str]:
    """Names and SHA-256 in a folder's checksums.json; none without that file."""
    path = folder / CHECKSUMS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_checksums(folder: Path) -> None:
    """Records the SHA-256 of every file that loading reads."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".jinja"})
    sums = {name: sha256(folder / name) for name in names if name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Compares a checkpoint's files with its checksums.json; a folder without one passes. `known` need no reading.

    Raises:
        ValueError: when a recorded file is missing or differs.
    """
    for name, expected in _recorded(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {name}, which its {CHECKSUMS} records; it is missing")
        if ((known or {}).get(name) or sha256(folder / name)) != expected:
            raise ValueError(f"{name} in {folder} must have SHA-256 {expected[:12]}…; it differs: get the file again")
