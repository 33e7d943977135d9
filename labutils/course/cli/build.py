"""`python -m labutils build`: the notebooks from their sources."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Regenerate the notebooks from notebooks/source: the learners' copies byte for byte, and the solutions, which are "
    "executed only where their code has changed."
)
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[3]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--only", default="", metavar="NAME", help="only chapters whose name holds NAME, such as 02")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything would change")
    parser.add_argument(
        "--language", default="", metavar="NAME", help="only this edition, such as zh; executes nothing"
    )
    parser.add_argument(
        "--update-catalogues",
        action="store_true",
        help="first bring notebooks/NAME/*.po up to date with the sources, and begin those of the chapters of --only",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--execute", action="store_true", help="execute every solution, changed or not")
    choice.add_argument("--no-execute", action="store_true", help="execute none; a changed solution is an error")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")


def run(args: Namespace) -> int:
    """Returns 0; 1 for errors, or for changes with --check."""
    from labutils.course.build import build, update_catalogues
    from labutils.course.summary import write_formats, write_summary
    from labutils.lab.language import languages

    root, execution = args.root.resolve(), "always" if args.execute else "never" if args.no_execute else "auto"
    options = {"only": args.only, "write": not args.check}
    updated = []
    if args.update_catalogues:
        begun = args.only if args.language else ""
        for language in [args.language] if args.language else languages():
            updated += update_catalogues(root, language, only=begun, write=not args.check)
    built = build(root, **options, execution=execution, language=args.language, say=print)
    built.changed[:0] = updated
    if not args.only and not args.language:
        built.changed.extend(write_summary(root, write=not args.check))
        built.changed.extend(write_formats(root, write=not args.check))
    for line in built.warnings:
        print(f"warning: {line}")
    for line in built.errors:
        print(f"error: {line}")
    verb = "would change" if args.check else "written"
    for path in built.changed:
        print(f"{verb}: {path.relative_to(root)}")
    print(f"{len(built.changed)} files {verb}, {len(built.errors)} errors, {len(built.warnings)} warnings")
    return 1 if built.errors or (args.check and built.changed) else 0
