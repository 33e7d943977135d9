"""The shape checker sees wrong ranks, dtypes and axes that disagree, and is really at work on `labutils`."""

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from jaxtyping import Float, Int
from shapes import checked, unchecked
from torch import Tensor

from labutils.lab.layers.calibration import layer_error
from labutils.lab.models.mixture import repeated


@checked
def product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    return left @ right


@checked
def pair(rows: list[Int[Tensor, " n"]], mask: Int[Tensor, " n"] | None = None) -> tuple[Int[Tensor, " n"], int]:
    return rows[0], len(rows)


@checked
def turned(x: Float[Tensor, "n m"]) -> Float[Tensor, "m n"]:
    return x


@checked
@dataclass
class Scored:
    tokens: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]


@checked
def plain(text: str, count: int) -> str:
    return text * count


def test_shapes_that_fit_pass():
    assert product(torch.zeros(2, 3), torch.zeros(3, 4)).shape == (2, 4)
    assert pair([torch.tensor([1, 2])])[1] == 1
    assert turned(torch.zeros(3, 3)).shape == (3, 3)
    assert Scored(torch.tensor([1, 2]), torch.zeros(2)).tokens.shape == (2,)
    assert plain("ab", 2) == "abab"  # no array in it: nothing to check


@pytest.mark.parametrize(
    "call",
    [
        lambda: product(torch.zeros(2, 3), torch.zeros(4, 3)),
        lambda: product(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 4)),
        lambda: product(torch.zeros(3), torch.zeros(3, 4)),
        lambda: pair([torch.tensor([1, 2]), torch.tensor([1])]),
        lambda: pair([torch.tensor([1, 2])], torch.tensor([1])),
        lambda: turned(torch.zeros(2, 3)),
        lambda: Scored(torch.tensor([1, 2]), torch.zeros(3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_labutils_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        repeated(torch.zeros(2, 2, dtype=torch.long), period=1)
    with unchecked(), pytest.raises(RuntimeError):
        layer_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        layer_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 4))
