"""`python -m labutils doctor`: what this machine has, how fast it is, and what anything missing costs the learner."""

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELP = "Say what this machine has, how fast it is, and what anything missing costs you."
NEEDS_ENVIRONMENT = True
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "ipywidgets", "jupyterlab")
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Lack:
    """Something that this machine is short of, and what that costs the learner."""

    what: str
    cost: str

    def __str__(self) -> str:
        return f"{self.what}: {self.cost}"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    parser.add_argument("--cuda", action="store_true", help="on Linux, set up with the CUDA build of torch")


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *((name, ctypes.c_ulonglong) for name in ("total", "free", "f3", "f4", "f5", "f6", "f7")),
    ]


def free_memory_bytes() -> int | None:
    """The memory that a program here can still have without swapping; None where the system does not say."""
    if sys.platform == "win32":
        status = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status.free
    if sys.platform == "darwin":
        output = subprocess.run(["vm_stat"], capture_output=True, encoding="utf-8", check=False).stdout
        return free_memory_bytes_from_vm_stat(output)
    from labutils.measurement.limits import memory_left_bytes

    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return memory_left_bytes()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    known = [int(found[1]) * 1024 if found else None, memory_left_bytes()]
    return min((size for size in known if size is not None), default=None)


def free_memory_bytes_from_vm_stat(output: str) -> int | None:
    """Adds up the pages that macOS can give away at once."""
    page_bytes = re.search(r"page size of (\d+) bytes", output)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", output, re.MULTILINE)
    return int(page_bytes[1]) * sum(map(int, pages)) if page_bytes and pages else None


def compiler() -> str | None:
    """The C++ compiler that torch.compile and compiled kernels would use."""
    names = [os.environ.get("CXX"), *(["cl"] if sys.platform == "win32" else ["c++", "g++", "clang++"])]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def kernels() -> tuple[str, str]:
    """The instruction set of the compiled int8 and int4 kernels and "", or "" and why there are none."""
    from labutils.quantization.kernels import find_kernels, instruction_set

    library, reason = find_kernels()
    return (instruction_set(library) if library else ""), reason


def gpu() -> str | None:
    """The first NVIDIA GPU, as the driver names it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip().partition("\n")[0] or None if result.returncode == 0 else None


def lacks(root: Path = ROOT) -> Iterator[Lack]:
    """Looks at the machine, quickly, and yields what it is short of."""
    from labutils.lab.layers.compile import torch_compile_lack
    from labutils.measurement.limits import free_disk_bytes

    memory_bytes, disk_bytes = free_memory_bytes(), free_disk_bytes(root)
    if memory_bytes is not None and memory_bytes < 3e9:
        what = f"memory, {gb(memory_bytes)} free"
        yield Lack(what, "a notebook whose first cell asks for more will crawl: close other programs")
    if disk_bytes < 2e9:
        yield Lack(f"disk, {gb(disk_bytes)} free", "exported models and compiled kernels may not fit: free some space")
    if compiler() is None:
        yield Lack("no C++ compiler", "torch.compile and compiled kernels are left out, with the reason shown")
    elif lack := torch_compile_lack():
        yield Lack(lack, "what it would compile is left out, with the reason shown")
    if why := kernels()[1]:
        cost = "quantized layers run through PyTorch's operators: the same numbers, tens of times slower, no speed-up"
        yield Lack(f"no int8 and int4 kernels ({why})", cost)
    if gpu() is None:
        yield Lack("no NVIDIA GPU", "GPU cells run on the CPU instead, where some of the gains do not appear")
    if not (root / "data" / "lablm" / "config.json").exists():
        yield Lack("no model in data/lablm", "cells that load LabLM stop: restore it with git checkout -- data")


def gb(count_bytes: float | None) -> str:
    """A number of bytes, to be read.

    >>> gb(1_640_000_000)
    '1.6 GB'
    """
    return "unknown" if count_bytes is None else f"{count_bytes / 1e9:.1f} GB"


def versions() -> Iterator[tuple[str, str]]:
    """Python and the packages that the numbers depend on."""
    yield "Python", f"{platform.python_version()} ({sys.prefix})"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    for name in PACKAGES:
        yield name, importlib.metadata.version(name)


def resources(root: Path) -> Iterator[tuple[str, str]]:
    """What there is to compute with."""
    import torch

    from labutils.measurement.limits import available_cores, free_disk_bytes

    unused = " (torch cannot use the GPU: python -m labutils doctor --cuda installs the build that can)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU" + unused * bool(gpu())
    yield "device", device
    yield "threads", f"{torch.get_num_threads()} on {available_cores()} of {os.cpu_count()} logical cores"
    yield "memory", f"{gb(free_memory_bytes())} free"
    yield "disk", f"{gb(free_disk_bytes(root))} free"
    yield "compiler", compiler() or "none"
    yield "kernels", kernels()[0] or "none"
    yield "GPU", gpu() or "none"


def speed(seconds: float) -> Iterator[tuple[str, str]]:
    """What the machine can do at best, measured here and now."""
    from labutils.measurement.roofline import measure_roofline

    roofline = measure_roofline(seconds)
    where = f"{roofline.device}, {roofline.threads} thread{'s' if roofline.threads > 1 else ''}"
    median = f"median {roofline.median_bandwidth_bytes_per_s / 1e9:.1f}"
    yield "bandwidth", f"{roofline.bandwidth_bytes_per_s / 1e9:.1f} GB/s at best, {median} ({where})"
    if roofline.doubt:
        yield "warning", roofline.doubt
    yield "arithmetic", f"{roofline.flops_per_s / 1e9:.0f} GFLOP/s ({where})"


def section(title: str, rows: Iterator[tuple[str, str]]) -> None:
    """Prints a heading and its rows, each as soon as it is known."""
    print(title)
    for name, value in rows:
        print(f"  {name:<14} {value}", flush=True)


def run(args: Namespace) -> int:
    """Prints the report; 1 where the course cannot run here, 0 otherwise."""
    section("Versions", versions())
    section("This machine", resources(ROOT))
    section(f"Measured ({args.seconds:g} s each)", speed(args.seconds))
    missing = list(lacks())
    print("What is missing, and what it costs you" if missing else "Nothing is missing.")
    for lack in missing:
        print(f"  {lack}")
    return 0
