"""`nbformat`, imported without a part of jsonschema that takes two seconds in every process that reads a notebook.

JupyterLab brings `rfc3987_syntax`, which builds a grammar of international addresses as it is imported. jsonschema asks
for it and does without where it is missing; the schema of notebooks has no such address.
"""

import sys

SLOW = "rfc3987_syntax"
known = sys.modules.setdefault(SLOW, None)  # None: importing it is an ImportError

import nbformat  # noqa: E402, F401

if known is None:
    del sys.modules[SLOW]
