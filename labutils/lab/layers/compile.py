"""Building C at first use with this machine's own compiler, kept by what made it.

A library is named by the hash of everything that made it: the source, the flags, and the macros that the compiler
defines for them, which name its version and every instruction set of this CPU. It lies in a folder that only its owner
may enter: a library that others could replace would be their code running as us.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

from labutils.lab.paths import learner_dir

# No contraction: a product and a sum fused into one rounding would differ between machines.
COMMON_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
NATIVE_FLAGS = ("-march=native", "-mcpu=native")  # x86 and most ARM compilers; other ARM compilers
COMPILE_TIMEOUT_S = 120


class KernelError(RuntimeError):
    """The kernels cannot be built or loaded here; the message is one sentence that says why."""


def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang; None where there is none."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def torch_compile_lack() -> str:
    """What `torch.compile` lacks on this machine's CPU, in words; empty where it can run.

    PyTorch 2.13 passes its own folder to the C++ compiler without quotes (`torch/_inductor/cpp_builder.py`), except on
    Windows: a space cuts the path in two.
    """
    if compiler() is None:
        return "no C compiler: install g++ or clang"
    folder = Path(importlib.util.find_spec("torch").origin).parent
    if " " in str(folder) and sys.platform != "win32":
        return f"torch.compile needs a path without a space; got {folder}: move the course to another folder"
    return ""


def compile_apart(function: Callable, **options) -> Callable:
    """`torch.compile` of a function with a code object of its own, for one model.

    Dynamo counts compilations of each *code object* and gives up after eight, all models together.
    """
    import torch

    code, names = function.__code__.replace(), function.__globals__
    copied = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copied, **options)


def cache_dir() -> Path:
    """The folder of compiled libraries, made where it is missing.

    Raises:
        KernelError: when it cannot be made, is a link, belongs to someone else, or others may enter it.
    """
    folder = learner_dir() / "kernels"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        owner, mode = found.st_uid, stat.S_IMODE(found.st_mode)
        raise KernelError(f"{folder} must be a folder of yours with mode 700; got owner {owner}, mode {mode:o}")
    return folder


def compile_c(source: str, *, flags: tuple[str, ...] = ()) -> Path:
    """Compiles C into a shared library, or finds the one that the same source, flags, compiler and CPU made before.

    Raises:
        KernelError: without a compiler, when the compiler refuses the source, or when the folder is not safe.
    """
    program = compiler()
    if program is None:
        raise KernelError("no C compiler: install gcc or clang")
    folder, flags = cache_dir(), (*COMMON_FLAGS, *flags)
    macros = _run([program, *flags, "-dM", "-E", "-x", "c", os.devnull])
    library = folder / f"{hashlib.sha256(repr((source, flags, macros)).encode()).hexdigest()[:32]}.so"
    if not library.exists():
        # Built under another name and renamed: another process sees the whole file or none.
        try:
            with tempfile.TemporaryDirectory(dir=folder) as workspace:
                text, built = Path(workspace) / "source.c", Path(workspace) / "built.so"
                text.write_text(source, encoding="utf-8")
                _run([program, *flags, str(text), "-o", str(built), "-lm"])
                os.replace(built, library)
        except OSError as error:
            raise _not_writable(folder, error) from error
    return library


def _not_writable(folder: Path, error: OSError) -> KernelError:
    words = f"compiled kernels are kept in {folder}, which must be writable"
    return KernelError(f"{words}: set LABUTILS_HOME to a folder that is; got {error.strerror or error}")


def build_c(source: str, *, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Builds for this very CPU, with OpenMP where the compiler has it, and loads the library.

    Raises:
        KernelError: when no set of flags works; the first reason.
    """
    if os.name != "posix":
        raise KernelError("kernels are built on Linux and macOS only")
    reasons = []
    for native in NATIVE_FLAGS:
        for openmp in (("-fopenmp",), ()):
            try:
                return ctypes.CDLL(str(compile_c(source, flags=(native, *openmp, *flags))))
            except (KernelError, OSError) as error:
                reasons.append(str(error))
    raise KernelError(reasons[0])


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C compiler must run; got {error}") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise KernelError(f"the C compiler must accept the source; got {(lines or ['no message'])[0]}")
    return result.stdout
