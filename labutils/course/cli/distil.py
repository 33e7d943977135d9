"""`python -m labutils distil`: the runs behind chapter 05, each resumable, their curves kept in data/results."""

from argparse import ArgumentParser, Namespace

HELP = "train the students of chapter 05, with and without their teacher, resuming where a killed run stopped"
NEEDS_ENVIRONMENT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size and loss, 2 to 5")
    parser.add_argument("--only", default="", help="only runs whose name holds this, such as small-KD or half-CE-0")
    parser.add_argument("--list", action="store_true", help="say what is left to do, and train nothing")


def run(args: Namespace) -> int:
    """Trains what has no line in the results yet, then prints the table as far as it goes."""
    import sys

    from labutils.lab.models import students

    wanted = [p for p in students.points(seeds=args.seeds, steps=args.steps) if args.only in p.name]
    left = students.remaining(wanted)
    print(f"{len(wanted) - len(left)} of {len(wanted)} runs are done")
    for point in left:
        print(point.name, flush=True)
        if not args.list:
            students.run_point(point, log=lambda line: print(line, file=sys.stderr, flush=True))
    rows = [row for row in students.read_runs() if row["steps"] == args.steps]
    try:
        print("bits per byte, held out:", *students.effects(rows), sep="\n")
    except ValueError as error:
        print(f"no table yet: {error}")
    return 0
