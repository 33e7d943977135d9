"""A large model that computes what a small one computes: each unit is repeated, the weights are shared out.

Speed needs a model that does not fit into a cache, acceptance needs one that has learnt something. Repeating every
hidden unit `width` times, and splitting each weight among the copies that it now reads, leaves the function as it was
(Net2WiderNet: Chen et al. 2015, arXiv:1511.05641, section 2.2): LabLM's texts at the pace of a model 41 times as large.
"""

import copy

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from labutils.generation.fast_llama import SUPPORTED

WIDTH = 7  # LabLM becomes a model of 0.24B parameters


def tiled_model(model: nn.Module, *, width: int = WIDTH, spread: float = 0.5, seed: int = 0) -> nn.Module:
    """Returns a model of the same class, `width` times as wide, whose logits are the model's up to float32 rounding.

    Hidden units, heads, key-value heads and MLP neurons stand there `width` times, block behind block. A matrix W
    becomes blocks W · s_j ÷ width, where the shares s_j of the copies j average 1. RMSNorm sees the same mean square.
    The head reads `width` equal copies, so the last norm's gain is divided by `width`; embeddings are plain copies.

    Args:
        model: a Llama or Qwen2 of `transformers`; left as it is.
        width: copies of each unit, at least 1.
        spread: shares are drawn from 1 ± spread, then centred. Copies hold equal activations and unequal weights, so
            that quantizing the model makes its own errors instead of the small model's, `width` times over.
        seed: of the shares.

    Raises:
        ValueError: for another architecture, or a width below 1.
    """
    if model.config.model_type not in SUPPORTED or width < 1:
        rule = f"tiling needs a model_type among {SUPPORTED} and a width of at least 1"
        raise ValueError(f"{rule}; got {model.config.model_type} and {width}")
    config = copy.deepcopy(model.config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    config.update({"head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads})
    config.update({"num_attention_heads": width * heads, "num_key_value_heads": width * kv_heads})
    config.update({name: width * getattr(config, name) for name in ("hidden_size", "intermediate_size")})
    with no_init_weights():
        tiled = type(model)(config)
    tiled.tie_weights()
    tiled.generation_config = copy.deepcopy(model.generation_config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        if name == "model.norm.weight":
            weight = weight / width
        if weight.ndim == 1:
            wide = weight.repeat(width)
        elif "embed_tokens" in name or "lm_head" in name:
            wide = weight.repeat(1, width)
        else:
            wide = shared_out(weight, width=width, spread=spread, generator=generator)
        tiled.get_parameter(name).data = wide
    return tiled.eval()


def shared_out(weight: Tensor, *, width: int, spread: float, generator: torch.Generator) -> Tensor:
    """A matrix (out, in) as (width · out, width · in): what the copies of an input are given adds up to its weight.

    >>> shared_out(torch.tensor([[6.0]]), width=2, spread=0.0, generator=torch.Generator())
    tensor([[3., 3.],
            [3., 3.]])
    """
    outs, ins = weight.shape
    shares = torch.empty(width, outs, width, ins).uniform_(-spread, spread, generator=generator)  # then in place
    shares += 1 - shares.mean(dim=2, keepdim=True)
    shares *= weight[:, None] / width
    return shares.view(width * outs, width * ins)
