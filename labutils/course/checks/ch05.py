"""Checks of chapter 05, first part: soft targets, temperature, Hinton's loss, Jensen-Shannon."""

from functools import partial

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from labutils.course.checks import exercise, expect_function, expect_true
from labutils.distillation import divergences
from labutils.lab.training.losses import forward_kl


def _random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pair(positions=3, vocab=5):
    return {"student_logits": _random(positions, vocab), "teacher_logits": _random(positions, vocab, seed=1)}


def _entropy(logits):
    return divergences.article_loss(logits).mean()


def _torch_kl(kind, reduction="batchmean"):
    return lambda student_logits, teacher_logits: kl_div(
        kind(student_logits, dim=-1), softmax(teacher_logits, dim=-1), reduction=reduction
    )


def _expect_gradient(answer, student_logits, *rest):
    """A loss whose gradient is cut off trains nobody."""
    loss = answer(student_logits.clone().requires_grad_(), *rest)
    hint = "return the tensor itself: .item(), .detach() and torch.no_grad() cut the student off"
    expect_true(getattr(loss, "requires_grad", False), "the loss has no gradient for the student", hint=hint)


@exercise("5.1")
def soft_loss(answer):
    """Mean over positions of KL(teacher ‖ student)."""

    def reference(student_logits, teacher_logits):
        return forward_kl(student_logits, teacher_logits).mean()

    expect_function(
        answer,
        reference,
        cases=[_pair(), {"student_logits": torch.zeros(1, 2), "teacher_logits": torch.tensor([[3.0, 1.0]]).log()}],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda student_logits, teacher_logits: _entropy(student_logits),
                "that is the article's loss, the student's own entropy: the teacher must be the target",
            ),
            (
                lambda student_logits, teacher_logits: divergences.reverse_kl(student_logits, teacher_logits).mean(),
                "the other way round: weight the difference of the logarithms with the teacher's probabilities",
            ),
            (
                lambda student_logits, teacher_logits: (
                    reference(student_logits, teacher_logits) + _entropy(teacher_logits)
                ),
                "that is the cross-entropy, which does not end at 0: subtract the teacher's entropy",
            ),
            (
                lambda student_logits, teacher_logits: -reference(student_logits, teacher_logits),
                "the sign is wrong: it must never be negative (ln teacher minus ln student)",
            ),
            (
                lambda student_logits, teacher_logits: forward_kl(student_logits, teacher_logits).sum(),
                "summed over the positions: sum over the vocabulary, then take the mean over the positions",
            ),
            (_torch_kl(log_softmax, "mean"), "averaged over the vocabulary too: sum over it (reduction='batchmean')"),
            (_torch_kl(softmax), "kl_div takes the student's LOGARITHMS: log_softmax, not softmax"),
        ],
    )
    _expect_gradient(answer, *_pair().values())


@exercise("5.2")
def soften(answer):
    """softmax(z / T)."""

    def reference(logits, temperature):
        return softmax(logits / temperature, dim=-1)

    expect_function(
        answer,
        reference,
        cases=[
            {"logits": torch.tensor([[2.0, 0.0, -1.0]]), "temperature": 2.0},
            {"logits": _random(2, 4), "temperature": 0.5},
        ],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda logits, temperature: softmax(logits * temperature, dim=-1),
                "multiplied: a higher temperature must flatten, so divide the logits by it",
            ),
            (
                lambda logits, temperature: softmax(logits, dim=-1) / temperature,
                "the probabilities were divided and no longer sum to 1: divide the logits before the softmax",
            ),
            (
                lambda logits, temperature: softmax(logits, dim=-1),
                "the temperature is unused: divide the logits by it",
            ),
            (
                lambda logits, temperature: softmax(logits / temperature, dim=0),
                "normalised over the wrong axis: the vocabulary is the last, dim=-1",
            ),
            (
                lambda logits, temperature: logits / temperature,
                "those are still logits: take the softmax of them",
            ),
            (
                lambda logits, temperature: log_softmax(logits / temperature, dim=-1),
                "those are logarithms: probabilities were asked for",
            ),
        ],
    )


def _hinton(student_logits, teacher_logits, labels, temperature, soft, *, power=2, both=True, flip=False, hot=False):
    theirs = teacher_logits / (temperature if both else 1)
    kd = temperature**power * forward_kl(student_logits / temperature, theirs).mean()
    ce = cross_entropy(student_logits / (temperature if hot else 1), labels)
    share = 1 - soft if flip else soft
    return share * kd + (1 - share) * ce


@exercise("5.3")
def hinton_loss(answer):
    """λ T² KL + (1 − λ) CE."""
    case = _pair(4, 6) | {"labels": torch.tensor([0, 5, 2, 2])}

    def wrong(**change):
        def loss(student_logits, teacher_logits, labels, temperature, soft):
            return _hinton(student_logits, teacher_logits, labels, temperature, soft, **change)

        return loss

    def unweighted(student_logits, teacher_logits, labels, temperature, soft):
        kd = temperature**2 * forward_kl(student_logits / temperature, teacher_logits / temperature).mean()
        return soft * kd + cross_entropy(student_logits, labels)

    expect_function(
        answer,
        _hinton,
        cases=[case | {"temperature": 2.0, "soft": 0.7}, case | {"temperature": 4.0, "soft": 0.2}],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (wrong(power=0), "T² is missing: without it the soft part's gradient shrinks as T grows"),
            (wrong(power=1), "T where T² belongs: the gradient shrinks by 1/T twice, once for each side"),
            (wrong(both=False), "only the student was softened: divide both sides' logits by T"),
            (wrong(hot=True), "the hard part was softened too: labels are compared at temperature 1"),
            (wrong(flip=True), "the weights are swapped: `soft` belongs to the teacher's part"),
            (unweighted, "the hard part's weight is missing: (1 - soft)"),
        ],
    )
    _expect_gradient(answer, *case.values(), 2.0, 0.7)


def _halves(student_probs, teacher_probs, *, log=torch.log, mixture=None):
    m = (student_probs + teacher_probs) / 2 if mixture is None else mixture(student_probs, teacher_probs)
    return [(p * (log(p) - log(m))).sum(-1) for p in (teacher_probs, student_probs)]


def _half_sum(student_probs, teacher_probs, **change):
    return sum(_halves(student_probs, teacher_probs, **change)) / 2


def _kl(p, q):
    return (p * (p / q).log()).sum(-1)


@exercise("5.4")
def jensen_shannon(answer):
    """½ KL(T ‖ m) + ½ KL(S ‖ m)."""
    student, teacher = softmax(_random(2, 4), -1), softmax(_random(2, 4, seed=1), -1)
    expect_function(
        answer,
        _half_sum,
        cases=[
            {"student_probs": torch.tensor([[0.5, 0.5]]), "teacher_probs": torch.tensor([[0.75, 0.25]])},
            {"student_probs": student, "teacher_probs": teacher},
        ],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda student_probs, teacher_probs: (
                    (_kl(student_probs, teacher_probs) + _kl(teacher_probs, student_probs)) / 2
                ),
                "that is the mean of the two KLs (Jeffreys): both sides are compared with the mixture m",
            ),
            (
                lambda student_probs, teacher_probs: 2 * _half_sum(student_probs, teacher_probs),
                "halve it: ½ of each KL",
            ),
            (
                lambda student_probs, teacher_probs: _halves(student_probs, teacher_probs)[0] / 2,
                "only the teacher was compared with the mixture: add the student's half",
            ),
            (
                lambda student_probs, teacher_probs: _halves(student_probs, teacher_probs)[1] / 2,
                "only the student was compared with the mixture: add the teacher's half",
            ),
            (
                partial(_half_sum, mixture=lambda s, t: (s * t).sqrt()),
                "that mixture is the geometric mean and does not sum to 1: take (student + teacher) / 2",
            ),
            (partial(_half_sum, log=torch.log2), "that is in bits: nats were asked for, so take log, not log2"),
        ],
    )
