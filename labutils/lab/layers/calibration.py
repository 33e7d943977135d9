"""What flows into a model's linear layers: inputs watched while the model reads calibration text.

Quantization and pruning both ask it: GPTQ and SparseGPT for X^T X, Wanda for the norms, AWQ for mean |x|, SmoothQuant
and static scales for max |x|. The sums are taken batch by batch, so that memory does not grow with the text.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from labutils.lab.layers.linears import Linear, linear_layers, weight_of


@dataclass
class InputStatistics:
    """Sums over all rows x (one row a position) that entered a layer; `in_features` = n.

    Attributes:
        rows: how many.
        absmax: max |x_j|.
        sum_abs: sum of |x_j|.
        gram: X^T X, or None where it was not asked for (n squared numbers for each layer).
        squares: sum of x_j^2, the diagonal of the Gram matrix.
    """

    rows: int
    absmax: Float[Tensor, " n"]
    sum_abs: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    gram: Float[Tensor, "n n"] | None

    @classmethod
    def empty(cls, layer: Linear, *, with_gram: bool) -> "InputStatistics":
        """Nothing seen yet of what enters a layer."""
        in_features, device = weight_of(layer).shape[1], layer.weight.device
        zeros = [torch.zeros(in_features, device=device) for _ in range(3)]
        gram = torch.zeros(in_features, in_features, device=device) if with_gram else None
        return cls(0, *zeros, gram)

    def add_(self, x: Float[Tensor, "rows n"]) -> None:
        """Takes in more rows."""
        x = x.float()
        self.rows += len(x)
        torch.maximum(self.absmax, x.abs().amax(dim=0), out=self.absmax)
        self.sum_abs += x.abs().sum(dim=0)
        self.squares += (x * x).sum(dim=0)
        if self.gram is not None:
            self.gram += x.T @ x

    @property
    def mean_abs(self) -> Float[Tensor, " n"]:
        """Mean of |x_j|: AWQ's measure of a channel's importance."""
        return self.sum_abs / self.rows

    @property
    def norms(self) -> Float[Tensor, " n"]:
        """||X_j||_2: Wanda's measure of a channel's importance."""
        return self.squares.sqrt()


@torch.no_grad()
def input_statistics(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "b positions"]],
    *,
    with_gram: bool = False,
    with_head: bool = False,
    only: Callable[[str], bool] = lambda name: True,
) -> dict[str, InputStatistics]:
    """Statistics of every linear layer's inputs, by the layer's name, while the model reads token ids.

    Args:
        model: a Hugging Face model; it is left as it was.
        batches: token ids without padding.
        with_gram: also sum X^T X.
        with_head: watch the layer that makes logits too.
        only: tells by name which layers to watch.

    Raises:
        ValueError: when there is no batch, or when an input is not finite.
    """
    layers = [(name, layer) for name, layer in linear_layers(model, with_head=with_head) if only(name)]
    # All sums first: where they lie among what the model needs for a moment, that memory cannot be given back.
    found = {name: InputStatistics.empty(layer, with_gram=with_gram) for name, layer in layers}

    def watch(seen: InputStatistics) -> Callable[[nn.Module, tuple], None]:
        return lambda _module, inputs: seen.add_(inputs[0].detach().flatten(0, -2))

    with ExitStack() as hooks:
        for name, layer in layers:
            hooks.callback(layer.register_forward_pre_hook(watch(found[name])).remove)
        for token_ids in batches:
            model(token_ids.to(next(model.parameters()).device))
    found = {name: statistics for name, statistics in found.items() if statistics.rows}
    if not found:
        raise ValueError("calibration needs at least one batch that reaches a linear layer; got none")
    for name, statistics in found.items():
        if not statistics.absmax.isfinite().all():
            raise ValueError(f"a layer's inputs must be finite; got inf or nan in {name}")
    return found


def layer_error(weight: Float[Tensor, "out n"], changed: Float[Tensor, "out n"], gram: Float[Tensor, "n n"]) -> float:
    """||X (W − Ŵ)ᵀ||² / ||X Wᵀ||², from XᵀX alone: what a changed weight does to the layer's outputs.

    >>> layer_error(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2))
    0.25
    """
    difference = (weight - changed).double()
    of_gram = gram.double()
    whole = ((weight.double() @ of_gram) * weight.double()).sum()
    return (((difference @ of_gram) * difference).sum() / whole).item()


def inverse_factor(gram: Float[Tensor, "n n"], *, damping: float = 0.01) -> Float[Tensor, "n n"]:
    """Upper triangular U with Uᵀ U = (H + λI)⁻¹, where H = 2 XᵀX and λ = damping · mean(diag H), in float64.

    Row j of U holds all that GPTQ and SparseGPT need of H⁻¹ once the columns before j are fixed (Frantar et al. 2022,
    arXiv:2210.17323, section 3.3). The factor 2 and the number of rows cancel in their updates; an input that was
    always 0 gets a diagonal of 1, for its weight changes nothing.

    Raises:
        ValueError: when the Gram matrix is not finite, or has no inverse with so little damping.
    """
    if not gram.isfinite().all():
        raise ValueError("the Gram matrix must be finite; got inf or nan")
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    root, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise ValueError(f"the Gram matrix needs more damping to have an inverse; got damping={damping}")
    return torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
