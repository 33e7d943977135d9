"""While tests run, every shape that a signature of `labutils` states is checked; outside them it costs nothing."""

import importlib
import importlib.util
import sys

import pytest
from jaxtyping import install_import_hook

install_import_hook("labutils", "shapes.checked")

TORCHAO = "torchao==0.18.0"


@pytest.fixture(scope="session")
def torchao(tmp_path_factory):
    """Imports a module of torchao by name, such as `torchao("quantization.quant_primitives")`.

    torchao is installed aside: where it stands in the environment, transformers imports it at every start, which takes
    seconds and logs warnings into learners' notebooks.
    """
    if importlib.util.find_spec("torchao") is None:
        from aside import install_aside

        folder = tmp_path_factory.mktemp("torchao")
        install_aside(folder, [TORCHAO])
        sys.path.append(str(folder))
    return lambda name: importlib.import_module(f"torchao.{name}")
