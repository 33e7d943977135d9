"""Building and loading the C kernels: compiled at first use by this machine's own compiler, then kept.

A library is named by the hash of everything that made it: the source, the flags, and the macros that the compiler
defines for them, which name its version and every instruction set of this CPU. It lies in a folder that only its owner
may enter: a library that others could replace would be their code running as us.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

from labutils.paths import learner_dir

SOURCE = Path(__file__).with_suffix(".c")
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


def cache_dir() -> Path:
    """The folder of compiled libraries, made where it is missing.

    Raises:
        KernelError: when it is a link, belongs to someone else, or others may enter it.
    """
    folder = learner_dir() / "kernels"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
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
        with tempfile.TemporaryDirectory(dir=folder) as workspace:
            text, built = Path(workspace) / "source.c", Path(workspace) / "built.so"
            text.write_text(source, encoding="utf-8")
            _run([program, *flags, str(text), "-o", str(built), "-lm"])
            os.replace(built, library)
    return library


class Weight(ctypes.Structure):
    """`Weight` of kernels.c: where a packed weight's arrays lie, and its sizes."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")] + [
        (name, ctypes.c_int64) for name in ("in_features", "out_features", "padded", "group", "block", "bits")
    ]


def load_library(path: Path) -> ctypes.CDLL:
    """Loads a build of kernels.c and declares its functions."""
    library = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.packed_linear.argtypes = (ctypes.POINTER(Weight), pointer, pointer, count, count)
    return library


def instruction_set(library: ctypes.CDLL) -> str:
    """What a build of kernels.c uses: "AVX2", "AVX2 with VNNI", "NEON with dot products" or "plain C"."""
    return ctypes.c_char_p.in_dll(library, "instruction_set").value.decode()


@functools.cache
def find_kernels() -> tuple[ctypes.CDLL | None, str]:
    """The kernels for this machine and "", or None and the sentence that says why there are none.

    Without OpenMP (Apple's compiler has none) they run in one thread.
    """
    if os.name != "posix":
        return None, "kernels are built on Linux and macOS only"
    source, reason = SOURCE.read_text(encoding="utf-8"), ""
    for native in ((flag,) for flag in NATIVE_FLAGS):
        for openmp in (("-fopenmp",), ()):
            try:
                return load_library(compile_c(source, flags=(*native, *openmp))), ""
            except (KernelError, OSError) as error:
                reason = reason or str(error)
    return None, reason


def call_packed_linear(library: ctypes.CDLL, weight: Weight, x: int, y: int, tokens: int) -> None:
    """Y = x W^T + b by address, with as many threads as PyTorch has.

    Raises:
        MemoryError: when there is no room for the activations' codes.
    """
    if library.packed_linear(weight, x, y, tokens, torch.get_num_threads()):
        raise MemoryError(f"no memory for the codes of {tokens} tokens")


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
