"""Why a row's logits depend on the rows beside it, and how to keep them from it.

Rounded sums depend on their order: (a + b) + c and a + (b + c) differ in the last bits. A matrix kernel chooses its
order by the shapes it is given, so a customer's logits change with the number of customers served at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class RowByRow(TorchFunctionMode):
    """Inside `with RowByRow():`, linear layers and attention compute each row of a batch as if it were alone.

    Then every kernel sees the shapes of batch 1, whatever the batch, and a row's bits stay the same. It does not make a
    prompt read at once and a prompt read in chunks agree: those differ in the number of positions.

    Larger systems write kernels with one fixed order instead, which costs less (He et al. 2025, batch_invariant_ops).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs one function of PyTorch, row by row if it sums over features or positions."""
        kwargs = kwargs or {}
        if func not in (linear, scaled_dot_product_attention) or len(args[0]) < 2:
            return func(*args, **kwargs)
        batched = 1 if func is linear else 3  # x, or query, key and value; then weight and bias, or nothing
        rows = []
        for i in range(len(args[0])):
            one = [a[i : i + 1] if n < batched else a for n, a in enumerate(args)]
            rows.append(func(*one, **{name: _row(value, i, len(args[0])) for name, value in kwargs.items()}))
        return torch.cat(rows)


def _row(value: object, row: int, batch: int) -> object:
    """The part of a mask that belongs to a row; other settings as they are."""
    return value[row : row + 1] if isinstance(value, Tensor) and value.ndim == 4 and len(value) == batch else value
