"""The command line: an overview in ten lines, one module per command, and the environment each of them needs."""

import difflib
import importlib
import importlib.util
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from labutils import __version__
from labutils.course.cli import environment

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (
    "lab",
    "test",
    "doctor",
    "check",
    "grade",
    "handout",
    "leaderboard",
    "build",
    "bench",
    "plot",
    "rebadge",
    "train",
    "distil",
    "evaluate",
    "export",
    "serve",
    "assistant",
)
OVERVIEW = (
    (("lab",), "open the course in JupyterLab; the first call sets everything up"),
    (("test",), "set up, then pass the whole test suite (--fast leaves out what takes minutes)"),
    (("doctor",), "what this machine has, how fast it is, and what anything missing costs you"),
    (("check", "leaderboard"), "check the exercises of one notebook; rank the designs of a class"),
    (("grade", "handout"), "check a folder of hand-ins into a table; make the files to hand out"),
    (("build", "rebadge"), "regenerate the notebooks; point their badges at your own copy, OWNER/NAME"),
    (("bench", "plot"), "measure and compare; draw a ledger on the one speed-quality plot"),
    (("train", "distil", "evaluate"), "train the course's own models and chapter 05's students; measure a model"),
    (("export", "serve", "assistant"), "write a model out; serve it to OpenAI's clients; chat with it in a browser"),
)


def exists(name: str) -> bool:
    """Tells whether the command's module is there."""
    return importlib.util.find_spec(f"labutils.course.cli.{name}") is not None


def overview() -> str:
    """Says in ten lines what can be done here."""
    lines = [f"labutils {__version__}, LLM inference acceleration. For details: python -m labutils COMMAND --help"]
    for names, text in OVERVIEW:
        present = [name for name in names if exists(name)]
        if present:
            lines.append(f"  {', '.join(present):<24} {text}")
    return "\n".join(lines)


def unknown(name: str) -> str:
    """Names the nearest command."""
    near = difflib.get_close_matches(name, [known for known in COMMANDS if exists(known)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"labutils: there is no command {name!r}{hint} (python -m labutils lists them all)"


def parse(name: str, module: ModuleType, argv: Sequence[str]) -> Namespace:
    """Parses a command's arguments; a command that declares `PASSES_ON = True` gets the rest as `args.rest`."""
    parser = ArgumentParser(prog=f"python -m labutils {name}", description=module.HELP, allow_abbrev=False)
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(module, "PASSES_ON", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    return args


def plain_when_not_a_terminal() -> None:
    """Asks every tool that runs below for no colour codes in CI and in pipes."""
    if os.environ.get("CI") or not sys.stdout.isatty():
        os.environ.setdefault("NO_COLOR", "1")


def run_command(name: str, argv: Sequence[str]) -> int:
    """Runs one command, inside the course's environment where it needs one."""
    module = importlib.import_module(f"labutils.course.cli.{name}")
    args = parse(name, module, argv)
    if not module.NEEDS_ENVIRONMENT:
        return module.run(args)
    environment.enter(ROOT, [name, *argv], cuda=getattr(args, "cuda", False))
    try:
        return module.run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not environment.condemn(ROOT, package):
            raise
        raise environment.SetupError(
            f"the environment has lost the package {package}: run the same command again and it is built anew"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatches; returns the exit status (0 done, 1 failed, 2 misused, 130 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    plain_when_not_a_terminal()
    sys.stdout.reconfigure(errors="replace")  # a Windows pipe may know fewer characters than a message has
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"labutils {__version__}")
        return 0
    if argv[0] not in COMMANDS or not exists(argv[0]):
        print(unknown(argv[0]), file=sys.stderr)
        return 2
    try:
        return run_command(argv[0], argv[1:])
    except environment.SetupError as error:
        print(f"labutils: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlabutils: stopped", file=sys.stderr)
        return 130
