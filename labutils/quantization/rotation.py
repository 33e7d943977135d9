"""Rotation: mix all channels by an orthogonal matrix, so that no single one stands out; the function stays.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456): x·W = (x·Q)·(Qᵀ·W). The residual stream is rotated once and for all
inside the weights; the inputs of down_proj, which stand behind a product, are rotated while the model runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from labutils.lab.layers.architecture import require_llama, require_plain_layers
from labutils.lab.layers.linears import Linear, set_weight_, untie_head_, weight_of
from labutils.quantization.folding import folds


def hadamard(n: int, *, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """An orthogonal matrix of size n = m·2^k, m odd: Sylvester's Hadamard matrix with random signs, ⊗ a rotation.

    H_2n = [[H_n, H_n], [H_n, −H_n]] / √2. For m = 1 all entries have the size 1/√n.

    >>> hadamard(2, generator=torch.Generator().manual_seed(0)).abs()
    tensor([[0.7071, 0.7071],
            [0.7071, 0.7071]])
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    odd = n // (n & -n)
    matrix = torch.linalg.qr(torch.randn(odd, odd, generator=generator))[0]
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)]) / 2**0.5
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return matrix * signs[:, None]


class Rotation(nn.Module):
    """x · Q."""

    def __init__(self, matrix: Float[Tensor, "n n"]) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Rotates each row."""
        return x @ self.matrix


@torch.no_grad()
def fold_gains_(model: nn.Module) -> None:
    """Moves the gain of every RMSNorm into the layers that read it, so that the norm commutes with rotations.

    The gain before the head goes into the head; where that is tied to the embedding, it gets a matrix of its own.

    Raises:
        ValueError: for a model that is not Llama-like, or has no head.
    """
    require_llama(model.config)
    require_plain_layers(model)
    head, norm = model.get_output_embeddings(), model.model.norm
    untie_head_(model)
    for fold in folds(model, after_norms_only=True):
        for layer in fold.readers.values():
            layer.weight *= fold.source.weight
        fold.source.weight.fill_(1)
    head.weight *= norm.weight
    norm.weight.fill_(1)


@torch.no_grad()
def rotate_(model: nn.Module, *, generator: torch.Generator) -> None:
    """Rotates the residual stream and the inputs of down_proj of a Llama-like model; its logits stay.

    Raises:
        ValueError: see `fold_gains_`.
    """
    fold_gains_(model)
    rotation = hadamard(model.config.hidden_size, generator=generator).to(model.device, model.dtype)
    readers = [layer for fold in folds(model, after_norms_only=True) for layer in fold.readers.values()]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings(), *readers):
        layer.weight.copy_(layer.weight @ rotation)
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.copy_(rotation.T @ layer.weight)
            if layer.bias is not None:
                layer.bias.copy_(layer.bias @ rotation)
        down = block.mlp.down_proj
        block.mlp.down_proj = rotated_inputs(down, hadamard(down.in_features, generator=generator))


@torch.no_grad()
def rotated_inputs(layer: Linear, rotation: Float[Tensor, "n n"]) -> nn.Sequential:
    """The layer (its weight rotated in place) behind a rotation of its inputs, which QuaRot's kernels make cheap."""
    rotation = rotation.to(layer.weight)
    set_weight_(layer, weight_of(layer) @ rotation)
    return nn.Sequential(Rotation(rotation), layer)
