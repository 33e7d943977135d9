"""`python -m labutils build`: the notebooks from their sources."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Regenerate the notebooks from notebooks/source: the learners' copies byte for byte, and the solutions, which are "
    "executed only where their code has changed."
)
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--only", default="", metavar="NAME", help="only chapters whose name holds NAME, such as 02")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything would change")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--execute", action="store_true", help="execute every solution, changed or not")
    choice.add_argument("--no-execute", action="store_true", help="execute none; a changed solution is an error")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")


def run(args: Namespace) -> int:
    """Returns 0; 1 for errors, or for changes with --check."""
    from labutils.course.build import build
    from labutils.course.summary import write_summary

    execution = "always" if args.execute else "never" if args.no_execute else "auto"
    built = build(args.root.resolve(), only=args.only, execution=execution, write=not args.check, say=print)
    if not args.only:
        built.changed.extend(write_summary(args.root.resolve(), write=not args.check))
    for line in built.warnings:
        print(f"warning: {line}")
    for line in built.errors:
        print(f"error: {line}")
    verb = "would change" if args.check else "written"
    for path in built.changed:
        print(f"{verb}: {path.relative_to(args.root.resolve())}")
    print(f"{len(built.changed)} files {verb}, {len(built.errors)} errors, {len(built.warnings)} warnings")
    return 1 if built.errors or (args.check and built.changed) else 0
