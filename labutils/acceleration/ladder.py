"""The ladder: one choice after another that makes decoding faster, what each needs of a device, and how to fall back.

A rung changes one thing of a `Plan`. A device that lacks what a rung needs skips it, says why, and goes on with the
next one. What computes the plan is `labutils.lab.models.ladder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from labutils.acceleration.interpreter import missing_triton
from labutils.lab.layers.compile import torch_compile_lack

GPU_ONLY = "needs an NVIDIA GPU"


@dataclass(frozen=True)
class Device:
    """What a device can do, as far as the ladder asks.

    Attributes:
        kind: `cpu` or `cuda`.
        name: for people.
        capability: CUDA's compute capability: (7, 5) T4, (8, 0) A100, (8, 9) L4, (9, 0) H100 and H200; None on a CPU.
        compiler: what `torch.compile` lacks here; empty where it can run.
        triton: what hand-written Triton kernels lack here; empty where they can run.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] | None = None
    compiler: str = ""
    triton: str = ""

    @classmethod
    def of(cls, device: str | torch.device) -> Device:
        """Asks PyTorch about a device. The CUDA half was not run on a GPU."""
        kind = torch.device(device).type
        if kind == "cuda":
            reason = missing_triton()
            return cls(
                kind,
                torch.cuda.get_device_name(device),
                torch.cuda.get_device_capability(device),
                compiler=reason,
                triton=reason,
            )
        return cls(kind, kind, compiler=torch_compile_lack())


@dataclass(frozen=True)
class Plan:
    """How a model decodes.

    Attributes:
        dtype: of weights and activations.
        tf32: whether float32 products may round their inputs to 10 bits of fraction.
        attention: `eager` writes the score matrix to memory, `sdpa` fuses it away.
        static: whether the KV cache is preallocated.
        compiled: whether a step runs through `torch.compile`.
        graphed: whether a step is captured once as a CUDA graph and replayed.
        fused: whether q, k, v and gate, up are one product each.
        weights: `float`, `int8`, `int4`, `fp8` or `2:4`.
    """

    dtype: torch.dtype = torch.float32
    tf32: bool = False
    attention: str = "eager"
    static: bool = False
    compiled: bool = False
    graphed: bool = False
    fused: bool = False
    weights: str = "float"


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: its name, what it changes, and from which compute capability on it exists.

    `tolerance` bounds ||logits − exact|| / ||exact||, exact being float32 on the *same* weights (rounded where the rung
    rounds them): what the arithmetic may lose, not what the rounded weights cost. Their kernels sum in float32, so the
    bound is that of the activations' format.
    """

    name: str
    change: dict = field(hash=False)
    tolerance: float
    capability: tuple[int, int] | None = None
    gpu_only: bool = False


# One unit in the last place is 2^-11 of fp16 and of TF32, 2^-8 of bf16, 2^-4 of fp8 e4m3, 1/127 of an int8 input; a few
# of them add up over the layers. 2:4 is here for what it costs: one row is padded to eight, so expect no gain.
LADDER = (
    Rung("fp32", {}, 1e-4),
    Rung("tf32", {"tf32": True}, 5e-3, capability=(8, 0), gpu_only=True),
    Rung("fp16", {"dtype": torch.float16}, 5e-3, gpu_only=True),
    Rung("bf16", {"dtype": torch.bfloat16}, 3e-2, capability=(8, 0), gpu_only=True),
    Rung("sdpa", {"attention": "sdpa"}, 1e-4),
    Rung("static cache", {"static": True}, 1e-4),
    Rung("compile", {"compiled": True}, 1e-4),
    Rung("cuda graph", {"graphed": True}, 1e-4, gpu_only=True),
    Rung("fused", {"fused": True}, 1e-4),
    Rung("int8", {"weights": "int8"}, 1e-4),
    Rung("int4", {"weights": "int4"}, 1e-4),
    Rung("fp8", {"weights": "fp8"}, 8e-2, capability=(8, 9), gpu_only=True),
    Rung("2:4", {"weights": "2:4"}, 1e-4, capability=(8, 0), gpu_only=True),
)
INT8_INPUTS = 3e-2  # where inputs are rounded to int8 as well: chapter 03's packed layers, on a CPU
NAMES = tuple(rung.name for rung in LADDER)
CAPABILITY_NAMES = {(8, 0): "8.0, Ampere", (8, 9): "8.9, Ada"}


def missing(rung: Rung, device: Device, plan: Plan = Plan()) -> str:
    """The reason why a device skips a rung; empty where it does not.

    >>> t4 = Device("cuda", "T4", (7, 5))
    >>> missing(next(r for r in LADDER if r.name == "bf16"), t4)
    'bf16 needs compute capability 8.0, Ampere, or newer; T4 has 7.5'
    """
    if rung.gpu_only and device.kind != "cuda":
        half = " (a CPU may only emulate it: measure first)" if "dtype" in rung.change else ""
        return f"{rung.name} {GPU_ONLY}{half}"
    if device.kind == "cuda" and rung.capability and device.capability < rung.capability:
        has, needs = ".".join(map(str, device.capability)), CAPABILITY_NAMES[rung.capability]
        return f"{rung.name} needs compute capability {needs}, or newer; {device.name} has {has}"
    if rung.change.get("compiled") and device.compiler:
        return f"{rung.name} needs what this machine lacks ({device.compiler})"
    if rung.change.get("graphed") and not plan.static:
        return f"{rung.name} needs a static cache"
    return ""


def climb(name: str, device: Device) -> tuple[Plan, dict[str, str]]:
    """The plan of a rung, all rungs below it included, and the reasons of those that the device skips.

    Formats of numbers and of weights replace each other; everything else adds up.

    Raises:
        ValueError: for a name that is not on the ladder.

    >>> plan, skipped = climb("compile", Device("cpu"))
    >>> plan.attention, plan.static, plan.compiled, sorted(skipped)
    ('sdpa', True, True, ['bf16', 'fp16', 'tf32'])
    """
    if name not in NAMES:
        raise ValueError(f"a rung must be one of {', '.join(NAMES)}; got {name!r}")
    plan, skipped = Plan(), {}
    for rung in LADDER[: NAMES.index(name) + 1]:
        reason = missing(rung, device, plan)
        if reason:
            skipped[rung.name] = reason
        else:
            plan = replace(plan, **rung.change)
    return plan, skipped


def tolerance(plan: Plan, *, int8_inputs: bool = False) -> float:
    """The widest of the bounds of all rungs that the plan holds, and of inputs in int8 where the layers round them.

    >>> tolerance(Plan(weights="int8")), tolerance(Plan(weights="int8"), int8_inputs=True)
    (0.0001, 0.03)
    """
    held = [r.tolerance for r in LADDER if all(getattr(plan, name) == value for name, value in r.change.items())]
    return max(held + [INT8_INPUTS] * int8_inputs)
