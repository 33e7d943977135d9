"""The teacher's answers on disk: computed once, read by every student, with the size known beforehand."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from labutils.distillation.sparse import SparseTargets, top_k
from labutils.lab.paths import written_whole

ID_BYTES, PROB_BYTES = 4, 2  # int32 and float16


def stored_bytes(tokens: int, *, k: int) -> int:
    """Bytes of the k likeliest tokens and their probabilities at so many positions (without a file's head, about 1 kB).

    >>> stored_bytes(1_000_000, k=32) / 1e6  # MB; all 4096 logits in float16 would take 8192
    192.0
    """
    return tokens * k * (ID_BYTES + PROB_BYTES)


class TeacherCache:
    """Asks the teacher about a batch once, and the disk from then on; a killed run loses one batch at most.

    A file's name is made from the ids in it, so order does not matter and a batch can never get another's answers.

    Args:
        folder: where the answers lie; it belongs to one teacher and one k.
        teacher: a causal LM in evaluation mode.
        k: tokens kept at each position.
        tokens: how many positions will be stored in all; announced, and refused when the disk has no room.

    Raises:
        ValueError: when the folder holds another teacher's answers, or the disk is too small.
    """

    def __init__(self, folder: Path, teacher: nn.Module, *, k: int, tokens: int) -> None:
        self.folder, self.teacher, self.k = folder, teacher, k
        self.announced_bytes = stored_bytes(tokens, k=k)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if self.announced_bytes > free:
            raise ValueError(f"the answers need {self.announced_bytes / 1e6:.0f} MB; got {free / 1e6:.0f} MB of disk")
        owner, path = {"teacher": fingerprint(teacher), "k": k}, folder / "owner.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != owner:
            raise ValueError(f"a folder holds one teacher's answers at one k; got {owner} in {folder.name}")
        with written_whole(path) as new:
            new.write_text(json.dumps(owner), encoding="utf-8")

    def __call__(self, ids: Int[Tensor, "sequences tokens"]) -> SparseTargets:
        """Targets at every position but the last."""
        shape = torch.tensor(ids.shape).numpy().tobytes()
        path = self.folder / f"{hashlib.sha256(shape + ids.cpu().numpy().tobytes()).hexdigest()[:32]}.pt"
        if not path.is_file():
            self._ask(ids, path)
        stored = torch.load(path, weights_only=True)
        return SparseTargets(stored["ids"].long(), stored["probs"].float())

    @torch.no_grad()
    def _ask(self, ids: Tensor, path: Path) -> None:
        targets = top_k(self.teacher(input_ids=ids, use_cache=False).logits[:, :-1], self.k).to("cpu")
        with written_whole(path) as new:
            torch.save({"ids": targets.ids.int(), "probs": targets.probs.half()}, new)

    @property
    def used_bytes(self) -> int:
        """What the answers take now."""
        return sum(path.stat().st_size for path in self.folder.glob("*.pt"))


def fingerprint(model: nn.Module) -> str:
    """A few letters that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
