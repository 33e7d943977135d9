"""The widgets under the notebook packages that Colab has installed."""

import importlib.metadata
import json
import sys

import pytest
from colab_versions import VERSIONS, make_colab_environment, run_in_colab

REPORT = """
import importlib.metadata, json, labutils
names = ("ipywidgets", "ipython", "ipykernel", "matplotlib")
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""
NOTEBOOK = """
import nbformat
from nbclient import NotebookClient
from pathlib import Path

cells = [
    "import IPython, ipykernel, ipywidgets; print(IPython.__version__, ipykernel.__version__, ipywidgets.__version__)",
    "from ipywidgets import interact; interact(lambda bits: print(2**bits), bits=(1, 8))",
    "import importlib, pkgutil, labutils.lab.widgets as widgets\\n"
    "for module in pkgutil.iter_modules(widgets.__path__, 'labutils.lab.widgets.'):\\n"
    "    importlib.import_module(module.name)",
]
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
Path("executed.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(sys.version_info >= (3, 13), reason="IPython 7, like Colab, ends with Python 3.12"),
]


@pytest.fixture(scope="module")
def colab_python(tmp_path_factory):
    return make_colab_environment(tmp_path_factory.mktemp("colab") / "environment")


def test_environment_has_colabs_versions_and_borrows_the_rest(colab_python, tmp_path):
    versions = json.loads(run_in_colab(colab_python, "-c", REPORT, cwd=tmp_path))
    assert versions == {**VERSIONS, "matplotlib": importlib.metadata.version("matplotlib")}


def test_widgets_display_in_a_kernel_with_colabs_versions(colab_python, tmp_path):
    run_in_colab(colab_python, "-c", NOTEBOOK, cwd=tmp_path)
    notebook = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))
    versions, widget = notebook["cells"][0]["outputs"], notebook["cells"][1]["outputs"]
    assert "".join(versions[0]["text"]).split() == [VERSIONS[name] for name in ("ipython", "ipykernel", "ipywidgets")]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in widget)
