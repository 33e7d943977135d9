"""The training loop: parts that add up to one step, a learning rate over time, a state on disk, a stop at NaN.

What a step reads must depend on the step's number alone; then a run that was killed continues as if nothing had been.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from labutils.lab.paths import written_whole
from labutils.lab.training.losses import LossOf, counted, text_first

# Ids, labels and, where rows are padded on the left, the tokenizer's attention mask; each (sequences, tokens).
Part = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
Record = dict[str, float]


def _silent(_line: str) -> None:
    """Says nothing."""


@dataclass
class TrainingState:
    """What a run is between two steps."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    curve: list[Record] = field(default_factory=list)

    def write(self, path: Path, *, plan: dict) -> None:
        """Writes everything that decides how the run goes on; a kill in the middle leaves the older file.

        Raises:
            FloatingPointError: when a weight or an optimizer's state is no number; the older file stays.
        """
        self.require_finite()
        state = {
            "plan": plan,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "curve": self.curve,
            "random": torch.get_rng_state(),
        }
        with written_whole(path) as new:
            torch.save(state, new)

    def restore_(self, saved: dict) -> None:
        """Takes over what `torch.load` read of such a file, torch's own random state included (dropout needs it)."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.curve = saved["step"], saved["curve"]
        torch.set_rng_state(saved["random"].cpu())

    def require_finite(self) -> None:
        """Raises FloatingPointError with the name of a weight, or of its optimizer's state, that is no number."""
        require_finite(dict(self.model.named_parameters()))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in (item for optimizer in self.optimizers for item in optimizer.state.items()):
            name = names.get(parameter, "a parameter")
            require_finite({f"{key} of {name}": t for key, t in state.items() if isinstance(t, Tensor)})

    def update_(self, loss: float, learning_rates: Sequence[float], *, max_grad_norm: float | None = None) -> None:
        """One step of every optimizer on the gradients that lie ready.

        Args:
            loss: of the step, in nats per token.
            learning_rates: one for each optimizer, of its first parameter group; the others keep their ratio to it.
            max_grad_norm: where the gradients together are longer, they are scaled down to it.

        Raises:
            FloatingPointError: when the loss or a gradient is no number; weights and the file on disk are then as
                before the step.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss must be a number; got {loss} at step {self.step + 1}")
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        # In float32: squares of float16 gradients overflow at 256.
        norm = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in trained]).norm()
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient's norm must be a number; got {norm} at step {self.step + 1}")
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
        for optimizer, lr in zip(self.optimizers, learning_rates, strict=True):
            set_learning_rate_(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuses a tensor with NaN or infinity in it.

    Raises:
        FloatingPointError: with its name.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"every number of {name} must be finite; {(~tensor.isfinite()).sum()} are not")


def set_learning_rate_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives the first parameter group this rate and each other one its share, in the ratio that they began with.

    >>> a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 1.0}])
    >>> set_learning_rate_(optimizer, 0.05)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.05, 0.5]

    Raises:
        ValueError: when the first group began with 0, to which nothing has a ratio.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # as torch's own schedulers keep it
    first = optimizer.param_groups[0]["initial_lr"]
    if first == 0 and len(optimizer.param_groups) > 1:
        raise ValueError("the first parameter group must begin with a rate above 0, as the others follow it; got 0")
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["initial_lr"] / first if first else 1.0)


def targets_in(parts: Sequence[Part]) -> int:
    """How many labels count."""
    return sum(int(counted(text_first(*part)[1]).sum()) for part in parts)


def backward(
    parts: Sequence[Part], loss_of: LossOf, *, tokens: int, device: torch.device | str, mixed_precision: bool = False
) -> float:
    """Adds up the gradients of the parts' losses, each weighted by its labels, and returns their sum in nats.

    Gradient accumulation: Σ_parts (labels in the part ÷ `tokens`) · mean loss of the part is the mean over all labels,
    however they were cut; a part without one is left out. Mixed precision runs the products in bfloat16, whose range
    needs no loss scaling.

    Args:
        parts: ids, labels and perhaps an attention mask, which the loss then gets as well.
        loss_of: the mean over the labels that count.
        tokens: how many labels count in the whole step.
        device: where the model is.
        mixed_precision: see above.

    Raises:
        ValueError: when no label of the step counts.
    """
    if tokens < 1:
        raise ValueError("a step needs at least one label that counts; got none")
    nats = 0.0
    kind = torch.device(device).type
    for part in parts:
        count = targets_in([part])
        if count == 0:
            continue
        with torch.autocast(kind, dtype=torch.bfloat16) if mixed_precision else nullcontext():
            loss = loss_of(*(tensor.to(device) for tensor in part))
        (loss * (count / tokens)).backward()
        nats += loss.item() * count
    return nats


def run_steps(
    state: TrainingState,
    train_step: Callable[[], Record],
    *,
    steps: int,
    save: Callable[[], None],
    save_every: int,
    evaluate: Callable[[], Record] = dict,
    log: Callable[[str], None] = _silent,
) -> None:
    """Steps up to `steps`; every `save_every` steps and at the end it evaluates and saves; it logs every tenth.

    Args:
        state: its step decides where the run begins.
        train_step: one optimizer step; what it returns goes into the curve.
        steps: of the whole run.
        save: writes the state.
        save_every: steps.
        evaluate: more for the curve, at each save.
        log: gets a line with the record, the rate and the time left.
    """
    started, first = time.monotonic(), state.step
    while state.step < steps:
        numbers = train_step()
        record, done = {"step": state.step} | numbers, state.step == steps
        is_due = done or state.step % save_every == 0
        if is_due:
            record |= evaluate()
        state.curve.append(record)
        if is_due:
            save()
        if done or state.step % 10 == 0:
            seconds = (time.monotonic() - started) / (state.step - first)
            left = seconds * (steps - state.step) / 60
            log(f"{json.dumps(record)} {seconds:.2f} s a step, {left:.0f} min left")


@dataclass(frozen=True)
class FitPlan:
    """How `fit_` trains: AdamW, a warm-up, then a cosine down to a share of the learning rate."""

    steps: int
    lr: float
    warmup_steps: int = 0
    final_lr_share: float = 1.0  # of lr, one step after the last; 1 keeps it constant
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    mixed_precision: bool = False
    save_every: int = 100  # steps

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then half a cosine (Loshchilov and Hutter 2016).

        >>> plan = FitPlan(steps=12, lr=1.0, warmup_steps=2, final_lr_share=0.0)
        >>> [round(plan.lr_at(step), 3) for step in (0, 1, 6, 11)]
        [0.5, 1.0, 0.571, 0.02]
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps + 1) / (self.steps - self.warmup_steps + 1)
        return self.lr * (self.final_lr_share + (1 - self.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2)


def fit_(
    model: nn.Module,
    parts_of: Callable[[int], Sequence[Part]],
    loss_of: LossOf,
    plan: FitPlan,
    *,
    state_path: Path | None = None,
    after_step: Callable[[], None] | None = None,
    log: Callable[[str], None] = _silent,
) -> list[float]:
    """Trains what requires a gradient, and leaves the model in evaluation mode.

    Args:
        model: a module whose parameters the loss depends on.
        parts_of: a step's number to its parts; their gradients add up (see `backward`).
        loss_of: ids and labels (and the mask, where a part has one) to the mean loss over the labels that count.
        plan: steps and learning rates.
        state_path: where the state is kept; a run that finds one goes on from it.
        after_step: called after each step, such as to put pruned zeros back.
        log: gets a line every tenth step.

    Returns:
        The loss of every step, in nats per token, those before a resumption included.

    Raises:
        FloatingPointError: when a loss, a gradient or a weight is no number; the state on disk is the last good one.
        ValueError: when the state on disk belongs to another plan, no label of a step counts, or the weights are
            float16, in which the ε of AdamW (1e-8) is 0.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype == torch.float16 for p in trained):
        raise ValueError("trained weights must be float32 or bfloat16; got float16: load them with dtype=torch.float32")
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=plan.weight_decay)
    state, device = TrainingState(model, [optimizer]), trained[0].device
    if state_path is not None and state_path.is_file():
        _resume_(state, state_path, plan, device)

    def train_step() -> Record:
        parts = parts_of(state.step)
        tokens = targets_in(parts)
        nats = backward(parts, loss_of, tokens=tokens, device=device, mixed_precision=plan.mixed_precision)
        state.update_(nats / tokens, [plan.lr_at(state.step)], max_grad_norm=plan.max_grad_norm)
        if after_step is not None:
            after_step()
        return {"nats_per_token": nats / tokens}

    def save() -> None:
        state.require_finite()
        if state_path is not None:
            state.write(state_path, plan=asdict(plan))

    model.train()
    optimizer.zero_grad(set_to_none=True)  # what an interrupted step or another loss left behind
    try:
        run_steps(state, train_step, steps=plan.steps, save=save, save_every=plan.save_every, log=log)
    finally:
        model.eval()
    return [record["nats_per_token"] for record in state.curve]


def _resume_(state: TrainingState, path: Path, plan: FitPlan, device: torch.device) -> None:
    saved = torch.load(path, map_location=device, weights_only=True)
    if saved["plan"] != asdict(plan):
        raise ValueError(f"a saved run continues under its own plan; got {asdict(plan)} after {saved['plan']}")
    state.restore_(saved)
