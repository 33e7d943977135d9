"""`python -m labutils lab`: the course in JupyterLab."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from labutils.course.cli.doctor import lacks
from labutils.course.cli.environment import replace_process

HELP = "Set up what is missing, look at the machine, and open the course in JupyterLab on chapter 00."
NEEDS_ENVIRONMENT = True
ROOT = Path(__file__).resolve().parents[3]
FIRST = "notebooks/00_start_here.ipynb"
ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--no-browser", action="store_true", help="only serve, and print the address to open")
    parser.add_argument("--port", type=int, default=8888, help="port to serve on (default: 8888, or the next free one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--cuda", action="store_true", help="on Linux, set up with the CUDA build of torch")


def write_settings(folder: Path) -> None:
    """Switches off JupyterLab's question about news, the only thing here that would ask to leave the machine."""
    path = folder / "labconfig" / "page_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"disabledExtensions": {ANNOUNCEMENTS: True}}), encoding="utf-8")


def jupyter_command(args: Namespace, root: Path) -> list[str]:
    """The server: this folder, chapter 00 first, no request beyond the machine."""
    first = f"/lab/tree/{FIRST}" if (root / FIRST).exists() else "/lab"
    command = [
        *(sys.executable, "-m", "jupyterlab"),
        f"--ServerApp.root_dir={root}",
        f"--ServerApp.ip={args.host}",
        f"--ServerApp.port={args.port}",
        f"--LabApp.default_url={first}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        "--LanguageServerManager.autodetect=False",  # which would ask npm, and list what is not installed
    ]
    if args.no_browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # containers; Jupyter refuses otherwise
    return command


def run(args: Namespace) -> int:
    """Serves until the user stops it; JupyterLab takes this process over."""
    for lack in lacks(ROOT):
        print(lack)
    if not (ROOT / FIRST).exists():
        print(f"{FIRST} is missing: write it with python -m labutils build")
    if args.no_browser:
        print(f"From another computer: ssh -N -L {args.port}:127.0.0.1:{args.port} USER@THIS-MACHINE, then open the")
        print("address with 127.0.0.1 that follows.")
    settings = ROOT / "build" / "jupyter"
    write_settings(settings)
    paths = [str(settings), os.environ.get("JUPYTER_CONFIG_PATH")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    replace_process(jupyter_command(args, ROOT))
    return 0
