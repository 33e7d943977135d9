"""`python -m labutils leaderboard`: a folder of judged designs into a table."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Rank the designs of chapter 13 that a class has handed in, one JSON file each. Files are data: nothing in them is "
    "run. Rank by --judge where it counts: it measures every design anew on this machine."
)
NEEDS_ENVIRONMENT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", type=Path, help="the folder of hand-ins (*.json)")
    parser.add_argument("--judge", action="store_true", help="measure every design anew, here")


def run(args: Namespace) -> int:
    """Returns 0 for a table, 1 if the machine is too noisy to judge, 2 where there is no hand-in."""
    from labutils.capstone.budget import TooNoisy
    from labutils.capstone.leaderboard import judged_here, read_folder, table

    hand_ins, refused = read_folder(args.folder)
    for name, reason in refused.items():
        print(f"refused: {name}: {reason}", file=sys.stderr)
    if not hand_ins:
        print(f"labutils: a leaderboard needs a folder with hand-ins (*.json); got {args.folder}", file=sys.stderr)
        return 2
    try:
        print(table(judged_here(hand_ins) if args.judge else hand_ins))
    except TooNoisy as error:
        print(f"labutils: {error}", file=sys.stderr)
        return 1
    return 0
