"""JAX for tests: skips the module with one sentence where it is missing, and starts four simulated devices."""

import pytest

from labutils.xla import runtime

if not runtime.has_jax():
    pytest.skip("JAX is not installed: python -m labutils test installs the extra tpu", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def devices():
    """Whatever ran before in this process: JAX may have been started with one device."""
    return runtime.start(devices=4)
