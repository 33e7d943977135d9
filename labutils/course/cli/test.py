"""`python -m labutils test`: style, then the test suite, with its coverage."""

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labutils.course.cli.environment import NO_VENV
from labutils.course.cli.progress import run_attached

HELP = (
    "Check the style (ruff), then run the test suite. Everything else on the line is passed on to pytest, for example "
    "'-k quantize' or 'tests/test_cli.py' (paths as seen from the course's folder)."
)
NEEDS_ENVIRONMENT = True
PASSES_ON = True
ROOT = Path(__file__).resolve().parents[3]
# Run by programs of their own beside the rest, each for about as long: whole chapters and hand-ins, without the checks
# of shapes that treble the time of thousands of small steps; and two that mostly wait: for nodes that are lost and
# endless loops, for packages and a browser. What a test times it times in rounds that alternate: a neighbour blurs that
# and decides nothing.
BESIDE = (
    ({"LABUTILS_CHECK_SHAPES": "0"}, ["lanes", "grade", "handout"]),
    ({}, ["distributed_faults", "distributed_dask", "check"]),
    ({}, ["conventions_again", "floors", "packaging", "setup", "rented_gpus", "browser", "browser_assistant"]),
)
FAILED, ALONE = 1, ("--last-failed", "--no-cov")  # pytest's status where tests have failed, and how they run again
REPORTS = ("--durations", "--no-cov", "-q", "-v")  # options that choose no test: with them it is still the whole suite
# Their chapters are tested too; in an environment of one's own only where they are there.
EXTRAS = ("tpu", "fpga", "gpu", "serve", "speech", "applications", "zh")


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--fast", action="store_true", help="leave out what takes minutes: slow and browser tests")
    parser.add_argument("--cuda", action="store_true", help="on Linux, set up with the CUDA build of torch")


def pytest_command(rest: Sequence[str], *, fast: bool) -> list[str]:
    """The whole suite with doctests and coverage, unless the caller names what to run."""
    command = [sys.executable, "-m", "pytest", *(["-m", "not slow and not browser"] if fast else [])]
    if not names_tests(rest):
        command += ["--doctest-modules", "--cov=labutils", "--cov-report=term", "tests", "labutils"]
    return [*command, *rest]


def names_tests(rest: Sequence[str]) -> bool:
    """Tells whether a path or a test's name is among the arguments."""
    return any((ROOT / argument.partition("::")[0]).exists() for argument in rest if not argument.startswith("-"))


def run_whole(rest: Sequence[str], environ: dict[str, str], *, fast: bool) -> int:
    """Runs the whole suite as programs side by side: the first status but 0; what those of `BESIDE` said stands last.

    What fails beside others is run again alone, and counts if it fails again: a neighbour may have been the reason.
    """

    def command_of(number: int, *chosen: str) -> list[str]:  # each program remembers its own failures
        return [*pytest_command([*chosen, *rest], fast=fast), "-o", f"cache_dir=.pytest_cache/{number}"]

    def run_beside(program: tuple[list[str], dict[str, str]]) -> subprocess.CompletedProcess:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        return subprocess.run(program[0], cwd=ROOT, env=program[1], check=False, **pipes)

    beside = [
        (command_of(number, *(f"tests/test_{name}.py" for name in names)), environ | more)
        for number, (more, names) in enumerate(BESIDE)
    ]
    left = command_of(len(beside), *(f"--ignore=tests/test_{name}.py" for _, names in BESIDE for name in names))
    with ThreadPoolExecutor() as pool:
        ended = pool.map(run_beside, beside)  # begins at once
        statuses = [run_attached(left, cwd=ROOT, env=environ)]
        for each in ended:
            print(each.stdout, end="")
            statuses.append(each.returncode)
    for number, (command, its) in enumerate([(left, environ), *beside]):
        if statuses[number] == FAILED:
            print("labutils: what failed beside other programs is run again alone", flush=True)
            statuses[number] = run_attached([*command, *ALONE], cwd=ROOT, env=its)
    return next((status for status in statuses if status), 0)  # a program that was killed has a negative one


def one_thread_each(environ: dict[str, str]) -> dict[str, str]:
    """Two OpenMP threads on a machine whose other core is busy are many times slower than one."""
    return {"OMP_NUM_THREADS": "1", **environ}


def check_style() -> int:
    """Runs ruff over sources and notebooks; returns its worst status."""
    looks = (["check"], ["format", "--check"])
    return max(run_attached([sys.executable, "-m", "ruff", *look, "--quiet", "."], cwd=ROOT) for look in looks)


def run(args: Namespace) -> int:
    """Returns pytest's status, or that of the style check where only the style is wrong."""
    from labutils.course.extras import install_extra

    if os.environ.get(NO_VENV) != "1":
        for extra in EXTRAS:
            install_extra(extra)
    whole, environ = all(option.startswith(REPORTS) for option in args.rest), one_thread_each(dict(os.environ))
    if not whole:
        return run_attached(pytest_command(args.rest, fast=args.fast), cwd=ROOT, env=environ)
    style = check_style()
    status = run_whole(args.rest, environ, fast=args.fast)
    if style:
        print("labutils: the style check has failed: python -m ruff check --fix . && python -m ruff format .")
    return status or style
