"""Other libraries' conventions, observed again on the packages: minutes, most of them pip's and a compiler's."""

from importlib.metadata import version

import pytest
from formats_of_others import PINS, observe

from labutils.quantization.conventions import observed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("library", observed())
def test_the_library_still_does_it(library, tmp_path):
    stored = observed()[library]
    if not PINS[library] and (here := version(library).partition("+")[0]) != stored["version"]:
        pytest.skip(f"observed with {library} {stored['version']}; here is {here}")
    assert observe(library, tmp_path) == stored
