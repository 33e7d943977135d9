"""Is low precision faster? The same product in four formats on this processor, and with its low-precision units off.

oneDNN, which computes PyTorch's low-precision products on a CPU, reads `ONEDNN_MAX_CPU_ISA` when it starts: with `AVX2`
it forgets AVX-512, VNNI and AMX. MKL, which computes those in float32, reads `MKL_ENABLE_INSTRUCTIONS` (and may ignore
it on processors that are not Intel's). So one machine can show about what an older one does, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from labutils.measurement.timing import Timing, measure_interleaved

UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
ROWS, SIZE = (1, 256), 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def cpu_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The processor's units for vectors and low precision, as Linux names them; empty where nobody says."""
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    return [unit for unit in UNITS if unit in flags]


def format_name(rows: int, dtype: torch.dtype) -> str:
    """How a product is called.

    >>> format_name(1, torch.bfloat16)
    '1 row, bfloat16'
    """
    return f"{rows} row{'s' * (rows > 1)}, {str(dtype).removeprefix('torch.')}"


def products(*, device: str | torch.device = "cpu", size: int = SIZE) -> dict[str, Callable[[], torch.Tensor]]:
    """X W^T for one row (decoding) and many (prefill) in each format; int8 is summed in int32, on a CPU only."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, size, generator=generator)
        for dtype in DTYPES if torch.device(device).type == "cpu" else DTYPES[:-1]:
            scale = 20 if dtype == torch.int8 else 1
            left, right = (x * scale).to(dtype).to(device), (weight * scale).to(dtype).to(device).T
            product = torch._int_mm if dtype == torch.int8 else torch.matmul
            found[format_name(rows, dtype)] = partial(product, left, right)
    return found


def time_formats(*, device: str | torch.device = "cpu", size: int = SIZE) -> dict[str, Timing]:
    """Times all products interleaved."""
    return measure_interleaved(products(device=device, size=size), warmup=1, device=device)


def time_formats_limited(isa: str = "AVX2", *, size: int = SIZE) -> dict[str, Timing]:
    """The same on the CPU in a process of its own, in which both libraries may use no more than `isa`, as many threads.

    Raises:
        RuntimeError: When the process fails; the message is its last line.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    limits = {"ONEDNN_MAX_CPU_ISA": isa, "MKL_ENABLE_INSTRUCTIONS": isa}
    environ = os.environ | limits | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "labutils.acceleration.formats", str(size), str(torch.get_num_threads())]
    done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"products in a process of their own failed: {done.stderr.strip().splitlines()[-1]}")
    return {name: Timing(name, tuple(s), 1, "cpu", n) for name, (s, n) in json.loads(done.stdout).items()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    timings = time_formats(size=int(sys.argv[1]))
    print(json.dumps({name: (timing.samples_s, timing.threads) for name, timing in timings.items()}))
