"""While tests run, every shape that a signature of `labutils` states is checked; outside them it costs nothing."""

from jaxtyping import install_import_hook

install_import_hook("labutils", "shapes.checked")
