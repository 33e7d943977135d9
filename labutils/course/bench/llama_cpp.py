"""llama.cpp as a peer, on the same weights: exported by us, decoded by its own kernels."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from labutils.course.bench.subject import Subject
from labutils.lab.models.gguf import BLOCK, FORMATS, export_gguf
from labutils.measurement.threads import available_cores

INSTALL = "not installed: pip install llama-cpp-python (compiles for about a quarter of an hour)"


def llama_cpp_techniques(subject: Subject, new_tokens: int, folder: Path, technique: Callable) -> list:
    """One technique for each format of our export; without llama-cpp-python they say how to install it."""
    names = {f"llama.cpp {name}": name for name in FORMATS}
    if importlib.util.find_spec("llama_cpp") is None:
        return [technique(name, missing=INSTALL) for name in names]
    found = []
    for name, quantization in names.items():
        path = folder / f"{quantization}.gguf"
        export_gguf(subject.model, subject.tokenizer, path, format=quantization)
        bytes_per_weight = FORMATS[quantization].block_bytes / BLOCK
        if crash := why_it_crashes(path):
            found.append(technique(name, missing=crash))
            continue
        run = llama_cpp_run(path, subject.token_ids, new_tokens + 1)
        found.append(technique(name, run, bytes_per_weight=bytes_per_weight))
    return found


def why_it_crashes(path: Path) -> str:
    """Lets another process decode a token; "" if that went well, else a sentence.

    A library that dies takes the whole benchmark with it: some builds use instructions that a virtual machine lacks.
    """
    program = "import sys; from llama_cpp import Llama; Llama(sys.argv[1], n_ctx=8, verbose=False).eval([0])"
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, timeout=300, check=False)
    return f"llama.cpp's own process ends with code {result.returncode} here" if result.returncode else ""


def llama_cpp_run(path: Path, token_ids: Tensor, count: int) -> Callable[[object], Tensor]:
    """Returns a function of a clock that decodes greedily; its threads follow PyTorch's current count."""
    from llama_cpp import Llama

    prompt = token_ids[0].tolist()
    loaded: dict[int, Llama] = {}

    def run(clock) -> Tensor:
        threads = torch.get_num_threads() if torch.get_num_threads() <= available_cores() else available_cores()
        if threads not in loaded:
            settings = {"n_ctx": len(prompt) + count + 1, "n_threads": threads, "n_threads_batch": threads}
            loaded[threads] = Llama(str(path), verbose=False, **settings)
        llama = loaded[threads]
        llama.reset()
        tokens = []
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            clock.tick()
            tokens.append(token)
            if len(tokens) == count:
                return torch.tensor([prompt + tokens])
        raise RuntimeError(f"llama.cpp must make {count} tokens; got {len(tokens)}")

    return run
