"""A design: what is done to a model before it answers. Chapters 03 to 05 and 10, each in one field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from labutils.generation.fast_llama import FastLlama
from labutils.lab.layers.calibration import InputStatistics, input_statistics
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.lablm import SHAPES
from labutils.lab.models.load import LanguageModel, load_model
from labutils.lab.models.quantized import fast_llama
from labutils.pruning.masks import apply_masks_, mask_model
from labutils.pruning.scores import wanda_scores
from labutils.quantization.affine import Scheme, choose_qparams, quantize
from labutils.quantization.gptq import gptq
from labutils.quantization.packed import PackedLinear, PackedWeight, replace_packed_

BITS = (None, 8, 4, 3)


@dataclass(frozen=True, kw_only=True)
class Design:
    """A model of the course and what is done to it, in this order: prune, quantize, draft.

    Attributes:
        model: "lablm", or "lablm-small", its distilled student.
        pruned: Share of the weights of each row that Wanda sets to zero.
        bits: Of the weights: 8 with one scale a row, 4 or 3 with one for `group_size`; None leaves float32.
        group_size: Weights that share a scale, below 8 bits.
        calibrated: Whether GPTQ chooses the codes instead of rounding to nearest.
        draft_tokens: Tokens that prompt lookup guesses ahead of each step; 0 is plain decoding.

    Raises:
        ValueError: For a value that none of these chapters knows.
    """

    model: str = "lablm"
    pruned: float = 0.0
    bits: int | None = None
    group_size: int = 32
    calibrated: bool = False
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        if self.model not in SHAPES:
            raise ValueError(f"model must be one of {', '.join(SHAPES)}; got {self.model!r}")
        if self.bits not in BITS:
            raise ValueError(f"bits must be 8, 4, 3 or None; got {self.bits!r}")
        if not 0 <= self.pruned < 1:
            raise ValueError(f"pruned must be a share of at least 0 and below 1; got {self.pruned}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128; got {self.group_size}")
        if self.calibrated and self.bits is None:
            raise ValueError("only quantized weights can be calibrated; got calibrated=True with bits=None")
        if not 0 <= self.draft_tokens <= 16:
            raise ValueError(f"draft_tokens must be from 0 to 16; got {self.draft_tokens}")

    def __str__(self) -> str:
        """A label for tables and plots.

        >>> print(Design(bits=4, calibrated=True, draft_tokens=4), "|", Design())
        LabLM int4 GPTQ, 4 guessed | LabLM float32
        """
        name = "LabLM" if self.model == "lablm" else "LabLM-small"
        weights = f"int{self.bits}" if self.bits else "float32"
        grouped = f" g{self.group_size}" if self.bits and self.bits < 8 and self.group_size != 32 else ""
        parts = [f"{name} {weights}{grouped}{' GPTQ' * self.calibrated}"]
        parts += [f"{self.pruned:.0%} pruned"] * (self.pruned > 0) + [f"{self.draft_tokens} guessed"] * bool(
            self.draft_tokens
        )
        return ", ".join(parts)

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantized."""
        if self.bits is None:
            return None
        return Scheme(8) if self.bits == 8 else Scheme(self.bits, granularity="group", group_size=self.group_size)

    def build(self) -> LanguageModel:
        """Loads the model and changes its weights; what is drafted is decided where it is served."""
        loaded = load_model(self.model)
        model = loaded.model
        if self.pruned:
            seen = input_statistics(model, calibration_batches(loaded.tokenizer, context=256))
            apply_masks_(model, mask_model(wanda_scores(model, seen), self.pruned, scope="row"))
        if self.scheme:
            seen = {}
            if self.calibrated:
                batches = calibration_batches(loaded.tokenizer, context=256)
                seen = input_statistics(model, batches, with_gram=True, with_head=True)
            pack_designed_(model, self.scheme, seen)
        return loaded

    def decoder(self, *, max_length: int = 512) -> FastLlama:
        """Builds the decoder for one stream.

        Raises:
            KernelError: For packed weights without a C compiler.
        """
        return fast_llama(self.build().model, max_length=max_length)


def pack_designed_(model: nn.Module, scheme: Scheme, seen: Mapping[str, InputStatistics]) -> None:
    """Packs every linear layer, the head too: rounded to nearest, or by GPTQ where its inputs were `seen`."""
    packed = {}
    for name, layer in linear_layers(model, with_head=True):
        weight = weight_of(layer)
        qparams = choose_qparams(weight, scheme)
        if name in seen:
            weight = gptq(weight, seen[name].gram, qparams, act_order=True)
        packed[name] = PackedLinear(PackedWeight.from_codes(quantize(weight, qparams), qparams), layer.bias)
    for name, layer in packed.items():
        replace_packed_(model, name, layer)
