"""Engines of `bench quantization` that PyTorch is part of: the course's own, PyTorch's int8, and what reading costs."""

import math
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from labutils.course.bench.bandwidth import BandwidthMeter, Probes
from labutils.course.bench.decode import Clock
from labutils.course.bench.engines import WARM_TOKENS
from labutils.course.bench.serving_profile import matrices_s
from labutils.generation.decode import generate_static
from labutils.generation.sampling import greedy
from labutils.lab.models.quantized import fast_llama, fast_packed_llama, load_quantized
from labutils.lab.models.served import paged_llama
from labutils.quantization.packed_steps import Arena
from labutils.serving.engine import Engine
from labutils.serving.scheduler import Limits, Request

Ticks = tuple[list[float], list[list[int]]]


class Ours:
    """The course's decoders: `FastLlama` for one prompt, chapter 11's engine for several.

    Args:
        folder: Of a model as transformers saves it, or of a quantized one.
        threads: Of everything.
        packed: Whether the folder holds a quantized model.
    """

    def __init__(self, folder: str, *, threads: int, packed: bool) -> None:
        torch.set_num_threads(threads)
        self.model = load_quantized(Path(folder)).model if packed else load_float(folder)
        # NumPy puts large arrays in huge pages, memory whether they are used or not: little room, until asked for more.
        self.decoder, self.long = fast_llama(self.model, max_length=128), None

    def generate(self, prompts: list[list[int]], count: int) -> Ticks:
        """See `Llama.generate`; one prompt's tokens come in blocks, and the clock is read after each."""
        if len(prompts) > 1:
            return self._serve(prompts, count)
        if len(prompts[0]) + count > self.decoder.max_length:
            self.decoder = fast_llama(self.model, max_length=len(prompts[0]) + count)
        ticks, decoder = [time.perf_counter()], self.decoder
        decoder.truncate(0)
        made = [int(greedy(decoder.prefill(torch.tensor(prompts))))]
        ticks.append(time.perf_counter())
        for block in decoder.blocks(made[0], count - 1):
            made += block
            ticks.append(time.perf_counter())
        return ticks, [made]

    def profile(self, rows: int) -> dict:
        """Seconds of a step with so many rows: of all layers' matrices, and of the head for as many as it has then."""
        head, samples = self.decoder.head, []
        x = np.ones((1 if rows >= 512 else rows, self.decoder.hidden.shape[1]), np.float32)
        for _ in range(5):
            began = time.perf_counter()
            head(x, self.decoder.matvec)
            samples.append(time.perf_counter() - began)
        return {"matrices": matrices_s(self.decoder, rows), "head": sorted(samples)[2]}

    def attention(self, positions: int) -> dict:
        """Seconds that reading an int8 cache of so many positions adds to a token, and the bytes of that cache."""
        if self.long is None:
            self.long = fast_packed_llama(self.model, max_length=positions + WARM_TOKENS, int8_cache=True)
            self.long.prefill(torch.randint(self.model.config.vocab_size, (1, positions), generator=torch.Generator()))
        spent = {}
        for length in (1, positions):
            self.long.length = length  # what lies behind stays, and is overwritten alike
            began = time.perf_counter()
            for _ in range(WARM_TOKENS):
                self.long.decode_one_token(torch.tensor([1]))
            spent[length] = (time.perf_counter() - began) / WARM_TOKENS
        caches = sum(array.nbytes for array in self.long.few_tokens.caches) * positions
        return {"seconds": spent[positions] - spent[1], "bytes": caches // self.long.few_tokens.shape.max_length}

    def size(self) -> dict:
        """Bytes of the weights that a token reads."""
        return {"weight_bytes": self.decoder.weight_bytes}

    def _serve(self, prompts: list[list[int]], count: int) -> Ticks:
        length = len(prompts[0])
        positions = len(prompts) * 16 * math.ceil((length + count) / 16)
        if not hasattr(self, "paged") or self.paged.decoder.max_length < positions:
            self.paged = paged_llama(self.model, positions=positions)
        limits = Limits(token_budget=len(prompts) * length, max_running=len(prompts))
        engine = Engine(self.paged, limits, clock=time.perf_counter)
        requests = [Request(list(prompt), count, salt=str(row)) for row, prompt in enumerate(prompts)]
        ticks = [time.perf_counter()]
        for request in requests:
            engine.submit(request)
        while engine.busy:
            engine.step()
        ticks += [max(times) for times in zip(*(request.token_s for request in requests), strict=True)]
        return ticks, [request.token_ids[length:] for request in requests]


class Modules:
    """A model whose linear layers PyTorch's own quantization has replaced: "dynamic" int8, or "torchao".

    Dynamic int8 rounds inputs to 7 bits: `findings/torch-dynamic-int8-has-seven-bits.sh`.
    """

    def __init__(self, folder: str, *, threads: int, kind: str) -> None:
        torch.set_num_threads(threads)
        self.model = {"dynamic": _dynamic, "torchao": _torchao}[kind](load_float(folder))

    def generate(self, prompts: list[list[int]], count: int) -> Ticks:
        """See `Llama.generate`."""
        return clocked(partial(generate_static, self.model), prompts, count)


class Bandwidth:
    """What this machine reads at best."""

    def __init__(self, threads: int) -> None:
        self.threads, self.meters = threads, {}

    def read(self, size: int) -> dict:
        """The best rate of one round of probes, in bytes/s.

        Memory in huge pages is read faster, so it is among the probes.
        """
        if size not in self.meters:
            self.meters[size] = BandwidthMeter([size], threads=[self.threads], more=_huge_pages)
        self.meters[size].run_round()
        return {"rate": self.meters[size].rounds[size][-1]}


def load_float(folder: str) -> nn.Module:
    """A float32 model without its tokenizer."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def clocked(generate, prompts: list[list[int]], count: int) -> Ticks:
    """Times our own `generate(token_ids, count, choose=…)`."""
    ids, clock = torch.tensor(prompts), Clock([time.perf_counter()])
    tokens: Tensor = generate(ids, count, choose=clock)
    return clock.ticks, tokens[:, ids.shape[1] :].tolist()


def _huge_pages(size: int) -> Probes:
    buffer = Arena(size).free[:size].view(torch.float32).fill_(1.0)
    return {"bytes:sum, huge pages": (buffer.sum, size)}


def _dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # it is deprecated, and still what many people have
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model
