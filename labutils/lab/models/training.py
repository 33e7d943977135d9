"""The program that trains LabLM: resumable after a kill, on one CPU thread, several processes or a GPU.

Muon for the weight matrices, AdamW for embeddings and norms; the learning rate warms up, stays, and falls linearly to
zero (warm-up-stable-decay, Hu et al. 2024, arXiv:2404.06395); towards the end sequences get longer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from labutils.lab.data import corpus
from labutils.lab.models.evaluate_text import bits_per_byte
from labutils.lab.models.lablm import SHAPES, llama_config
from labutils.lab.models.mixture import (
    code_batch,
    dialogue_batch,
    has_streams,
    padded,
    read_streams,
    sources,
    tokenizer_sample,
    write_streams,
)
from labutils.lab.models.optimizer import Muon
from labutils.lab.models.tokenizer import role_ids, train_tokenizer
from labutils.lab.training.loop import Part, Record, TrainingState, backward, run_steps, targets_in
from labutils.lab.training.losses import LossOf, text_loss


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides a run's trajectory."""

    model: str
    steps: int
    code_tokens: int = 2048  # in one optimizer step
    dialogues: int = 96  # in one optimizer step
    sequence_length: int = 512  # tokens
    long_sequence_length: int = 1024  # tokens, towards the end
    long_fraction: float = 0.3  # of the steps have long sequences
    muon_lr: float = 0.006
    adam_lr: float = 0.0015
    weight_decay: float = 0.1  # of the matrices
    warmup_steps: int = 40
    decay_fraction: float = 0.9  # of the steps: the learning rate falls linearly to zero
    practise_copying: bool = True  # see mixture.code_batch
    mixed_precision: bool = False  # products in bfloat16: fast with AMX or on a GPU, very slow on older CPUs
    seed: int = 0

    def is_decay(self, step: int) -> bool:
        """Whether the learning rate is falling at this step."""
        return step >= self.steps * (1 - self.decay_fraction)

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied by at a step (counted from 0).

        >>> plan = TrainingPlan(model="lablm", steps=100, warmup_steps=10, decay_fraction=0.5)
        >>> [plan.lr_factor(step) for step in (0, 9, 49, 75)]
        [0.1, 1.0, 1.0, 0.5]
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return min(warmup, (self.steps - step) / (self.steps * self.decay_fraction))

    def shape_of_code(self, step: int) -> tuple[int, int]:
        """(sequences, tokens in each) of a step's code."""
        is_long = step >= self.steps * (1 - self.long_fraction)
        length = self.long_sequence_length if is_long else self.sequence_length
        return self.code_tokens // length, length


def prepare(folder: Path, *, model: str, tokenizer_from: Path | None = None, packages: bool = True) -> None:
    """Writes what a run reads, once: the tokenizer (another model's, or a new one) and the token streams."""
    folder.mkdir(parents=True, exist_ok=True)
    if has_streams(folder):
        return
    texts = sources(packages=packages)
    if tokenizer_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_from)
    else:
        shape = SHAPES[model]
        sample = tokenizer_sample(texts)
        tokenizer = train_tokenizer(sample, vocab_size=shape.vocab_size, max_positions=shape.max_positions)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_streams(texts, tokenizer, folder)


def new_model(plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model; what writes into the residual stream begins at zero."""
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(llama_config(SHAPES[plan.model], tokenizer))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def optimizers(model: LlamaForCausalLM, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon on the decoder's matrices, AdamW on everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=plan.muon_lr, weight_decay=plan.weight_decay), adam]


class Run(TrainingState):
    """One training run: model, optimizers, step and curve, with its state on disk."""

    def __init__(
        self,
        plan: TrainingPlan,
        *,
        state_dir: Path,
        packages: bool = True,
        tokenizer_from: Path | None = None,
        start: LlamaForCausalLM | None = None,
        data_dir: Path | None = None,
    ):
        data_dir = data_dir or state_dir  # runs that read the same share one
        state_dir.mkdir(parents=True, exist_ok=True)
        self.plan, self.state_path = plan, state_dir / "state.pt"
        if rank() == 0:
            prepare(data_dir, model=plan.model, tokenizer_from=tokenizer_from, packages=packages)
        if dist.is_initialized():
            dist.barrier()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / "tokenizer")
        self.streams = read_streams(data_dir)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = (start or new_model(plan, self.tokenizer)).to(self.device)
        super().__init__(model, optimizers(model, plan))
        if self.state_path.is_file():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        saved_plan = TrainingPlan(**state["plan"])
        on_plateau = not saved_plan.is_decay(state["step"]) and not self.plan.is_decay(state["step"])
        if replace(saved_plan, steps=self.plan.steps if on_plateau else saved_plan.steps) != self.plan:
            raise ValueError(
                "a saved run continues under its own plan, of which only steps may change, and only before the decay; "
                f"got {self.plan} after {saved_plan}"
            )
        self.restore_(state)

    def save(self) -> None:
        """Writes the whole state."""
        self.write(self.state_path, plan=asdict(self.plan))

    def train_step(self, code_loss: LossOf, dialogue_loss: LossOf, micro_batch: int) -> tuple[float, float]:
        """One optimizer step on this step's batch, shared among ranks; returns nats per token of code and dialogues."""
        code, dialogues = self._my_parts(micro_batch)
        tokens = self._over_ranks(targets_in(code + dialogues))
        losses = []
        for loss_of, parts in ((code_loss, code), (dialogue_loss, dialogues)):
            nats = backward(
                parts, loss_of, tokens=tokens, device=self.device, mixed_precision=self.plan.mixed_precision
            )
            losses.append(nats / max(targets_in(parts), 1))
        self._add_gradients()
        factor = self.plan.lr_factor(self.step)
        self.update_(sum(losses), [self.plan.muon_lr * factor, self.plan.adam_lr * factor])
        return losses[0], losses[1]

    def _my_parts(self, micro_batch: int) -> tuple[list[Part], list[Part]]:
        """This rank's (ids, labels), in parts of about `micro_batch` tokens: code, then dialogues."""
        plan, mine = self.plan, slice(rank(), None, world_size())
        sequences, length = plan.shape_of_code(self.step)
        code = code_batch(
            self.streams,
            step=self.step,
            sequences=sequences,
            length=length,
            seed=plan.seed,
            practise_copying=plan.practise_copying,
        )
        code_parts = [(ids, ids) for ids in code[mine].split(max(1, micro_batch // length))]
        chosen = dialogue_batch(self.streams["service"], step=self.step, count=plan.dialogues, seed=plan.seed)[mine]
        half = (len(chosen) + 1) // 2
        pad_id, roles = self.tokenizer.pad_token_id, role_ids(self.tokenizer)
        parts = [part for part in (chosen[:half], chosen[half:]) if part]
        dialogue_parts = [padded(part, pad_id=pad_id, roles=roles) for part in parts]
        return code_parts, dialogue_parts

    def _over_ranks(self, count: int) -> int:
        """Sum of the ranks' counts."""
        if world_size() == 1:
            return count
        total = torch.tensor(count)
        dist.all_reduce(total)
        return int(total)

    def _add_gradients(self) -> None:
        """Sums of the gradients over the ranks, in one message; a rank without a label that counts adds zeros."""
        if world_size() == 1:
            return
        params = [p for p in self.model.parameters() if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)

    def validation_bits_per_byte(self, limit_bytes: int) -> float:
        """Bits per byte on the beginnings of the validation modules."""
        documents = corpus.stdlib_documents("validation")
        share = limit_bytes // len(documents)
        short = [corpus.Document(d.name, d.text[:share]) for d in documents]
        self.model.eval()
        bits = bits_per_byte(self.model, self.tokenizer, short, context=1024)
        self.model.train()
        return bits


def train(
    run: Run,
    *,
    micro_batch: int,
    compile_model: bool,
    save_every: int,
    log: Callable[[str], None],
    loss_of: LossOf | None = None,
) -> None:
    """Trains to the plan's last step, saving, validating and reporting on the way.

    Args:
        run: where it stands.
        micro_batch: tokens in one forward pass.
        compile_model: whether to compile the loss of code, whose batches have one shape.
        save_every: steps between saves and validations.
        log: gets a line every tenth step, from the first rank.
        loss_of: ids and labels to nats per token; by default the text's own next token (see `distillation.recipe`).
    """
    loss_of = loss_of or text_loss(run.model)
    compiled = torch.compile(loss_of, dynamic=False) if compile_model else loss_of  # dialogues differ in length

    def train_step() -> Record:
        code, dialogues = run.train_step(compiled, loss_of, micro_batch)
        return {"code_nats_per_token": round(code, 4), "dialogue_nats_per_token": round(dialogues, 4)}

    run.model.train()
    run_steps(
        run,
        train_step,
        steps=run.plan.steps,
        save=run.save if rank() == 0 else lambda: None,
        save_every=save_every,
        evaluate=lambda: {"validation_bits_per_byte": round(run.validation_bits_per_byte(60_000), 4)},
        log=log if rank() == 0 else lambda line: None,
    )


def rank() -> int:
    """This process' number among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1
