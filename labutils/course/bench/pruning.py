"""`bench pruning`: which zeros buy time. Dense, zeros left in place, 2:4 packed, half the neurons gone, in one run."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from labutils.course.bench.subject import Subject
from labutils.course.bench.table import Bar, Row
from labutils.generation.fast_llama import FastLlama, Linear
from labutils.measurement.resources import kv_bytes_per_position
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import Timing, measure_interleaved, paired_ratio
from labutils.pruning.masks import apply_masks_, mask_model
from labutils.pruning.scores import magnitude_scores
from labutils.pruning.sparse import matvec_2_4, pack_2_4
from labutils.pruning.structured import keep_neurons

DENSE, ZEROS, PACKED, HALF = "dense", "2:4, zeros stored", "2:4 packed", "half the neurons"
PACKED_BAR, BYTES_BAR = 1.25, 0.10


class PackedMatrix:
    """The plain decoder's matrix with its weights stored 2:4: every position goes through the kernel."""

    def __init__(self, dense: Linear) -> None:
        self.packed, self.bias = pack_2_4(dense.weight), dense.bias
        self.nbytes = self.packed.nbytes + (0 if dense.bias is None else dense.bias.nbytes)

    def __call__(self, x: np.ndarray, matvec: str) -> np.ndarray:
        """Returns x W^T + b for x (positions, in_features)."""
        y = np.stack([matvec_2_4(self.packed, torch.from_numpy(row)).numpy() for row in x])
        return y if self.bias is None else y + self.bias


def packed(decoder: FastLlama) -> FastLlama:
    """The same decoder with every matrix of its body 2:4 packed; the head stays dense."""
    twin, names = copy.copy(decoder), ("qkv", "output", "gate_up", "down")
    twin.layers = [replace(layer, **{n: PackedMatrix(getattr(layer, n)) for n in names}) for layer in decoder.layers]
    twin.keys, twin.values = decoder.keys.copy(), decoder.values.copy()
    return twin


def contestants(model: nn.Module, *, positions: int) -> dict[str, FastLlama]:
    """The model and its three pruned twins, all decoded plainly; for speed, magnitude and the first half will do."""
    masked = copy.deepcopy(model)
    apply_masks_(masked, mask_model(magnitude_scores(masked), (2, 4)))
    neurons = torch.arange(model.config.intermediate_size // 2)
    shorter = keep_neurons(model, [neurons] * model.config.num_hidden_layers)
    plain = {name: FastLlama(each, max_length=positions) for name, each in ((DENSE, model), (HALF, shorter))}
    zeros = FastLlama(masked, max_length=positions, matvec=plain[DENSE].matvec)
    return {DENSE: plain[DENSE], ZEROS: zeros, PACKED: packed(zeros), HALF: plain[HALF]}


def decode_step(decoder: FastLlama, token_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that decodes one token after the prompt, always at the same position."""
    next_ids = decoder.prefill(token_ids).argmax(dim=-1)

    def step() -> torch.Tensor:
        decoder.truncate(token_ids.shape[1])
        return decoder.decode_one_token(next_ids)

    return step


def bench_pruning(subject: Subject, *, rounds: int = 7, threads: int = 1) -> tuple[list[Row], list[Bar]]:
    """Times one decoding step of every contestant, interleaved, and holds the two bars against it.

    Raises:
        KernelError: without a C compiler.
        ValueError: for fewer than five rounds.
    """
    positions = subject.token_ids.shape[1] + 1
    with thread_count(threads):
        models = contestants(subject.model, positions=positions)
        steps = {name: decode_step(model, subject.token_ids) for name, model in models.items()}
        timings = measure_interleaved(steps, repeats=rounds, warmup=2)
    cached = positions * kv_bytes_per_position(subject.model.config)
    read = {name: model.weight_bytes + cached for name, model in models.items()}
    rows = [
        Row(
            technique=name,
            model=subject.name,
            threads=threads,
            samples=tuple(1 / s for s in timings[name].samples_s),
            bytes_per_token=read[name],
            note=f"{read[name] / 1e6:.0f} MB read, {read[DENSE] / read[name]:.2f}x by bytes",
        )
        for name in models
    ]
    return rows, bars(timings, read)


def bars(timings: dict[str, Timing], read: dict[str, int]) -> list[Bar]:
    """The claims: packing pays at least 1.25x; removing neurons gives the time that the bytes predict, within 10%."""
    packed = paired_ratio(timings[DENSE].samples_s, timings[PACKED].samples_s)
    shorter = paired_ratio(timings[HALF].samples_s, timings[DENSE].samples_s)
    predicted = read[HALF] / read[DENSE]
    off = shorter.value / predicted - 1
    half = f"{shorter.value:.3f} of dense [{shorter.low:.3f}, {shorter.high:.3f}], {off:+.1%}"
    return [
        Bar(f"2:4 packed decodes at least {PACKED_BAR}x as fast as dense", str(packed), packed.value >= PACKED_BAR),
        Bar(f"{HALF} gone takes {predicted:.3f} of the time, within {BYTES_BAR:.0%}", half, abs(off) <= BYTES_BAR),
    ]
