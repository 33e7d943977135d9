"""Two thin matrices in place of one, and SliceGPT: turn the residual stream onto its principal axes, then cut."""

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.lab.layers.architecture import require_llama
from labutils.pruning.structured import READERS, WRITERS, rebuilt, require_removable


def rank_for(kept: float, *, out_features: int, in_features: int) -> int:
    """The largest rank whose two factors hold at most `kept` times the matrix's numbers; at least 1.

    r (out + in) ≤ kept · out · in: a square matrix saves nothing above half its rank.

    >>> rank_for(1.0, out_features=256, in_features=256)
    128
    """
    return max(1, int(kept * out_features * in_features / (out_features + in_features)))


def low_rank(
    weight: Float[Tensor, "out n"], rank: int, *, gram: Float[Tensor, "n n"] | None = None, damping: float = 1e-4
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r n"]]:
    """Factors L, R with L R ≈ W: the best in ‖W − L R‖ (Eckart and Young 1936), with gram the best in ‖X (W − L R)ᵀ‖.

    Activation-aware: with G + λI = S Sᵀ (Cholesky), the truncated SVD of W S, then R = Vᵀ S⁻¹ (SVD-LLM, Wang et al.
    2024, arXiv:2403.07378, section 3.1).

    Raises:
        ValueError: when rank lies outside 1 … min(out, in).
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must lie in 1 to {min(weight.shape)}; got {rank}")
    target, root = weight.double(), None
    if gram is not None:
        ridge = damping * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), device=gram.device)
        root = torch.linalg.cholesky((gram + ridge).double())
        target = target @ root
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    right = v[:rank]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return (u[:, :rank] * s[:rank]).to(weight.dtype), right.to(weight.dtype)


@torch.no_grad()
def principal_axes(model: nn.Module, batches: Iterable[Int[Tensor, "b positions"]]) -> Float[Tensor, "hidden hidden"]:
    """Orthogonal Q whose columns are the residual stream's principal axes, strongest first.

    Eigenvectors of Σ xxᵀ over what every norm reads, each x scaled to unit length as RMSNorm does.

    Raises:
        ValueError: when the model is not built like Llama.
    """
    require_llama(model.config)
    size = model.config.hidden_size
    second_moment = torch.zeros(size, size, dtype=torch.float64, device=model.device)

    def hook(_module, inputs: tuple) -> None:
        x = nn.functional.normalize(inputs[0].flatten(0, -2), dim=-1).double()
        second_moment.add_(x.T @ x)

    with ExitStack() as hooks:
        for norm in _norms(model):
            hooks.callback(norm.register_forward_pre_hook(hook).remove)
        for token_ids in batches:
            model(token_ids)
    return torch.linalg.eigh(second_moment).eigenvectors.flip(1).to(model.dtype)


def rotated(model: nn.Module, axes: Float[Tensor, "hidden hidden"]) -> nn.Module:
    """The same function with its residual stream turned: x becomes x Q.

    SliceGPT, Ashkboos et al. 2024 (arXiv:2401.15024), theorem 1. Norm gains move into the matrices that read (RMSNorm
    without a gain commutes with a rotation), readers become W Q, writers Qᵀ W. Embeddings and head part ways, since the
    head takes the last norm's gain. The paper turns every block by a Q of its own and pays with a matrix on each
    residual connection; one Q for all keeps the model ordinary.

    Raises:
        ValueError: when the model is not built like Llama, of plain layers.
    """
    require_removable(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"] * state["model.norm.weight"] @ axes
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ axes
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name in READERS:
            norm = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
            state[f"{layer}.{name}.weight"] = state[f"{layer}.{name}.weight"] * state[f"{layer}.{norm}.weight"] @ axes
        for name in WRITERS:
            for kind in ("weight", "bias"):
                if f"{layer}.{name}.{kind}" in state:
                    state[f"{layer}.{name}.{kind}"] = axes.T @ state[f"{layer}.{name}.{kind}"]
    for name, tensor in state.items():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            state[name] = torch.ones_like(tensor)
    return rebuilt(model, state, tie_word_embeddings=False)


def _norms(model: nn.Module) -> list[nn.Module]:
    each = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in model.model.layers]
    return [norm for pair in each for norm in pair] + [model.model.norm]
