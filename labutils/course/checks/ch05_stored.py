"""Checks of chapter 05, second part: stored targets, padding, hidden states, accepted drafts."""

import torch
from torch.nn.functional import log_softmax, softmax

from labutils.course.checks import exercise, expect_function
from labutils.distillation import hidden, sparse
from labutils.distillation.acceptance import acceptance_rate


def _random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("5.5")
def bucket_loss(answer):
    """Cross-entropy over k stored tokens and one bucket for the rest."""

    def reference(student_logits, ids, probs):
        return sparse.sparse_cross_entropy(student_logits, sparse.SparseTargets(ids, probs))

    def inside(student_logits, ids, probs):
        return -(probs * log_softmax(student_logits, dim=-1).gather(-1, ids)).sum(-1)

    def no_student_rest(student_logits, ids, probs):
        rest = 1 - probs.sum(-1)
        return inside(student_logits, ids, probs) - rest * rest.log()

    def among_stored(student_logits, ids, probs):
        return -(probs * log_softmax(student_logits.gather(-1, ids), dim=-1)).sum(-1)

    def plus(student_logits, ids, probs):
        return 2 * inside(student_logits, ids, probs) - reference(student_logits, ids, probs)

    logits, teacher = _random(3, 8), sparse.top_k(_random(3, 8, seed=1) / 2, 3)
    expect_function(
        answer,
        reference,
        cases=[{"student_logits": logits, "ids": teacher.ids, "probs": teacher.probs}],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (inside, "the rest is missing: what the stored tokens leave to 1 is one more target"),
            (
                lambda student_logits, ids, probs: inside(student_logits, ids, probs / probs.sum(-1, keepdim=True)),
                "rescaled to 1: that teaches that nothing else exists; add the rest as a bucket",
            ),
            (among_stored, "the student's softmax saw only the stored tokens: take it over the whole vocabulary"),
            (no_student_rest, "the rest's logarithm is the STUDENT's: ln(1 - sum of its probabilities at ids)"),
            (plus, "the rest's part has the wrong sign: it is subtracted, like the others"),
            (
                lambda student_logits, ids, probs: reference(student_logits, ids, probs).mean(),
                "return one number for each position, not their mean",
            ),
        ],
    )


@exercise("5.6")
def mean_where_counted(answer):
    """Mean over predicted positions whose label is not −100; labels shifted by one."""

    def reference(values, labels):
        counts = labels[:, 1:] != -100
        return values[counts].mean()

    values = _random(2, 4).abs()
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 3, -100, -100, -100]])
    other = torch.tensor([[5, -100, -100, 1, 2], [6, 4, 3, -100, -100]])
    expect_function(
        answer,
        reference,
        cases=[{"values": values, "labels": labels}, {"values": values, "labels": other}],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda values, labels: values.mean(),
                "padding and prompt were counted: leave out where the label is -100",
            ),
            (
                lambda values, labels: (values * (labels[:, 1:] != -100)).mean(),
                "the sum is right, but divided by all positions: divide by how many count",
            ),
            (
                lambda values, labels: values[labels[:, :-1] != -100].mean(),
                "off by one: position t predicts label t + 1, so drop the FIRST column of the labels",
            ),
            (
                lambda values, labels: torch.stack(
                    [v[k].mean() for v, k in zip(values, labels[:, 1:] != -100, strict=True)]
                ).mean(),
                "a mean of each row's mean: a short answer's tokens would weigh more than a long one's",
            ),
            (lambda values, labels: values[labels[:, 1:] != -100].sum(), "that is the sum: divide by how many count"),
            (
                lambda values, labels: values[labels[:, 1:] == -100].mean(),
                "the mask is inverted: keep what is NOT -100",
            ),
        ],
    )


@exercise("5.7")
def hidden_distance(answer):
    """Relative mean square between projected student states and the teacher's."""

    def reference(student, teacher, projection):
        kept = torch.ones(1, len(student), dtype=torch.bool)
        return hidden.hidden_loss([(student @ projection.T)[None]], [teacher[None]], kept)

    def other(student, teacher, projection, *, base=None):
        gap = ((student @ projection.T - teacher) ** 2).mean()
        return gap if base is None else gap / base(student @ projection.T, teacher)

    make = {"student": _random(5, 3), "teacher": _random(5, 3, seed=1), "projection": _random(3, 3, seed=2)}
    expect_function(
        answer,
        reference,
        cases=[make, make | {"teacher": _random(5, 4, seed=3), "projection": _random(4, 3, seed=4)}],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda student, teacher, projection: reference(student, teacher, projection.T),
                "the projection is (teacher width, student width), as nn.Linear stores it: student @ projection.T",
            ),
            (other, "divide by the teacher's mean square, so that loud layers do not count more"),
            (
                lambda student, teacher, projection: other(
                    student, teacher, projection, base=lambda s, t: (s**2).mean()
                ),
                "divided by the student's mean square: it could then win by growing; divide by the teacher's",
            ),
            (
                lambda student, teacher, projection: reference(student, teacher, projection).sqrt(),
                "that is the root: the square itself was asked for",
            ),
            (
                lambda student, teacher, projection: (
                    (student @ projection.T - teacher).abs().mean() / teacher.abs().mean()
                ),
                "absolute values where squares belong",
            ),
        ],
    )


@exercise("5.8")
def acceptance(answer):
    """Σ min(p, q), averaged over positions."""

    def reference(draft_probs, target_probs):
        return acceptance_rate(draft_probs, target_probs).mean()

    draft, target = softmax(_random(3, 6), -1), softmax(_random(3, 6, seed=1), -1)
    expect_function(
        answer,
        reference,
        cases=[
            {"draft_probs": torch.tensor([[0.9, 0.1]]), "target_probs": torch.tensor([[0.5, 0.5]])},
            {"draft_probs": draft, "target_probs": target},
        ],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda draft_probs, target_probs: (draft_probs * target_probs).sum(-1).mean(),
                "that is how often two independent draws agree: a draft token is kept with probability min(1, q / p)",
            ),
            (
                lambda draft_probs, target_probs: 1 - reference(draft_probs, target_probs),
                "that is the share refused, the total variation: 1 minus it is kept",
            ),
            (
                lambda draft_probs, target_probs: (draft_probs.argmax(-1) == target_probs.argmax(-1)).float().mean(),
                "that is agreement of the favourites: here tokens are drawn, so sum the smaller probabilities",
            ),
            (
                lambda draft_probs, target_probs: torch.maximum(draft_probs, target_probs).sum(-1).mean(),
                "the larger probability at each token sums to more than 1: take the smaller",
            ),
            (
                lambda draft_probs, target_probs: torch.minimum(draft_probs, target_probs).mean(),
                "averaged over the vocabulary: sum over it, then take the mean over the positions",
            ),
            (
                lambda draft_probs, target_probs: torch.minimum(draft_probs, target_probs).sum(),
                "summed over the positions too: take their mean",
            ),
        ],
    )
