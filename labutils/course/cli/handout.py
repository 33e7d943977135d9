"""`python -m labutils handout`: the kit for a class, without solutions."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Write the kit that a teacher hands out: the learner's notebooks and what they need, without the solutions. "
    "In it, python -m labutils lab and python -m labutils check work as here."
)
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[3]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--only", default="", metavar="NAME", help="only chapters whose name holds NAME, such as 02")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")


def run(args: Namespace) -> int:
    """Returns 0, or 2 when the folder or the choice of chapters does not serve."""
    from labutils.course.handout import handout

    try:
        written = handout(args.root.resolve(), args.folder.resolve(), only=args.only)
    except ValueError as error:
        print(f"labutils: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {sum(path.parent.name != 'pristine' for path in written)} notebooks, without solutions")
    return 0
