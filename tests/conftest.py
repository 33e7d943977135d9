"""While tests run, every shape that a signature of `labutils` states is checked; outside them it costs nothing.

LABUTILS_CHECK_SHAPES=0 leaves that out: whole chapters then run at a learner's speed.
"""

import gc
import importlib
import importlib.util
import os
import sys

import pytest
from aside import install_aside
from shapes import check_all

if os.environ.get("LABUTILS_CHECK_SHAPES") != "0":
    check_all()

from labutils.lab.paths import tool_cache_dir
from labutils.measurement.limits import status_bytes

os.environ.pop("LABUTILS_LANGUAGE", None)  # the tests read English hints

# The FPGA tools are compiled once, whatever folder a test calls the learner's.
os.environ.setdefault("YOWASP_CACHE_DIR", str(tool_cache_dir().resolve()))

LEFT_BEHIND = 20_000_000  # bytes
ASIDE = {
    "torchao": "torchao==0.18.0",
    "gguf": "gguf==0.19.0",
    "accelerate": "accelerate==1.15.0",
    "llguidance": "llguidance==1.9.1",
    "xgrammar": "xgrammar==0.2.9",
    "tvm_ffi": "apache-tvm-ffi==0.1.15.post2",  # xgrammar needs it
    "openai": "openai==3.57.0",
    "jiter": "jiter==0.19.0",  # openai needs it, and sniffio
    "sniffio": "sniffio==1.3.1",
    "jiwer": "jiwer==4.0.0",
    "rapidfuzz": "rapidfuzz==3.14.6",  # jiwer needs it
    "opacus": "opacus==1.6.0",
    "opt_einsum": "opt-einsum==3.4.0",  # opacus needs it
    "optuna": "optuna==5.0.0",
    "colorlog": "colorlog==6.12.0",  # optuna needs it
}


@pytest.fixture(scope="module", autouse=True)
def freed_memory_goes_back():
    """Hundreds of modules share a process: what one has freed must not stay with it.

    Looking for garbage takes half a second, so it is done after those that have left much behind.
    """
    before = status_bytes("VmRSS") or 0
    yield
    if (status_bytes("VmRSS") or 0) > before + LEFT_BEHIND:
        from labutils.quantization.packed import return_freed_memory

        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()  # of programs that were compiled for this module's shapes
        gc.collect()
        return_freed_memory()


@pytest.fixture(scope="session")
def library_aside(tmp_path_factory):
    """Imports a module of a library that only tests need, such as `library_aside("torchao.quantization.utils")`.

    They are installed aside. Where torchao stands in the environment, transformers imports it at every start, which
    takes seconds and logs warnings into learners' notebooks.
    """
    folder = tmp_path_factory.mktemp("aside")
    sys.path.append(str(folder))

    def load(name):
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            install_aside(folder, [ASIDE[package]])
            importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def fpga_tools():
    """The FPGA tools, compiled; the first call in an empty cache takes a minute. Skips where they are not installed."""
    from labutils.fpga.tools import ToolError, require_tools, warm_up

    try:
        require_tools()
    except ToolError as error:
        pytest.skip(str(error))
    warm_up()
