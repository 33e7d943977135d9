"""The shared loop: parts add up, a killed run goes on along the same path, NaN stops it with the good state kept."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.training import loop, losses
from labutils.training.loop import FitPlan, fit_

PLAN = FitPlan(steps=8, lr=3e-3, warmup_steps=2, final_lr_share=0.1, weight_decay=0.1, max_grad_norm=1.0, save_every=3)


def model():
    return tiny_model("gpt2", std=0.02)


def parts_of(step):
    """Two parts of different size, with padding; a function of the step alone."""
    ids = random_ids(16, batch=3, seed=step)
    labels = ids.clone()
    labels[0, 5:] = losses.IGNORED
    return [(ids[:1], labels[:1]), (ids[1:], labels[1:])]


class Killed(Exception):
    pass


def killed_at(step):
    def parts(number):
        if number == step:
            raise Killed
        return parts_of(number)

    return parts


def test_killed_run_continues_the_same_trajectory(tmp_path):
    """GPT-2 has dropout: only with the random state restored do both runs drop the same."""
    unbroken, broken = model(), model()
    torch.manual_seed(0)
    expected = fit_(unbroken, parts_of, losses.text_loss(unbroken), PLAN)
    torch.manual_seed(0)
    with pytest.raises(Killed):
        fit_(broken, killed_at(5), losses.text_loss(broken), PLAN, state_path=tmp_path / "state.pt")
    again = model()
    torch.manual_seed(99)
    lines = []
    resumed = fit_(again, parts_of, losses.text_loss(again), PLAN, state_path=tmp_path / "state.pt", log=lines.append)
    assert resumed == pytest.approx(expected, abs=1e-6) and "min left" in lines[-1]
    for a, b in zip(unbroken.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not again.training


def test_nan_stops_with_the_step_named_and_the_last_good_state_kept(tmp_path):
    network, path = model(), tmp_path / "state.pt"
    honest = losses.text_loss(network)
    calls = []

    def loss_of(ids, labels):
        calls.append(1)
        return honest(ids, labels) * (float("nan") if len(calls) == 2 * 7 else 1.0)  # in the seventh step

    with pytest.raises(FloatingPointError, match="got nan at step 7"):
        fit_(network, parts_of, loss_of, PLAN, state_path=path)
    assert torch.load(path, weights_only=True)["step"] == 6
    assert all(p.isfinite().all() for p in network.parameters()) and not network.training


def test_parts_add_up_to_the_whole_batch():
    network = tiny_model("llama-gqa-tied")
    ids = random_ids(16, batch=4)
    labels = ids.clone()
    labels[0, 3:] = losses.IGNORED
    grads = []
    for cut in (1, 2, 4):
        parts = list(zip(ids.split(cut), labels.split(cut), strict=True))
        network.zero_grad()
        nats = loop.backward(parts, losses.text_loss(network), tokens=loop.targets_in(parts), device="cpu")
        grads.append((nats, network.model.embed_tokens.weight.grad.clone()))
    for nats, grad in grads[1:]:
        assert nats == pytest.approx(grads[0][0], rel=1e-5)
        torch.testing.assert_close(grad, grads[0][1], atol=1e-6, rtol=1e-4)


def test_mixed_precision_stays_near_and_keeps_float32_weights():
    def after(mixed):
        network = tiny_model("llama-gqa-tied")
        loss = fit_(network, parts_of, losses.text_loss(network), replace(PLAN, mixed_precision=mixed))
        return loss, next(network.parameters()).dtype

    (plain, _), (mixed, dtype) = after(False), after(True)
    assert mixed == pytest.approx(plain, rel=0.02) and mixed != plain and dtype == torch.float32


def test_a_state_of_another_plan_is_refused(tmp_path):
    network = model()
    fit_(network, parts_of, losses.text_loss(network), replace(PLAN, steps=2), state_path=tmp_path / "s.pt")
    with pytest.raises(ValueError, match="continues under its own plan"):
        fit_(network, parts_of, losses.text_loss(network), PLAN, state_path=tmp_path / "s.pt")


def test_frozen_parameters_do_not_move_and_after_step_is_called():
    network = tiny_model("llama-gqa-tied")
    network.model.embed_tokens.requires_grad_(False)
    before, steps = copy.deepcopy(network.state_dict()), []
    fit_(network, parts_of, losses.text_loss(network), PLAN, after_step=lambda: steps.append(1))
    assert torch.equal(before["model.embed_tokens.weight"], network.model.embed_tokens.weight) and len(steps) == 8
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], network.model.layers[0].mlp.up_proj.weight)


def test_learning_rate_by_hand():
    rates = [FitPlan(steps=6, lr=2.0, warmup_steps=2, final_lr_share=0.5).lr_at(step) for step in range(6)]
    assert rates[:2] == [1.0, 2.0] and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert min(rates[2:]) > 1.0
    assert {FitPlan(steps=6, lr=2.0).lr_at(step) for step in range(6)} == {2.0}


def test_forward_kl_follows_torch():
    student, teacher = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).unbind()
    reference = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    )
    torch.testing.assert_close(losses.forward_kl(student, teacher), reference)


def test_forward_kl_allows_a_teacher_that_excludes_tokens():
    teacher = torch.tensor([0.0, -torch.inf])
    assert losses.forward_kl(torch.zeros(2), teacher).item() == pytest.approx(0.6931, abs=1e-4)


def test_teacher_loss_counts_labels_only():
    student, teacher = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied", seed=1)
    ids = random_ids(12, batch=2)
    labels = ids.clone()
    labels[1] = losses.IGNORED
    both = losses.teacher_loss(student, teacher)(ids, labels)
    alone = losses.teacher_loss(student, teacher)(ids[:1], ids[:1])
    torch.testing.assert_close(both, alone)
    with pytest.raises(ValueError, match="at least one label"):
        losses.teacher_loss(student, teacher)(ids, torch.full_like(ids, losses.IGNORED))
    with pytest.raises(ValueError, match="evaluation mode"):
        losses.teacher_loss(student, teacher.train())
