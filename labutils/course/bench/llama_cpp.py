"""llama.cpp and its fork ik_llama.cpp as peers: their C interface, called on weights that we have exported.

Through its server, llama.cpp shares the cores with the server's threads. Here a step is one `llama_decode` and an
argmax in a process that does nothing else. Parameters are a structure that the library fills with its defaults; the
fields that we set lie where `FORKS` says, and must hold the defaults named there, so another build is refused.
Source: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

import ctypes
import importlib.util
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Field = tuple[int, str, int]  # offset in bytes, `struct` format, default
PAGE = 256  # positions by which caches grow
SIZES = (("n_ctx", 512), ("n_batch", 2048), ("n_ubatch", 512), ("n_seq_max", 1))


class Pointer(ctypes.c_void_p):
    """An address that stays one: of its own class, so that ctypes passes all its bits on."""


@dataclass(frozen=True)
class Fork:
    """A wheel, and where its library keeps what we set.

    Attributes:
        library: The file among the installed packages.
        sizes_at: Where `SIZES` begin among the context's parameters.
        flash: Flash attention, there.
        repack: Whether weights are reordered for this CPU when they are loaded, among the model's parameters.
        clear: Forgets all that was read.
        flash_for_many: Whether flash attention takes several sequences; ik_llama.cpp 0.1.5 ends its process there.
    """

    wheel: str
    library: str
    sizes_at: int
    flash: Field
    repack: Field
    clear: Callable[[ctypes.CDLL, Pointer], None]
    flash_for_many: bool


FORKS = {
    "llama.cpp": Fork(
        "xllamacpp==2026.10.11549",
        "xllamacpp/xllamacpp.abi3.so",
        0,
        (52, "i", -1),
        (74, "?", True),
        lambda library, context: library.llama_memory_clear(library.llama_get_memory(context), True),
        True,
    ),
    "ik_llama.cpp": Fork(
        "ik-llama-cpp-python==0.1.5",
        "ik_llama_cpp/lib/libllama.so",
        4,
        (143, "?", True),
        (156, "?", False),
        lambda library, context: library.llama_kv_cache_clear(context),
        False,
    ),
}


class Parameters(ctypes.Structure):
    """Room for any of the structures of parameters, which are passed and returned by value."""

    _fields_ = (("bytes", ctypes.c_uint8 * 512),)

    def set(self, field: Field, value: int) -> None:
        """Changes a field, after a look at what stands there.

        Raises:
            RuntimeError: If that is not the default.
        """
        offset, form, default = field
        found = struct.unpack_from(form, self.bytes, offset)[0]
        if found != default:
            raise RuntimeError(f"the field at byte {offset} must hold {default}, as in the known build; got {found}")
        struct.pack_into(form, self.bytes, offset, value)


class Batch(ctypes.Structure):
    """Tokens to read: id, position and sequence of each, and whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("unused", ctypes.c_int32 * 4),
    )


class Llama:
    """A GGUF file in memory.

    Args:
        path: The file.
        fork: A name of `FORKS`.
        threads: Of all steps.
        repack: Whether weights are reordered for this CPU when they are loaded.

    Raises:
        RuntimeError: For another build of the library, or a file that it refuses.
    """

    def __init__(self, path: str, *, fork: str, threads: int, repack: bool = True) -> None:
        self.fork, self.threads = FORKS[fork], threads
        self.library = _library(self.fork)
        parameters = self.library.llama_model_default_params()
        parameters.set(self.fork.repack, repack)
        self.model = self.library.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"{fork} must be able to read {path}; it refuses")
        self.vocab = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple[int, int], Pointer] = {}

    def generate(self, prompts: Sequence[list[int]], count: int) -> tuple[list[float], list[list[int]]]:
        """Greedy decoding of prompts of one length, all together.

        Returns:
            `time.perf_counter` at the beginning and when each token of all prompts was there; the new tokens by prompt.

        Raises:
            RuntimeError: If a step fails.
        """
        rows, length = len(prompts), len(prompts[0])
        context = self._context(rows, -(-(length + count) // PAGE) * PAGE)
        batch = self.library.llama_batch_init(rows * length, 0, 1)
        tokens, places = (np.ctypeslib.as_array(p, (rows * length,)) for p in (batch.token, batch.pos))
        ticks, made = [time.perf_counter()], np.empty((count, rows), np.int32)
        tokens[:], places[:] = np.concatenate(prompts), np.tile(np.arange(length), rows)
        self._mark(batch, rows, length)
        for step in range(count):
            if step:
                tokens[:rows], places[:rows] = made[step - 1], length + step - 1
            if step == 1:
                self._mark(batch, rows, 1)
            if code := self.library.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode must return 0; got {code}")
            logits = (ctypes.c_float * (rows * self.vocab)).from_address(self.library.llama_get_logits(context).value)
            made[step] = np.frombuffer(logits, np.float32).reshape(rows, -1).argmax(1)
            ticks.append(time.perf_counter())
        self.library.llama_batch_free(batch)
        return ticks, made.T.tolist()

    def _context(self, rows: int, positions: int) -> Pointer:
        """A cache for so many sequences, empty; made once, outside of what is timed."""
        if (rows, positions) not in self.contexts:
            parameters = self.library.llama_context_default_params()
            values = (rows * positions, max(2048, rows * positions), 512, rows)
            for place, ((_, default), value) in enumerate(zip(SIZES, values, strict=True)):
                parameters.set((self.fork.sizes_at + 4 * place, "I", default), value)
            parameters.set(self.fork.flash, rows == 1 or self.fork.flash_for_many)
            self.contexts[rows, positions] = self.library.llama_init_from_model(self.model, parameters)
        context = self.contexts[rows, positions]
        if not context:
            raise RuntimeError(f"there must be room for {rows} sequences of {positions} positions; it is refused")
        self.library.llama_set_n_threads(context, self.threads, self.threads)
        self.fork.clear(self.library, context)
        return context

    @staticmethod
    def _mark(batch: Batch, rows: int, length: int) -> None:
        """Says whose the tokens are: `length` of each sequence, of which the last has logits."""
        batch.n_tokens = rows * length
        for index in range(rows * length):
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, index // length
            batch.logits[index] = index % length == length - 1


def _library(fork: Fork) -> ctypes.CDLL:
    package, *rest = Path(fork.library).parts
    path = Path(importlib.util.find_spec(package).submodule_search_locations[0]).joinpath(*rest)
    library = ctypes.CDLL(str(path))
    library.llama_batch_init.restype = Batch
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype = Parameters
    for name in ("model_load_from_file", "init_from_model", "model_get_vocab", "get_memory", "get_logits"):
        if hasattr(library, f"llama_{name}"):  # a fork has no `llama_get_memory`
            getattr(library, f"llama_{name}").restype = Pointer
    library.llama_backend_init()
    return library


def not_installed(fork: str) -> str:
    """Empty, or how to install a fork."""
    found = importlib.util.find_spec(Path(FORKS[fork].library).parts[0])
    return "" if found else f"not installed: pip install {FORKS[fork].wheel}"
