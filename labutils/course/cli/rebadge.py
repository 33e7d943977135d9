"""`python -m labutils rebadge`: point every badge and set-up cell at one's own copy of the course."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Set the repository's name everywhere: pyproject.toml, README.md, CITATION.cff, and the Colab badge and set-up "
    "cell of every notebook."
)
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[3]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("repository", metavar="OWNER/NAME", help="as in the repository's GitHub address")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")


def run(args: Namespace) -> int:
    """Returns 0, or 2 when the name is not OWNER/NAME."""
    from labutils.course.badge import rebadge

    root = args.root.resolve()
    try:
        changed = rebadge(root, args.repository)
    except ValueError as error:
        print(f"labutils: {error}", file=sys.stderr)
        return 2
    for path in changed:
        print(f"written: {path.relative_to(root).as_posix()}")
    print(f"{len(changed)} files now name {args.repository}")
    return 0
