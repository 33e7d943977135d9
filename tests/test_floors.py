"""The lowest versions that pyproject.toml names hold together, and a core of the suite runs on them.

They are installed aside, with what pip chooses for the rest. Left out: torch, whose older CPU builds are on no package
index but its own (what is tested is the version of this environment), and what the course starts but does not import.
"""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from aside import install_aside
from hand_ins import ROOT

NOT_INSTALLED = {"torch", "jupyterlab", "playwright", "ruff"}
CORE = (
    "tests/test_build.py",
    "tests/test_cache.py",
    "tests/test_check.py",
    "tests/test_checks_core.py",
    "tests/test_decode.py",
    "tests/test_exercises.py",
    "tests/test_ledger.py",
    "tests/test_load.py",
    "tests/test_quantization_affine.py",
    "tests/test_quantization_floats.py",
    "tests/test_speed_quality.py",
    "tests/test_xla_programs.py",
)
SHOW = """
import importlib, importlib.metadata, json, pkgutil, sys, labutils.lab.widgets as widgets
for module in pkgutil.iter_modules(widgets.__path__, "labutils.lab.widgets."): importlib.import_module(module.name)
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(sys.version_info >= (3, 13), reason="NumPy 2.0 has wheels up to Python 3.12"),
]


def floors() -> dict[str, str]:
    """The lowest version of each package: {"numpy": "2.0", …}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [
        *project["dependencies"],
        *project["optional-dependencies"]["lab"],
        *project["optional-dependencies"]["tpu"],
    ]
    found = dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in named)
    return {name: version for name, version in found.items() if name not in NOT_INSTALLED}


@pytest.fixture(scope="module")
def at_the_floors(tmp_path_factory):
    """Runs Python with the lowest versions and returns what it printed."""
    folder = tmp_path_factory.mktemp("floors")
    install_aside(folder, [f"{name}=={version}" for name, version in floors().items()], dependencies=True)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environ = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    environ.pop("LABUTILS_CHECK_SHAPES", None)  # checked here, whatever the tests around it leave out

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, encoding="utf-8", timeout=1500)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
        return result.stdout

    return run


def test_widgets_at_the_floors(at_the_floors):
    said = at_the_floors("-c", SHOW, *floors())
    for name, version in floors().items():
        assert re.search(rf'"{name}": "{re.escape(version)}(\.0)*"', said), (name, version, said)


def test_core_of_the_suite_at_the_floors(at_the_floors):
    said = at_the_floors("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser", *CORE)
    assert int(re.search(r"(\d+) passed", said)[1]) > 300, said[-2000:]
