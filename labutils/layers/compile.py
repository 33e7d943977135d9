"""C kernels compiled on first use and kept by content: another source, flag, compiler or processor compiles anew."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from labutils.paths import learner_dir

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-shared", "-std=c11")


class CompilerMissing(RuntimeError):
    """No C compiler, or one that refuses; the message says what to do."""


@functools.cache
def compiled(source: Path) -> ctypes.CDLL:
    """Returns the shared library of a C file, compiled with the system's C compiler for this processor.

    Raises:
        CompilerMissing: when there is no compiler or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompilerMissing("the C kernels need a C compiler: install gcc (Linux) or Xcode's tools (macOS)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\0".join([source.read_text(encoding="utf-8"), *FLAGS, version])
    library = learner_dir() / "kernels" / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilerMissing(f"{Path(compiler).name} could not compile {source.name}: {done.stderr.strip()[:300]}")
        os.replace(unfinished, library)
    return ctypes.CDLL(str(library))
