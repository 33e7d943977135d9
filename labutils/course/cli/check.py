"""`python -m labutils check`: a verdict on each exercise of one notebook."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Check the exercises of one notebook: right, wrong (with a hint), blank, syntax error, endless loop, killed "
    "kernel, missing or doubled. The notebook is only read; what runs are its EXERCISE cells in a copy of the chapter. "
    "Exit status: 0 all right, 1 not all, 2 not a notebook of this course."
)
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[3]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("notebook", type=Path, help="the learner's notebook, from JupyterLab or Colab")
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="seconds for one cell (as long as its chapter allows)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")


def run(args: Namespace) -> int:
    """Returns 0, 1 or 2, as the help says."""
    from labutils.course.check import as_text, check_notebook
    from labutils.course.hand_in import UnusableError
    from labutils.lab.paths import readable

    name = readable(Path(args.notebook.name))
    print(f"checking {name}: runs the whole chapter with your answers ...", flush=True)
    try:
        report = check_notebook(args.notebook, args.root.resolve(), timeout_s=args.timeout)
    except UnusableError as error:
        print(f"labutils: {error}", file=sys.stderr)
        return 2
    print(as_text(report, name))
    return 0 if report.is_right else 1
