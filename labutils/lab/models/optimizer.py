"""Muon, the optimizer that trains LabLM: momentum whose matrices are made orthogonal before each step.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with its Newton-Schulz numbers.
`torch.optim.Muon` does the same in bfloat16, for which ordinary CPUs have no fast matrix product; hence float32 here.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(update: Float[Tensor, "batch rows columns"], steps: int = 5) -> Float[Tensor, "batch rows columns"]:
    """Moves every singular value of each matrix towards 1 by Newton-Schulz: X ← aX + (bA + cA²)X with A = XXᵀ.

    >>> orthogonalize(torch.diag(torch.tensor([3.0, 0.5]))[None]).diagonal(dim1=1, dim2=2).round(decimals=0)
    tensor([[1., 1.]])
    """
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for weight matrices; each rank orthogonalises its share of them.

    Args:
        params: 2-D parameters (out_features, in_features).
        lr: step size; the update's spectral norm is about lr · √max(1, out/in).
        momentum: decay of the gradient's moving sum.
        weight_decay: decoupled decay, multiplied by lr.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes 2-D parameters only; train embeddings, norms and biases with AdamW")

    @torch.no_grad()
    def step(self) -> None:
        """One step on every parameter from its .grad."""
        for group in self.param_groups:
            for params in _by_shape(group["params"]):
                self._step_same_shape(params, group)

    def _step_same_shape(self, params: list[Tensor], group: dict) -> None:
        nesterov = []
        for p in params:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.mul_(group["momentum"]).add_(p.grad)
            nesterov.append(p.grad.add(momentum, alpha=group["momentum"]))
        rows, columns = params[0].shape
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, update in zip(params, _orthogonalize_shared(torch.stack(nesterov)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def _by_shape(params: list[Tensor]) -> list[list[Tensor]]:
    shapes: dict[tuple, list[Tensor]] = {}
    for p in params:
        shapes.setdefault(tuple(p.shape), []).append(p)
    return list(shapes.values())


def _orthogonalize_shared(updates: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    if not dist.is_initialized():
        return orthogonalize(updates)
    shared = torch.zeros_like(updates)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    if len(updates[mine]):
        shared[mine] = orthogonalize(updates[mine])
    dist.all_reduce(shared)
    return shared
