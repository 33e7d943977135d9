"""`python -m labutils grade`: a folder of hand-ins into a table."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = (
    "Check every notebook below a folder, each in a process of its own with limits, and write grades.csv and "
    "summary.md. Stopped, it goes on where it was. A HAND-IN RUNS AS CODE, WITH YOUR RIGHTS: grade strangers' work "
    "as a user without rights, in a container without a network (labutils/course/grade.py has the command)."
)
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[3]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", type=Path, help="the folder of hand-ins, one file or one folder per learner")
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER/grades)")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for one cell (as in `check`)")
    parser.add_argument("--total", type=float, default=900.0, metavar="S", help="seconds for one run (900)")
    parser.add_argument("--memory", type=float, default=8.0, metavar="GIB", help="memory of one hand-in (8 GiB)")
    parser.add_argument("--jobs", type=int, default=1, help="hand-ins at a time (1)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")


def run(args: Namespace) -> int:
    """Returns 0 when every hand-in has its rows, whatever they say; 2 when there is none."""
    from labutils.course.contained import Limits
    from labutils.course.grade import Options, find_hand_ins, grade

    out = (args.out or args.folder / "grades").resolve()
    folder = args.folder.resolve()
    if not folder.is_dir() or not find_hand_ins(folder, out):
        print(f"labutils: a folder of hand-ins holds .ipynb files; got {args.folder}", file=sys.stderr)
        return 2
    print("hand-ins run as code, with your rights: see python -m labutils grade --help", flush=True)
    limits = Limits(time_s=args.total, memory_bytes=int(args.memory * 2**30))
    options = Options(args.root.resolve(), timeout_s=args.timeout, limits=limits, jobs=max(1, args.jobs))
    table = grade(folder, out, options)
    print(f"{len({row['hand_in'] for row in table})} hand-ins: {out / 'grades.csv'}, {out / 'summary.md'}")
    return 0
