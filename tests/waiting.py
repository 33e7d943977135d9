"""Waiting for what another process does."""

import time

PATIENCE_S = 120


def said(path):
    """A file's text so far; it may be in the middle of being written."""
    return path.read_text().strip() if path.exists() else ""


def wait_until(condition, problem):
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, problem
        time.sleep(0.1)
