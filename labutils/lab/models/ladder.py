"""A model taken up the ladder by name: `accelerate(model, "int8")`, then the same `generate` on every rung."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.acceleration.graphs import GraphedStep
from labutils.acceleration.ladder import Device, Plan, climb, tolerance
from labutils.acceleration.linears import Fp8Linear, Int4Linear, Int8Linear, fits_fp8, fits_sparse, fuse_
from labutils.acceleration.memory import Need, memory_bytes, memory_guard, what_fits
from labutils.acceleration.triton_ops import relative_error
from labutils.generation.cache import CompiledKVCache, KVCache, StaticKVCache
from labutils.generation.decode import Choose, decode_one_token, forward_logits, prefill
from labutils.generation.sampling import greedy
from labutils.lab.layers.compile import compile_apart
from labutils.lab.layers.linears import change_weights_, linear_layers, replace_module_, untie_head_, weight_of
from labutils.pruning.masks import mask_n_of_m
from labutils.quantization.affine import Scheme, choose_qparams, fake_quantize, quantize
from labutils.quantization.packed import pack_model_

BUCKET = 64  # positions: to a multiple of it, the caches of compiled steps are rounded up
ASK_EVERY = {"cuda": 16}  # tokens between two questions whether all texts have stopped: there, each one waits
GROUP = 32  # of int4 scales; it divides every width that a power of two of heads makes


@dataclass
class Accelerated:
    """A model on a rung.

    Attributes:
        model: changed as the plan says.
        plan: what was chosen.
        skipped: the rungs that the device lacks, with reasons.
        twin: float32, the same weights (rounded or pruned where the rung does so), nothing else changed: what the
            rung's logits are held against.
        step: one decoding step.
        int8_inputs: whether its layers round their inputs to int8, too.
    """

    model: nn.Module
    plan: Plan
    skipped: dict[str, str]
    twin: nn.Module
    step: object = decode_one_token
    int8_inputs: bool = False

    def cache(self, *, positions: int, batch: int = 1):
        """An empty cache of the plan's kind."""
        if not self.plan.static:
            return KVCache()
        where = {"dtype": self.model.dtype, "device": self.model.device}
        kind = StaticKVCache
        if self.plan.compiled or self.plan.graphed:  # few lengths: a new one is compiled anew
            kind, positions = CompiledKVCache, -(-positions // BUCKET) * BUCKET
        return kind(self.model.config, max_length=positions, batch=batch, **where)

    def logits(self, token_ids: Int[Tensor, "batch n"], *, prompt: int) -> Float[Tensor, "batch steps vocab"]:
        """Logits after the prompt and after each further token, one step a token, as decoding goes."""
        with _matmuls(self.plan):
            cache = self.cache(positions=token_ids.shape[1], batch=len(token_ids))
            found = [prefill(self.model, token_ids[:, :prompt], cache).clone()]
            step = self.stepper(cache, token_ids[:, prompt - 1])
            found += [step(token_ids[:, i]).clone() for i in range(prompt, token_ids.shape[1])]
        return torch.stack(found, dim=1)

    def stepper(self, cache, example: Int[Tensor, " batch"]):
        """A function from the newest tokens to the next logits; with a graph, recorded on this cache."""

        def step(ids: Int[Tensor, " batch"]) -> Tensor:
            with _matmuls(self.plan):
                return self.step(self.model, ids, cache, None)

        if not self.plan.graphed:
            return step
        length = int(cache.get_seq_length())
        return GraphedStep(step, example, undo=lambda: cache.truncate(length))

    def generate(
        self,
        token_ids: Int[Tensor, "batch positions"],
        max_new_tokens: int,
        *,
        choose: Choose = greedy,
        stop: Collection[int] = (),
    ) -> Int[Tensor, "batch longer"]:
        """Generates on this rung; a text that has stopped is padded on with its last token.

        Raises:
            ValueError: when no new token is asked for.
            DoesNotFit: when the device's memory is too small; the message says what would fit.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        positions = token_ids.shape[1] + max_new_tokens
        need = Need.of(self.twin, positions=positions, batch=len(token_ids))
        need = replace(need, weight_bits=8 * next(self.model.parameters()).element_size())
        device = self.model.device
        with memory_guard(lambda: what_fits(need, memory_bytes(device)), device=device), _matmuls(self.plan):
            cache = self.cache(positions=positions, batch=len(token_ids))
            new = [choose(prefill(self.model, token_ids, cache))]
            step = self.stepper(cache, new[0])
            ends = torch.tensor(sorted(stop), dtype=torch.long, device=device)
            every = ASK_EVERY.get(device.type, 1)
            while len(new) < max_new_tokens:
                if stop and len(new) % every == 0 and torch.isin(new[-1], ends).all():
                    break
                ids = choose(step(new[-1]))
                new.append(torch.where(torch.isin(new[-1], ends), new[-1], ids) if stop else ids)
            found = torch.stack(new, dim=1)
            if stop:  # all texts had stopped some tokens ago
                found = found[:, : 1 + int((~torch.isin(found, ends).all(dim=0)).sum())]
            return torch.cat([token_ids, found], dim=1)


@dataclass(frozen=True)
class Equality:
    """How far a rung's logits lie from its twin's, and the share of greedy tokens that agree."""

    error: float
    tolerance: float
    same_tokens: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "NOT EQUAL"
        return f"{verdict}: error {self.error:.1e} (bound {self.tolerance:.0e}), {self.same_tokens:.0%} same tokens"


def accelerate(
    model: nn.Module,
    rung: str,
    *,
    device: str | torch.device = "cpu",
    abilities: Device | None = None,
    warn: bool = True,
) -> Accelerated:
    """Takes a copy of a float32 model up to a rung; what the device lacks is skipped, with one warning for all.

    On a CPU, int8 and int4 are the packed layers of chapter 03 with their C kernels.

    Args:
        model: a Hugging Face Llama or Qwen2 in float32.
        rung: a name of `labutils.acceleration.ladder.NAMES`.
        device: where it is to run.
        abilities: what the device can do, asked of PyTorch unless given. Those of a GPU on a CPU run the GPU's plan
            in slow motion, to check it.
        warn: whether to warn of skipped rungs.

    Raises:
        ValueError: for an unknown rung.
    """
    abilities = abilities or Device.of(device)
    plan, skipped = climb(rung, abilities)
    if skipped and warn:
        warnings.warn(f"left out on this device: {'; '.join(skipped.values())}", stacklevel=2)
    return build(model, plan, device=device, on_cpu=abilities.kind == "cpu", skipped=skipped)


def build(
    model: nn.Module,
    plan: Plan,
    *,
    device: str | torch.device = "cpu",
    on_cpu: bool = True,
    skipped: dict[str, str] | None = None,
) -> Accelerated:
    """A copy of a float32 model as a plan has it, beside its twin; `accelerate` chooses the plan by a rung's name.

    Args:
        model: a Hugging Face Llama or Qwen2 in float32.
        plan: how it is to decode.
        device: where it is to run.
        on_cpu: whether int8 and int4 are chapter 03's packed layers.
        skipped: what the plan had to leave out, and why.
    """
    twin = twin_of(model, plan.weights)
    changed = copy.deepcopy(twin)  # rounded already: rounding again finds the same codes
    changed.config._attn_implementation = plan.attention
    if plan.fused:
        fuse_(changed)
    _weights_(changed, plan, on_cpu=on_cpu)
    for parameter in changed.parameters():  # not buffers: codes, scales and rotary frequencies keep their formats
        parameter.data = parameter.data.to(plan.dtype)
    changed = changed.to(device).eval()
    if plan.weights == "2:4":
        _sparsify_(changed)
    step = compiled_step() if plan.compiled else decode_one_token
    return Accelerated(changed, plan, skipped or {}, twin, step, on_cpu and plan.weights in ("int8", "int4"))


def compiled_step():
    """`decode_one_token`, to be compiled for one model."""
    return compile_apart(decode_one_token, fullgraph=True, dynamic=False)


def check_equal(accelerated: Accelerated, token_ids: Int[Tensor, "batch n"], *, prompt: int) -> Equality:
    """Holds a rung's logits, one step a token, against its twin's in one pass without a cache."""
    twin_device = next(accelerated.twin.parameters()).device
    exact = forward_logits(accelerated.twin, token_ids.to(twin_device))[:, prompt - 1 :]
    actual = accelerated.logits(token_ids.to(accelerated.model.device), prompt=prompt).to(twin_device)
    same = (actual.argmax(dim=-1) == exact.argmax(dim=-1)).double().mean().item()
    bound = tolerance(accelerated.plan, int8_inputs=accelerated.int8_inputs)
    return Equality(relative_error(actual, exact), bound, same)


def scheme_of(weights: str) -> Scheme:
    """How int8 and int4 weights are rounded: a scale a row, or a scale for every 32."""
    return Scheme(8) if weights == "int8" else Scheme(4, granularity="group", group_size=GROUP)


def twin_of(model: nn.Module, weights: str) -> nn.Module:
    """The same weights as a rung's, as float32: the model itself where the rung leaves them as they are."""
    twin = model if weights == "float" else copy.deepcopy(model)
    if weights in ("int8", "int4"):
        change_weights_(twin, lambda _, w: fake_quantize(w, scheme_of(weights)), with_head=True)
    elif weights == "fp8":
        change_weights_(twin, lambda _, w: Fp8Linear(w, None).dequantize() if fits_fp8(w) else w, with_head=True)
    elif weights == "2:4":
        change_weights_(twin, lambda _, w: w * mask_n_of_m(w.abs(), 2, 4))
    return twin


def _weights_(model: nn.Module, plan: Plan, *, on_cpu: bool) -> None:
    if plan.weights in ("int8", "int4") and on_cpu:
        pack_model_(model, scheme_of(plan.weights))
    elif plan.weights in ("int8", "int4", "fp8"):
        untie_head_(model)  # the embedding stays as it is
        for name, layer in list(linear_layers(model, with_head=True)):
            replace_module_(model, name, _quantized(layer, plan.weights))


def _quantized(layer: nn.Linear, weights: str) -> nn.Module:
    weight = weight_of(layer).float()
    if weights == "fp8":
        return Fp8Linear(weight, layer.bias) if fits_fp8(weight) else layer
    qparams = choose_qparams(weight, scheme_of(weights))
    kind = Int8Linear if weights == "int8" else Int4Linear
    return kind(quantize(weight, qparams), qparams.scale.squeeze(-1), layer.bias)


def _sparsify_(model: nn.Module) -> None:
    """Stores each layer's 2:4 weight compressed, for the GPU's sparse units. Not run on a GPU."""
    from torch.sparse import to_sparse_semi_structured

    for _, layer in linear_layers(model):
        if not fits_sparse(layer.weight):
            continue
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)


class _matmuls:
    """Sets how float32 products are rounded, and puts it back."""

    def __init__(self, plan: Plan) -> None:
        self.precision = "high" if plan.tf32 else "highest"

    def __enter__(self) -> None:
        self.old = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)

    def __exit__(self, *_) -> None:
        torch.set_float32_matmul_precision(self.old)
