"""An environment with Colab's old notebook packages, made cheaply beside the one that the tests run in.

Colab keeps IPython 7, ipykernel 6 and ipywidgets 7, where a fresh installation gets newer majors. Only these and what
they alone need are installed anew; everything else (torch, matplotlib, labutils …) is borrowed from this environment.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from aside import install_aside

VERSIONS = {"ipywidgets": "7.7.1", "ipython": "7.34.0", "ipykernel": "6.17.1"}
NEEDED = (
    "backcall==0.2.0",
    "decorator==5.3.1",
    "ipython-genutils==0.2.0",
    "jupyterlab-widgets==1.1.11",
    "nest-asyncio==1.6.0",
    "pickleshare==0.7.5",
    "widgetsnbextension==3.6.10",
)


def make_colab_environment(folder: Path) -> Path:
    """Makes the environment in a new folder and returns its Python; skips the test where no index can be reached."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    pins = [f"{name}=={version}" for name, version in VERSIONS.items()]
    install_aside(site, [*pins, *NEEDED])
    borrowed = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (site / "borrowed.pth").write_text(borrowed, encoding="utf-8")  # after its own folder, so that Colab's come first
    return python


def run_in_colab(python: Path, *arguments: str, cwd: Path, timeout_s: float = 600) -> str:
    """Runs Colab's Python and returns what it printed."""
    environ = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environ = {**environ, "PYTHONUTF8": "1", "MPLBACKEND": "agg"}
    result = subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environ, capture_output=True, encoding="utf-8", timeout=timeout_s
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
