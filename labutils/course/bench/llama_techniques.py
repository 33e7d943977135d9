"""llama.cpp among the techniques of `bench decode`: the same weights, exported by us, in a process of its own."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from labutils.course.bench.child import Child, start
from labutils.course.bench.llama_cpp import not_installed
from labutils.course.bench.subject import Subject
from labutils.lab.models.gguf import BLOCK, FORMATS, export_gguf
from labutils.measurement.threads import available_cores


def llama_cpp_techniques(subject: Subject, new_tokens: int, stack: ExitStack, technique: Callable) -> list:
    """One technique for each format of our export, or why it is missing.

    Args:
        subject: The model.
        new_tokens: After the first.
        stack: Ends the processes and removes the files.
        technique: Makes a `Technique`.
    """
    folder, found = Path(stack.enter_context(TemporaryDirectory())), []
    for form, blocks in FORMATS.items():
        name, path = f"llama.cpp {form}", folder / f"{form}.gguf"
        try:
            if missing := not_installed("llama.cpp"):
                raise RuntimeError(missing)
            export_gguf(subject.model, subject.tokenizer, path, format=form)
            child = start("llama", {"path": str(path), "fork": "llama.cpp", "threads": 1}, 1, stack)
        except RuntimeError as error:
            found.append(technique(name, missing=str(error)))
            continue
        run = partial(_decode, child, subject.token_ids, new_tokens + 1)
        found.append(technique(name, run, bytes_per_weight=blocks.block_bytes / BLOCK))
    return found


def _decode(child: Child, token_ids: Tensor, count: int, clock) -> Tensor:
    """Decodes with as many threads as PyTorch has here now; the child's times are of the same clock."""
    threads = min(torch.get_num_threads(), available_cores())
    prompts = token_ids.tolist()
    answer = child.ask({"do": "timed", "prompts": prompts, "count": count, "threads": threads})
    clock.ticks[:] = answer["ticks"]
    return torch.tensor([prompts[0] + answer["tokens"][0]])
