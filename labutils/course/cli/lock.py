"""One set-up of a folder at a time. Standard library only."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from labutils.course.cli.installation import AGAIN, SetupError, say


def try_lock(file: BinaryIO) -> bool:
    """Takes the lock if nobody holds it; the system frees it when its holders end, however they end."""
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: go on as one did before there were any
    return True


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps two set-ups of one folder from running at the same time."""
    try:
        (root / "build").mkdir(exist_ok=True)
        file = (root / "build" / "environment.lock").open("ab")
    except OSError as error:
        raise SetupError(
            f"cannot write in {root} ({error.strerror}): copy the course to a folder of your own, {AGAIN}"
        ) from error
    with file:
        os.set_inheritable(file.fileno(), True)
        if not try_lock(file):
            say("Another call is setting the environment up: waiting for it.")
            while not try_lock(file):
                time.sleep(1)
        yield
