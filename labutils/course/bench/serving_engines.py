"""The engines of `bench serving`, one a process: a job in, the times and texts of its requests out.

All are called in the same way, in their own process and without HTTP: requests go into the engine's queue, and tokens
are counted when the engine has made them. This file runs in vLLM's own environment too, so it imports only the standard
library before it knows which engine it is.
"""

import contextlib
import itertools
import json
import os
import queue
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

RUNNING, BUDGET, CONTEXT = 32, 256, 512  # requests and tokens in a step, and tokens of one request


class Engine(Protocol):
    """What `drive` needs of an engine."""

    def submit(self, number: int, prompt: list[int], count: int) -> None:
        """Queues a request for `count` tokens."""

    def advance(self, timeout_s: float | None) -> list[tuple[int, float, float, object]]:
        """Works for a while; each request that has ended: number, times of its first and last token, its text."""


def drive(engine: Engine, job: dict) -> list[dict]:
    """Submits requests when they are due, and returns what became of each, times in seconds from the beginning.

    Args:
        engine: By its clock, `time.perf_counter`.
        job: `prompts`, `new_tokens` of each, and either `arrivals` (an open loop: at these times, come what may) or
            `at_once` (a closed loop: so many clients, each of whom sends its next request when it has its answer).
    """
    due, arrivals = deque(enumerate(job["prompts"])), job.get("arrivals")
    most, there, found, began = job.get("at_once") or len(due), 0, [{} for _ in due], time.perf_counter()
    while due or there:
        now = time.perf_counter() - began
        while due and there < most and (arrivals is None or arrivals[due[0][0]] <= now):
            number, prompt = due.popleft()
            found[number]["arrived"] = now if arrivals is None else arrivals[number]
            engine.submit(number, prompt, job["new_tokens"])
            there += 1
        wait_s = arrivals[due[0][0]] - now if due and arrivals else None
        if not there:
            time.sleep(max(wait_s, 0))
            continue
        for number, first, last, text in engine.advance(wait_s):
            found[number] |= {"first": first - began, "last": last - began, "text": text}
            there -= 1
    return found


class Ours:
    """The course's engine; every request has a salt of its own, so that none finds another's blocks."""

    def __init__(self, folder: str, threads: int, *, bits: int = 32) -> None:
        import torch

        from labutils.lab.models.load import load_model
        from labutils.lab.models.served import paged_llama
        from labutils.quantization.affine import Scheme
        from labutils.quantization.packed import pack_model_
        from labutils.serving.engine import Engine
        from labutils.serving.scheduler import Limits, Request

        torch.set_num_threads(threads)
        model = load_model(folder).model
        if bits < 32:
            pack_model_(model, Scheme(8) if bits == 8 else Scheme(4, granularity="group", group_size=32))
        limits = Limits(token_budget=BUDGET, max_running=RUNNING, max_waiting=10_000, max_positions=CONTEXT)
        self.engine = Engine(paged_llama(model, positions=RUNNING * CONTEXT), limits, clock=time.perf_counter)
        self.request, self.salts, self.numbers = Request, itertools.count(), {}

    def submit(self, number: int, prompt: list[int], count: int) -> None:
        """See `Engine`."""
        self.numbers[self.engine.submit(self.request(prompt, count, salt=str(next(self.salts))))] = number

    def advance(self, timeout_s: float | None) -> list[tuple[int, float, float, object]]:
        """One step."""
        ended = [output.request for output in self.engine.step() if output.end]
        return [(self.numbers.pop(r), r.token_s[0], r.token_s[-1], r.new_ids) for r in ended]


class LlamaCpp:
    """llama.cpp's server, called in its process from a thread for each request; it tells how long tokens took."""

    def __init__(self, folder: str, threads: int, *, flash: bool = True, repack: bool = True) -> None:
        import xllamacpp

        p, flash_types = xllamacpp.CommonParams(), xllamacpp.llama_flash_attn_type
        p.model.path, p.n_parallel, p.n_ctx, p.no_extra_bufts = folder, RUNNING, RUNNING * CONTEXT, not repack
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.flash_attn_type = getattr(flash_types, f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if flash else 'DISABLED'}")
        self.server, self.done = xllamacpp.Server(p), queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(256)

    def submit(self, number: int, prompt: list[int], count: int) -> None:
        """See `Engine`."""
        self.pool.submit(self._complete, number, prompt, count)

    def advance(self, timeout_s: float | None) -> list[tuple[int, float, float, object]]:
        """Waits for an answer."""
        with contextlib.suppress(queue.Empty):
            answer = self.done.get(timeout=None if timeout_s is None else max(timeout_s, 0))
            if isinstance(answer, Exception):
                raise answer
            return [answer]
        return []

    def _complete(self, number: int, prompt: list[int], count: int) -> None:
        try:
            asked = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "ignore_eos": True}
            answer = self.server.handle_completions(asked | {"cache_prompt": False})
            last = time.perf_counter()
            times = answer["timings"]
            if times["predicted_n"] != count:
                raise ValueError(f"llama.cpp must make {count} tokens; got {times['predicted_n']}")
            self.done.put((number, last - times["predicted_ms"] / 1e3, last, answer["choices"][0]["text"]))
        except Exception as error:
            self.done.put(error)


class Transformers:
    """Continuous batching of transformers; its thread notes when tokens were made."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import ContinuousBatchingConfig

        from labutils.lab.models.load import load_model

        torch.set_num_threads(threads)
        model = load_model(folder).model
        model.generation_config.update(do_sample=False, eos_token_id=-1, max_new_tokens=CONTEXT)
        config = ContinuousBatchingConfig(
            page_size=16,
            num_blocks=RUNNING * CONTEXT // 16,
            max_batch_tokens=BUDGET,
            max_requests_per_batch=RUNNING,
            allow_block_sharing=False,
        )
        self.manager = model.init_continuous_batching(continuous_batching_config=config)
        self.manager.start()

    def submit(self, number: int, prompt: list[int], count: int) -> None:
        """See `Engine`."""
        options = {"max_new_tokens": count, "record_timestamps": True, "eos_token_id": -1}
        self.manager.add_request(prompt, request_id=str(number), **options)

    def advance(self, timeout_s: float | None) -> list[tuple[int, float, float, object]]:
        """Waits for an answer."""
        found = self.manager.get_result(timeout=1.0 if timeout_s is None else max(timeout_s, 1e-3))
        if found is None and not self.manager.is_running():
            raise RuntimeError("transformers' generation thread has ended")
        if found is None or not found.is_finished():
            return []
        return [(int(found.request_id), found.timestamps[0], found.timestamps[-1], found.generated_tokens)]


class Vllm:
    """vLLM's engine on the CPU, stepped in its own process."""

    def __init__(self, folder: str, threads: int) -> None:
        from vllm import LLM, SamplingParams

        options = {"dtype": "float32", "max_model_len": CONTEXT, "enforce_eager": True, "enable_prefix_caching": False}
        self.engine = LLM(model=folder, max_num_seqs=RUNNING, **options).llm_engine
        self.params, self.first = SamplingParams, {}

    def submit(self, number: int, prompt: list[int], count: int) -> None:
        """See `Engine`."""
        params = self.params(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    def advance(self, timeout_s: float | None) -> list[tuple[int, float, float, object]]:
        """One step."""
        outputs, now, ended = self.engine.step(), time.perf_counter(), []
        for output in outputs:
            first = self.first.setdefault(output.request_id, now)
            if output.finished:
                del self.first[output.request_id]
                ended.append((int(output.request_id), first, now, list(output.outputs[0].token_ids)))
        return ended


ENGINES = {"ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers, "vllm": Vllm}


def main() -> None:
    """The child: the engine's name and settings are its argument; libraries that print do so to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, settings = json.loads(sys.argv[1])
    engine = ENGINES[name](**settings)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("profile"):
            from labutils.course.bench.serving_profile import profile

            print(json.dumps(profile(engine, job)), file=answers, flush=True)
        else:
            print(json.dumps(drive(engine, job)), file=answers, flush=True)


if __name__ == "__main__":
    main()
