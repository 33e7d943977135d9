"""Losses by hand, against torch, by finite differences and by their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import unchecked
from torch.distributions import Categorical, kl_divergence

from labutils.distillation import divergences, hidden, sparse
from labutils.lab.training.losses import forward_kl

EACH = pytest.mark.parametrize("name", divergences.DIVERGENCES)
EVEN, SKEWED = torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log()


def logits(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


BY_HAND = {
    "forward KL": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    "reverse KL": 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
    "Jensen-Shannon": 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
    + 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)),
    "skewed JS, 0.1": 0.1 * (0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475))
    + 0.9 * (0.5 * math.log(0.5 / 0.525) + 0.5 * math.log(0.5 / 0.475)),
    "total variation": 0.25,
}


@EACH
def test_divergence_by_hand(name):
    assert divergences.DIVERGENCES[name](EVEN, SKEWED).item() == pytest.approx(BY_HAND[name], abs=1e-6)


def test_kl_divergences_follow_torch():
    student, teacher = Categorical(logits=logits(6, 9)), Categorical(logits=logits(6, 9, seed=1))
    pair = (logits(6, 9), logits(6, 9, seed=1))
    torch.testing.assert_close(forward_kl(*pair), kl_divergence(teacher, student))
    torch.testing.assert_close(divergences.reverse_kl(*pair), kl_divergence(student, teacher))


@EACH
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), scale=st.floats(0.1, 10))
def test_divergence_is_zero_at_equality_never_negative_and_blind_to_shifts(name, seed, shift, scale):
    divergence = divergences.DIVERGENCES[name]
    student, teacher = logits(4, 7, seed=seed, scale=scale), logits(4, 7, seed=seed + 1, scale=scale)
    torch.testing.assert_close(divergence(student, student + shift), torch.zeros(4), atol=2e-5, rtol=0)
    value = divergence(student, teacher)
    assert (value > -1e-6).all() and (value > 1e-4).any()
    torch.testing.assert_close(divergence(student + shift, teacher - shift), value, atol=1e-4, rtol=1e-3)


@EACH
def test_gradient_agrees_with_finite_differences(name):
    divergence = divergences.at_temperature(divergences.DIVERGENCES[name], 1.5)
    student, teacher = logits(5).requires_grad_(), logits(5, seed=1)
    (gradient,) = torch.autograd.grad(divergence(student, teacher), student)
    step = 1e-2
    for i in range(5):
        nudge = torch.zeros(5).index_fill_(0, torch.tensor([i]), step)
        with torch.no_grad():
            slope = (divergence(student + nudge, teacher) - divergence(student - nudge, teacher)) / (2 * step)
        assert gradient[i].item() == pytest.approx(slope.item(), abs=2e-3)


KEPT = torch.tensor([[True, True, False]])
OTHERS = {
    "label smoothing": lambda x: divergences.label_smoothing(x.view(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), share=0.2),
    "article's": lambda x: divergences.article_loss(x),
    "bucket": lambda x: sparse.sparse_cross_entropy(x, sparse.top_k(logits(24, seed=1), 3)),
    "hidden states": lambda x: hidden.hidden_loss([x.view(1, 3, 8)], [logits(1, 3, 8, seed=1)], KEPT),
    "cosine": lambda x: hidden.cosine_loss(x.view(1, 3, 8), logits(1, 3, 8, seed=1), KEPT),
    "attention": lambda x: hidden.attention_loss(
        [x[:18].view(1, 2, 3, 3)], [logits(1, 4, 3, 3, seed=1).softmax(-1)], KEPT
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_have_the_gradient_of_finite_differences(name):
    """Central differences along three random directions."""
    loss, x = OTHERS[name], logits(24).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x).mean(), x)
    for seed in (2, 3, 4):
        way = logits(24, seed=seed, scale=1.0)
        with torch.no_grad():
            slope = (loss(x + 0.01 * way).mean() - loss(x - 0.01 * way).mean()) / 0.02
        assert (gradient @ way).item() == pytest.approx(slope.item(), abs=2e-3, rel=2e-3)


def test_label_smoothing_follows_torch():
    scores, labels = logits(5, 7), torch.tensor([0, 3, 6, 2, 2])
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.3)(scores, labels)
    torch.testing.assert_close(divergences.label_smoothing(scores, labels, share=0.3).mean(), expected)


def test_jensen_shannon_tends_to_both_kls():
    student, teacher = logits(3, 6), logits(3, 6, seed=1)
    low, high = (divergences.jensen_shannon(student, teacher, beta=b) for b in (1e-4, 1 - 1e-4))
    torch.testing.assert_close(low / 1e-4, forward_kl(student, teacher), atol=0.02, rtol=0.02)
    torch.testing.assert_close(high / 1e-4, divergences.reverse_kl(student, teacher), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="between 0 and 1"):
        divergences.jensen_shannon(student, teacher, beta=1.0)


def gradient_norm(temperature, *, with_factor):
    student, teacher = logits(64, 50).requires_grad_(), logits(64, 50, seed=1)
    loss = divergences.at_temperature(forward_kl, temperature)(student, teacher).mean()
    loss = loss if with_factor else loss / temperature**2
    return torch.autograd.grad(loss, student)[0].norm().item()


def test_temperature_squared_keeps_the_gradient_at_one_size():
    with_factor = [gradient_norm(t, with_factor=True) for t in (4.0, 8.0, 16.0)]
    without = [gradient_norm(t, with_factor=False) for t in (4.0, 8.0, 16.0)]
    assert max(with_factor) / min(with_factor) < 1.15
    assert without[0] / without[2] == pytest.approx(16, rel=0.15)


def test_high_temperature_matches_logits():
    """T → ∞: the gradient is the difference of centred logits over the vocabulary (Hinton, equation 4)."""
    student, teacher = logits(8).requires_grad_(), logits(8, seed=1)
    loss = divergences.at_temperature(forward_kl, 1000.0)(student.double(), teacher.double())
    (gradient,) = torch.autograd.grad(loss, student)
    centred = (student - student.mean()) - (teacher - teacher.mean())
    torch.testing.assert_close(gradient, centred.detach() / 8, atol=0.01, rtol=0.05)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="must be positive; got 0"):
        divergences.at_temperature(forward_kl, 0)


def best_bell(divergence):
    """Centre and width of the one bell that comes closest to two bells, at 8 and 24, the second half as likely."""
    x = torch.arange(32.0)
    two = torch.logaddexp(-((x - 8) ** 2) / 8, -((x - 24) ** 2) / 8 + math.log(0.5))
    shape = torch.tensor([11.0, 1.0], requires_grad=True)
    optimizer = torch.optim.Adam([shape], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        divergence(-((x - shape[0]) ** 2) / (2 * shape[1].exp() ** 2), two).backward()
        optimizer.step()
    return shape[0].item(), shape[1].exp().item()


def test_reverse_kl_picks_a_mode_where_forward_kl_covers_both():
    centre, width = best_bell(divergences.reverse_kl)
    assert centre == pytest.approx(8, abs=1) and width < 3
    centre, width = best_bell(forward_kl)
    assert 10 < centre < 20 and width > 5


def test_label_smoothing_by_hand():
    value = divergences.label_smoothing(SKEWED[None], torch.tensor([0]), share=0.2)
    assert value.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25), abs=1e-6)


def test_article_loss_rewards_any_confident_answer():
    sure = torch.tensor([[30.0, 0.0, 0.0], [0.0, 30.0, 0.0]])
    assert divergences.article_loss(sure).max() < 1e-6
    assert divergences.article_loss(torch.zeros(3)).item() == pytest.approx(math.log(3), abs=1e-6)


def test_whole_vocabulary_gives_the_whole_loss():
    student, teacher = logits(4, 9).requires_grad_(), logits(4, 9, seed=1)
    stored = sparse.sparse_cross_entropy(student, sparse.top_k(teacher, 9))
    entropy = Categorical(logits=teacher).entropy()
    torch.testing.assert_close(stored - entropy, forward_kl(student, teacher), atol=1e-5, rtol=1e-4)


def test_bucket_by_hand():
    targets = sparse.SparseTargets(torch.tensor([1]), torch.tensor([0.5]))
    student = torch.tensor([0.2, 0.3, 0.5]).log()
    wanted = -0.5 * math.log(0.3) - 0.5 * math.log(0.7)
    assert sparse.sparse_cross_entropy(student, targets).item() == pytest.approx(wanted, abs=1e-6)


def fitted(targets_of, steps=1500):
    """The student's probabilities after training on what `targets_of()` gives each time."""
    student = torch.zeros(12, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        sparse.sparse_cross_entropy(student, targets_of()).backward()
        optimizer.step()
    return student.softmax(-1).detach()


def test_rescaled_top_k_teaches_too_much_confidence_and_both_cures_do_not():
    teacher = logits(12, scale=1.0)
    true = teacher.softmax(-1)
    three = sparse.top_k(teacher, 3)
    naive, bucket = fitted(lambda: three.rescaled()), fitted(lambda: three)
    assert naive[three.ids].sum() > 0.98 > 0.8 > true[three.ids].sum()
    torch.testing.assert_close(bucket[three.ids], true[three.ids], atol=0.01, rtol=0)
    generator = torch.Generator().manual_seed(0)

    def three_drawn_often():
        many = sparse.drawn(teacher.expand(64, 12), 3, generator=generator)
        return sparse.SparseTargets(many.ids.flatten(), many.probs.flatten() / 64)

    torch.testing.assert_close(fitted(three_drawn_often, steps=600), true, atol=0.05, rtol=0)


def test_drawn_gradient_is_right_on_average():
    student, teacher = logits(10).requires_grad_(), logits(10, seed=1, scale=1.0)
    many = sparse.drawn(teacher.expand(4000, 10), 5, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(sparse.sparse_cross_entropy(student.expand(4000, 10), many).mean(), student)
    (wanted,) = torch.autograd.grad(forward_kl(student, teacher), student)
    torch.testing.assert_close(gradient, wanted, atol=0.01, rtol=0)


def test_sparse_targets_refuse_impossible_numbers():
    with pytest.raises(ValueError, match="k must lie in 1 to the vocabulary's 2"):
        sparse.top_k(EVEN, 3)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        sparse.drawn(EVEN, 0, generator=torch.Generator())


def test_hidden_losses_by_hand_and_only_where_kept():
    kept = torch.tensor([[True, False]])
    student, teacher = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 1.0], [-5.0, 0.0]]])
    assert hidden.hidden_loss([student], [teacher], kept).item() == pytest.approx(0.5)
    assert hidden.cosine_loss(student, teacher, kept).item() == pytest.approx(1 - 2**-0.5)
    assert hidden.hidden_loss([teacher], [teacher], kept) == 0
    with unchecked(), pytest.raises(ValueError, match="use Projections"):
        hidden.hidden_loss([torch.ones(1, 2, 3)], [teacher], kept)


def test_cosine_follows_torch():
    student, teacher = logits(2, 3, 8), logits(2, 3, 8, seed=1)
    kept = torch.ones(2, 3, dtype=torch.bool)
    reference = torch.nn.functional.cosine_embedding_loss(student.flatten(0, 1), teacher.flatten(0, 1), torch.ones(6))
    torch.testing.assert_close(hidden.cosine_loss(student, teacher, kept), reference)


def test_attention_averages_heads_and_ignores_rows_left_out():
    student, teacher = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]] * 2]).reshape(1, 2, 2, 2)
    assert hidden.attention_loss([student], [teacher], torch.tensor([[True, False]])).item() == pytest.approx(0.25)
    teacher[:, :, 1] = 7.0
    assert hidden.attention_loss([student], [teacher], torch.tensor([[True, False]])).item() == pytest.approx(0.25)


def test_projections_start_as_padding_and_learn():
    projections = hidden.Projections(2, student_width=3, teacher_width=5)
    state = torch.ones(1, 1, 3)
    assert projections([state, state])[1].tolist() == [[[1, 1, 1, 0, 0]]]
    assert all(p.requires_grad for p in projections.parameters())


def test_layer_map_takes_equal_steps():
    assert hidden.layer_map(3, 12) == [0, 4, 8, 12] and hidden.layer_map(1, 6) == [0, 6]
    with pytest.raises(ValueError, match="1 to 6 layers"):
        hidden.layer_map(7, 6)
