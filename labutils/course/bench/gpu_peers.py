"""Beside the ladder: low precision by itself, transformers' own `generate`, eager and compiled, and torchao.

Low precision and torchao are decoders like the rungs and timed like them. `generate` cannot be cut into steps (on a GPU
it does not even wait for each token), so two calls are timed in every round, one token and some more, and divided.
The CUDA half was not run on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from labutils.acceleration.ladder import Device, Plan, climb
from labutils.course.bench.subject import Subject
from labutils.generation.decode import decode_one_token
from labutils.lab.layers.linears import change_weights_, linear_layers, untie_head_, weight_of
from labutils.lab.models.ladder import Accelerated, build, compiled_step
from labutils.measurement.timing import quantile

FORMATS = {"fp16 by itself": torch.float16, "bf16 by itself": torch.bfloat16}
TRANSFORMERS = ("transformers, eager", "transformers, compiled")
TORCHAO = {"torchao int8": 8, "torchao int4": 4}
NAMES = (*FORMATS, *TRANSFORMERS, *TORCHAO)
FIRST, MORE = "1 token", 16
GROUP = 32


def decoder(name: str, subject: Subject, abilities: Device, device: str) -> Accelerated:
    """The model as a peer decodes it.

    Raises:
        ValueError: When the device has the format as a rung already.
        ImportError: When torchao, or what it needs, is missing.
    """
    if name in TORCHAO:
        return torchao_decoder(subject.model, TORCHAO[name], climb("compile", abilities)[0], device)
    if abilities.kind == "cuda":
        raise ValueError("a rung of the ladder here")
    return build(subject.model, Plan(dtype=FORMATS[name]), device=device)


def torchao_decoder(model: nn.Module, bits: int, plan: Plan, device: str) -> Accelerated:
    """Torchao's weight-only int8 or int4 (groups of 32) under the same step, cache and compiler as the ladder's.

    Its twin holds torchao's own rounded weights as float32.

    Raises:
        ImportError: When torchao, or what its int4 needs, is missing.
    """
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    changed = copy.deepcopy(model).to(device=device, dtype=plan.dtype).eval()
    changed.config._attn_implementation = plan.attention
    untie_head_(changed)  # the embedding stays as it is
    quantize_(changed, Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig(group_size=GROUP))
    rounded = {n: weight_of(each).dequantize().float() for n, each in linear_layers(changed, with_head=True)}
    twin = copy.deepcopy(model)
    untie_head_(twin)
    change_weights_(twin, lambda name, weight: rounded[name].to(weight.device), with_head=True)
    step = compiled_step() if plan.compiled else decode_one_token
    return Accelerated(changed, replace(plan, weights=f"int{bits}"), {}, twin, step)


def generators(name: str, subject: Subject, abilities: Device, device: str) -> dict[str, Callable[[], Tensor]]:
    """Transformers' `generate` in the fastest float format of the ladder, for one new token and for `MORE` more.

    Raises:
        RuntimeError: When the compiler is missing.
    """
    compiled = name == TRANSFORMERS[1]
    if compiled and abilities.compiler:
        raise RuntimeError(f"needs what this machine lacks ({abilities.compiler})")
    model = copy.deepcopy(subject.model).to(device=device, dtype=climb("bf16", abilities)[0].dtype).eval()
    ids = subject.token_ids.to(device)

    def run(new_tokens: int) -> Tensor:
        config = copy.deepcopy(model.generation_config)
        config.update(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        config.update(disable_compile=True, eos_token_id=None)
        if compiled:
            config.update(cache_implementation="static", disable_compile=False, compile_config=_compile_anywhere())
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return {name: lambda: run(1 + MORE), f"{name}, {FIRST}": lambda: run(1)}


def seconds_per_token(longer_s: tuple[float, ...], first_s: tuple[float, ...]) -> tuple[float, ...]:
    """What each further token took in each round: prefill and first token, by their median, are taken off.

    >>> seconds_per_token((17.0, 33.0), (1.0, 1.0))
    (1.0, 2.0)
    """
    first = quantile(first_s, 0.5)
    return tuple(max(seconds - first, 0.05 * seconds) / MORE for seconds in longer_s)


def _compile_anywhere():
    """Transformers compiles on GPUs only, unless it is told otherwise."""
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True
    return config
