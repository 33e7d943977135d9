"""Scaling a layer's inputs without changing the model: what leaves one module smaller enters the next one larger.

AWQ, SmoothQuant and the injected outliers of the course all multiply columns of a weight by s and divide the output
of whatever comes before by the same s: (x / s) · (W · s)ᵀ = x · Wᵀ.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2Model

from labutils.lab.layers.architecture import LLAMA_LIKE, require_llama
from labutils.lab.layers.calibration import InputStatistics
from labutils.lab.layers.linears import Linear, set_weight_, weight_of


@dataclass(frozen=True)
class Fold:
    """Layers that read the same input, and the module that makes it.

    Attributes:
        source: a norm with a gain, or a linear layer.
        rows: which outputs of the source.
        readers: the layers, by name.
        groups: (kv_heads, repeats, head_dim) where each head of the source is read `repeats` times (grouped-query
            attention), so that the repeated inputs must share a scale; None elsewhere.
    """

    source: nn.Module
    rows: slice
    readers: dict[str, Linear]
    groups: tuple[int, int, int] | None = None

    def spread(self, scale: Float[Tensor, " n"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " n"]]:
        """The scale of the source's outputs and of the readers' inputs: geometric means where inputs are repeated."""
        if self.groups is None:
            return scale, scale
        shared = scale.log().view(self.groups).mean(dim=1).exp()
        return shared.flatten(), shared[:, None].expand(self.groups).flatten()


def folds(model: nn.Module, *, after_norms_only: bool = False) -> Iterator[Fold]:
    """Every fold of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model, in order.

    After norms: query, key and value; gate and up (c_attn and c_fc in GPT-2). After linear layers: the attention's
    output, which is linear in the values; down, which is linear in up. GPT-2's c_proj of the MLP stands behind GELU
    and has none. BERT's norms stand behind the residual sum, which reads them too: nothing can be folded there.

    Raises:
        ValueError: for another architecture.
    """
    body = getattr(model, model.base_model_prefix, model)
    prefix = "" if body is model else f"{model.base_model_prefix}."
    if isinstance(body, GPT2Model):
        found = _gpt2_folds(body, prefix)
    else:
        require_llama(model.config, families=("gpt2", *LLAMA_LIKE))
        found = _llama_folds(body, prefix)
    return (fold for fold in found if not (after_norms_only and isinstance(fold.source, Linear)))


@torch.no_grad()
def scale_inputs_(fold: Fold, scale: Float[Tensor, " n"]) -> None:
    """Divides the inputs of a fold's readers by `scale` (at their source) and multiplies their columns by it.

    Raises:
        ValueError: when a scale is not positive and finite.
    """
    if not (scale > 0).all() or not scale.isfinite().all():
        raise ValueError("scales must be positive and finite")
    of_source, of_readers = fold.spread(scale)
    if isinstance(fold.source, Linear):
        weight = weight_of(fold.source).clone()
        weight[fold.rows] /= of_source[:, None]
        set_weight_(fold.source, weight)
    else:
        fold.source.weight /= of_source
    if getattr(fold.source, "bias", None) is not None:
        fold.source.bias[fold.rows] /= of_source
    for layer in fold.readers.values():
        set_weight_(layer, weight_of(layer) * of_readers)


def rescaled(statistics: InputStatistics, factor: Float[Tensor, " n"]) -> InputStatistics:
    """What the statistics of a layer's inputs become when input j is multiplied by a positive factor_j."""
    gram = None if statistics.gram is None else statistics.gram * factor * factor[:, None]
    squares, sums = statistics.squares * factor**2, statistics.sum_abs * factor
    return InputStatistics(statistics.rows, statistics.absmax * factor, sums, squares, gram)


@torch.no_grad()
def inject_outliers_(model: nn.Module, *, channels: int, factor: float, generator: torch.Generator) -> None:
    """Makes `channels` random inputs behind each norm `factor` times as large, and leaves what the model computes.

    Outliers of this kind arise by themselves in models of billions of parameters (Dettmers et al. 2022,
    arXiv:2208.07339). Here they are injected: norm gain × c, the next weights' columns ÷ c.
    """
    for fold in folds(model, after_norms_only=True):
        size = fold.source.weight.numel()
        scale = torch.ones(size)
        scale[torch.randperm(size, generator=generator)[:channels]] = 1 / factor
        scale_inputs_(fold, scale.to(fold.source.weight.device))


def _llama_folds(body: nn.Module, prefix: str) -> Iterator[Fold]:
    config = body.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for i, layer in enumerate(body.layers):
        at = f"{prefix}layers.{i}."
        attention, mlp = layer.self_attn, layer.mlp

        def named(parent: str, *names: str, layer=layer, at=at) -> dict[str, Linear]:
            return {f"{at}{parent}.{name}": layer.get_submodule(f"{parent}.{name}") for name in names}

        everything = slice(None)
        yield Fold(layer.input_layernorm, everything, named("self_attn", "q_proj", "k_proj", "v_proj"))
        groups = (kv_heads, heads // kv_heads, attention.head_dim)
        yield Fold(attention.v_proj, everything, named("self_attn", "o_proj"), groups)
        yield Fold(layer.post_attention_layernorm, everything, named("mlp", "gate_proj", "up_proj"))
        yield Fold(mlp.up_proj, everything, named("mlp", "down_proj"))


def _gpt2_folds(body: nn.Module, prefix: str) -> Iterator[Fold]:
    for i, layer in enumerate(body.h):
        at, width = f"{prefix}h.{i}.", body.config.n_embd
        yield Fold(layer.ln_1, slice(None), {f"{at}attn.c_attn": layer.attn.c_attn})
        values = slice(2 * width, 3 * width)  # c_attn makes queries, keys and values in one product
        yield Fold(layer.attn.c_attn, values, {f"{at}attn.c_proj": layer.attn.c_proj})
        yield Fold(layer.ln_2, slice(None), {f"{at}mlp.c_fc": layer.mlp.c_fc})
