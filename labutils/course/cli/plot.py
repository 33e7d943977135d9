"""`python -m labutils plot`: the one speed-quality plot, of the learner's ledger or of any other."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "draw all measurements of a ledger on the one speed-quality plot, and print them as a table"
NEEDS_ENVIRONMENT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--ledger", type=Path, help="the ledger to read (default: your own)")
    parser.add_argument("--task", help="draw this task's score instead of bits per byte")
    parser.add_argument("--model", help="only records of this model")
    parser.add_argument("--output", type=Path, default=Path("speed_quality.png"), help="the picture to write")


def run(args: Namespace) -> int:
    """Writes the picture; 1 with a sentence where there is nothing to draw."""
    from labutils.lab.plots import speed_quality
    from labutils.measurement import ledger

    path = args.ledger or ledger.ledger_path()
    quality = speed_quality.task_quality(args.task) if args.task else speed_quality.BITS_PER_BYTE
    records = [r for r in ledger.read(path) if args.model in (None, r.model)]
    try:
        figure = speed_quality.draw_speed_quality(records, quality=quality)
    except ValueError as error:
        print(f"labutils: {error} in {path}")
        return 1
    figure.savefig(args.output, dpi=120)
    print(speed_quality.speed_quality_table(records, quality=quality))
    print(f"{args.output}: {len(records)} records")
    return 0
