"""`python -m labutils assistant`: the service assistant in a browser."""

import sys
from argparse import ArgumentParser, Namespace

HELP = (
    "Open the service assistant in a browser: a chat in English and Chinese, every technique of the course a switch, "
    "with a latency badge for each answer. It runs on this machine alone, and no request leaves it."
)
NEEDS_ENVIRONMENT = True


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--port", type=int, default=8013, help="port of this machine to listen on (default: 8013)")
    parser.add_argument("--no-browser", action="store_true", help="only serve, and print the address to open")


def run(args: Namespace) -> int:
    """Serves until interrupted."""
    from labutils.course.extras import install_extra

    if not install_extra("serve"):
        return 1
    from threading import Event
    from webbrowser import open_new_tab

    from labutils.capstone.assistant import running_assistant

    try:
        with running_assistant(port=args.port) as address:
            print(f"the assistant is at {address} (Ctrl+C ends it)", flush=True)
            if not args.no_browser:
                open_new_tab(address)
            Event().wait()
    except (OSError, OverflowError) as error:  # taken, not allowed, or no port at all
        why = getattr(error, "strerror", None) or error
        print(f"labutils: port {args.port} cannot be had: {why} (try --port)", file=sys.stderr)
        return 1
