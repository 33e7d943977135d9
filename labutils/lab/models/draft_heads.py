"""Small heads on a frozen LabLM for the drafts of chapter 10: trained once, stored in data/lablm-heads."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labutils.decoding.early_exit import ExitHeads, exit_loss
from labutils.decoding.heads import LookAhead, look_ahead_loss
from labutils.lab.models.checkpoint import verify_checksums, write_checksums
from labutils.lab.models.load import LoadError, load_model
from labutils.lab.models.mixture import code_batch, dialogue_batch, padded, read_streams
from labutils.lab.models.tokenizer import role_ids
from labutils.lab.models.training import prepare
from labutils.lab.paths import DATA, written_whole
from labutils.lab.training.loop import FitPlan, Part, fit_
from labutils.lab.training.losses import LossOf

FOLDER = DATA / "lablm-heads"
# Name to: a fresh head for a model, and the loss that it learns with while the model stays as it is.
HEADS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module, nn.Module], LossOf]]] = {
    "exit": (ExitHeads, exit_loss),
    "mtp": (LookAhead, look_ahead_loss),
}


def train_head(
    name: str, *, steps: int, state_dir: Path, packages: bool = True, log: Callable[[str], None]
) -> nn.Module:
    """Trains a head of LabLM, or goes on where a killed run stopped: 1,024 tokens of code and 8 dialogues a step.

    Args:
        name: one of `HEADS`.
        steps: of the whole run.
        state_dir: where its state and the token streams lie.
        packages: whether the installed packages' source is read too.
        log: gets a line every tenth step.
    """
    model, tokenizer = load_model("lablm")
    model.requires_grad_(False)
    prepare(state_dir, model="lablm", tokenizer_from=DATA / "lablm", packages=packages)
    streams, roles = read_streams(state_dir), role_ids(tokenizer)

    def parts_of(step: int) -> list[Part]:
        code = code_batch(streams, step=step, sequences=2, length=512, seed=0)
        dialogues = dialogue_batch(streams["service"], step=step, count=8, seed=0)
        return [(code, code), padded(dialogues, pad_id=tokenizer.pad_token_id, roles=roles)]

    fresh, loss_of = HEADS[name]
    head = fresh(model)
    plan = FitPlan(steps=steps, lr=3e-3, warmup_steps=10, final_lr_share=0.02, mixed_precision=True, save_every=20)
    fit_(head, parts_of, loss_of(model, head), plan, state_path=state_dir / f"{name}.pt", log=log)
    return head


def save_head(head: nn.Module, name: str, folder: Path = FOLDER) -> None:
    """Writes a head in bfloat16, and the checksums of all heads in the folder."""
    state = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in head.state_dict().items()}
    with written_whole(folder / f"{name}.safetensors") as new:
        save_file(state, new)
    write_checksums(folder)


def load_head(name: str, model: nn.Module, folder: Path = FOLDER) -> nn.Module:
    """The stored head of that name on this model, in evaluation mode.

    Raises:
        LoadError: when there is none of that name, or its file is damaged.
    """
    path = folder / f"{name}.safetensors"
    if name not in HEADS or not path.is_file():
        raise LoadError(f"a stored head must be one of {', '.join(HEADS)} in {folder}; got {name!r}")
    try:
        verify_checksums(folder)
    except ValueError as error:
        raise LoadError(str(error)) from error
    head = HEADS[name][0](model)
    head.load_state_dict(load_file(path))
    return head.requires_grad_(False).eval()
