"""The engines of `bench quantization`, one a process: a job in, what its method answers out, with the memory used.

A job names a method of the engine and what it is given: `{"do": "timed", "prompts": [[1, 2]], "count": 9}`. The modules
of `ENGINES` are imported before the clock of loading begins.
"""

import importlib
import json
import os
import sys
import time

from labutils.measurement.limits import status_bytes

ENGINES = {
    "llama": ("labutils.course.bench.llama_cpp", "Llama"),
    "ours": ("labutils.course.bench.torch_engines", "Ours"),
    "torch": ("labutils.course.bench.torch_engines", "Modules"),
    "vllm": ("labutils.course.bench.vllm_engine", "Vllm"),
    "bandwidth": ("labutils.course.bench.torch_engines", "Bandwidth"),
}
WARM_TOKENS = 4


def timed(engine, prompts: list[list[int]], count: int, threads: int | None = None) -> dict:
    """Greedy decoding after a few tokens that nobody times: while it was stopped, others had the caches.

    Args:
        engine: Its `generate` returns times and tokens; see `Llama.generate`.
        prompts: Of one length.
        count: New tokens of each.
        threads: A new number for an engine that can change it.
    """
    if threads:
        engine.threads = threads
    engine.generate([prompt[:16] for prompt in prompts], min(count, WARM_TOKENS))
    ticks, tokens = engine.generate(prompts, count)
    return {"ticks": ticks, "tokens": tokens}


def answered(engine, job: dict) -> dict:
    """What becomes of a job."""
    arguments = {key: value for key, value in job.items() if key != "do"}
    return timed(engine, **arguments) if job["do"] == "timed" else getattr(engine, job["do"])(**arguments)


def made(name: str, settings: dict) -> tuple[object, float, int | None]:
    """An engine, the seconds that it took to load, and the memory that the process had before."""
    module, kind = ENGINES[name]
    make = getattr(importlib.import_module(module), kind)
    before, began = status_bytes("VmRSS"), time.perf_counter()
    return make(**settings), time.perf_counter() - began, before


def main() -> None:
    """The child: the engine's name and settings are its argument; libraries that print do so to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine, load_s, before = made(*json.loads(sys.argv[1]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        answer, most = answered(engine, json.loads(line)), status_bytes("VmHWM")
        peak = None if before is None or most is None else most - before
        print(json.dumps(answer | {"load_s": load_s, "peak_bytes": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
