"""Learning from inside the teacher: hidden states, their direction, and attention, layer by layer.

TinyBERT (Jiao et al. 2019, arXiv:1909.10351): the student's layer m looks up the teacher's layer g(m); a learnt matrix
takes the student's width to the teacher's, and is thrown away after training.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

States = Float[Tensor, "sequences tokens width"]
Kept = Bool[Tensor, "sequences tokens"]


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """g(m) of hidden state m, counted with the embedding's output as 0: equal steps through the teacher.

    Raises:
        ValueError: when the student is deeper than the teacher.

    >>> layer_map(2, 6)
    [0, 3, 6]
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"a student must have 1 to {teacher_layers} layers, its teacher's; got {student_layers}")
    return [round(m * teacher_layers / student_layers) for m in range(student_layers + 1)]


class Projections(nn.Module):
    """One matrix for each hidden state, from the student's width to the teacher's; at first it pads with zeros."""

    def __init__(self, count: int, *, student_width: int, teacher_width: int) -> None:
        super().__init__()
        matrices = [nn.Linear(student_width, teacher_width, bias=False) for _ in range(count)]
        for matrix in matrices:
            nn.init.eye_(matrix.weight)
        self.matrices = nn.ModuleList(matrices)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Each state through its own matrix."""
        return [matrix(state) for matrix, state in zip(self.matrices, states, strict=True)]


def hidden_loss(student: Sequence[States], teacher: Sequence[States], kept: Kept) -> Float[Tensor, ""]:
    """Mean squared distance of matched hidden states at the positions kept, each relative to the teacher's mean.

    TinyBERT's equation 8 has the bare mean square; divided by the teacher's, layers of different size weigh the same.

    Raises:
        ValueError: when the two differ in number or width.

    >>> hidden_loss([torch.ones(1, 1, 2)], [torch.full((1, 1, 2), 2.0)], torch.tensor([[True]]))
    tensor(0.2500)
    """
    _same_sizes([s.shape for s in student], [t.shape for t in teacher], what="hidden states")
    # Squares of more than 255 overflow in float16.
    pairs = [(s[kept].float(), t[kept].float()) for s, t in zip(student, teacher, strict=True)]
    losses = [((s - t) ** 2).mean() / (t**2).mean() for s, t in pairs]
    return torch.stack(losses).mean()


def cosine_loss(student: States, teacher: States, kept: Kept) -> Float[Tensor, ""]:
    """Mean of 1 − cos between the last hidden states: DistilBERT's third part (Sanh et al. 2019, arXiv:1910.01108).

    >>> cosine_loss(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]]), torch.tensor([[True]]))
    tensor(1.)
    """
    _same_sizes([student.shape], [teacher.shape], what="hidden states")
    return (1 - cosine_similarity(student[kept], teacher[kept], dim=-1)).mean()


def attention_loss(
    student: Sequence[Float[Tensor, "sequences heads tokens tokens"]],
    teacher: Sequence[Float[Tensor, "sequences teacher_heads tokens tokens"]],
    kept: Kept,
) -> Float[Tensor, ""]:
    """Mean squared difference of matched attention weights, over the rows (queries) kept; heads are averaged first.

    TinyBERT's equation 7 compares the scores before the softmax, head by head; Hugging Face gives the weights after it,
    and a student may have fewer heads.

    >>> even, first = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    >>> attention_loss([even], [first], torch.tensor([[True, True]]))
    tensor(0.2500)
    """
    pairs = [(s.mean(dim=1), t.mean(dim=1)) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([((s - t)[kept] ** 2).mean() for s, t in pairs]).mean()


def _same_sizes(student: list, teacher: list, *, what: str) -> None:
    if student != teacher:
        sizes = [[tuple(shape) for shape in side] for side in (student, teacher)]
        raise ValueError(f"{what} are compared at one size (use Projections); got {sizes[0]} and {sizes[1]}")
