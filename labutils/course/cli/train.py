"""`python -m labutils train`: LabLM, LabLM-small distilled from it, a head on it, or the small speech recogniser."""

import argparse
import json
import os
import sys
from pathlib import Path

HELP = (
    "train LabLM, LabLM-small distilled from it, or a head on it, resuming where a killed run stopped; or the small "
    "speech recogniser, in minutes"
)
HEADS = ("exit", "mtp")  # of labutils.lab.models.draft_heads
NEEDS_ENVIRONMENT = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", choices=("lablm", "lablm-small", *HEADS, "speech"))
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--state", type=Path, help="folder of the resumable state (default: training-state/MODEL)")
    parser.add_argument("--out", type=Path, help="folder of the finished checkpoint (default: STATE/checkpoint)")
    parser.add_argument("--tokenizer-from", type=Path, help="LabLM: take this model's tokenizer, train none")
    parser.add_argument("--init-from", type=Path, help="LabLM: start from this checkpoint's weights")
    parser.add_argument(
        "--mixed-precision", action="store_true", help="products in bfloat16: fast with AMX or a GPU, else slow"
    )
    parser.add_argument("--micro-batch", type=int, default=1024, help="tokens in one forward pass")
    parser.add_argument("--save-every", type=int, default=50, help="steps between saves and validations")
    parser.add_argument("--no-packages", action="store_true", help="train without the installed packages' source")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")


def run(args: argparse.Namespace) -> int:
    """Trains and writes the checkpoint. Under torchrun, its processes share every step's batch."""
    if args.model in HEADS:
        return train_head(args)
    if args.model == "speech":
        return train_speech(args)
    import torch.distributed as dist

    from labutils.lab.models import students, training
    from labutils.lab.models.checkpoint import save_checkpoint
    from labutils.lab.models.load import load_model
    from labutils.lab.paths import written_whole

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    state, loss_of = args.state or Path("training-state") / args.model, None
    options = {"state_dir": state, "packages": not args.no_packages}
    if args.model == "lablm-small":
        if args.tokenizer_from or args.init_from:
            raise ValueError("lablm-small begins as a pruned lablm: leave out --tokenizer-from and --init-from")
        current, loss_of = students.sibling_run(args.steps, mixed_precision=args.mixed_precision, **options)
    else:
        plan = training.TrainingPlan(model=args.model, steps=args.steps, mixed_precision=args.mixed_precision)
        start = load_model(args.init_from).model if args.init_from else None
        current = training.Run(plan, tokenizer_from=args.tokenizer_from, start=start, **options)
    training.train(
        current,
        micro_batch=args.micro_batch,
        compile_model=not args.no_compile,
        save_every=args.save_every,
        log=lambda line: print(line, file=sys.stderr, flush=True),
        loss_of=loss_of,
    )
    if training.rank() == 0:
        out = args.out or state / "checkpoint"
        save_checkpoint(current.model, current.tokenizer, out)
        lines = (json.dumps(record) for record in current.curve)
        with written_whole(out / "training_curve.jsonl") as new:
            new.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {out}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def train_head(args: argparse.Namespace) -> int:
    """Trains a head on LabLM; the options that shape a model's run do not count for it."""
    from labutils.lab.models import draft_heads

    state = args.state or Path("training-state") / "heads"
    head = draft_heads.train_head(
        args.model,
        steps=args.steps,
        state_dir=state,
        packages=not args.no_packages,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    out = args.out or state / "checkpoint"
    draft_heads.save_head(head, args.model, out)
    print(f"wrote {out}")
    return 0


def train_speech(args: argparse.Namespace) -> int:
    """Trains the recogniser of spoken queries in one go; of the options only --steps and --out count for it."""
    from labutils.lab.models import spoken

    model = spoken.train_recogniser(steps=args.steps, log=lambda line: print(line, file=sys.stderr, flush=True))
    out = args.out or Path("training-state") / "speech"
    spoken.save_recogniser(model, out)
    print(f"wrote {out}")
    return 0
