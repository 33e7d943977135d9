"""The shared loop: parts add up, a killed run goes on along the same path, NaN stops it with the good state kept."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.lab.training import loop, losses
from labutils.lab.training.loop import FitPlan, fit_

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


def test_a_part_without_a_counted_label_is_left_out():
    """A long prompt cut at the context's end leaves such rows; a mean over nothing times 0 would be NaN."""
    network, ids = tiny_model("llama-gqa-tied"), random_ids(16)
    silent = torch.full_like(ids, losses.IGNORED)
    silent[0, 0] = ids[0, 0]  # the first label is predicted from nothing
    for loss_of in (losses.text_loss(network), losses.teacher_loss(network, tiny_model("llama-gqa-tied", seed=1))):
        whole, grads = [(ids, ids)], []
        for parts in (whole, [(ids, silent), *whole, (ids, silent)]):
            network.zero_grad()
            nats = loop.backward(parts, loss_of, tokens=loop.targets_in(parts), device="cpu")
            grads.append((nats, network.model.embed_tokens.weight.grad.clone()))
        assert grads[0][0] == grads[1][0] and torch.equal(grads[0][1], grads[1][1])
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(ValueError, match="a step needs at least one label that counts"):
            fit_(network, lambda step: [(ids, silent)], loss_of, PLAN)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="a loss needs at least one label that counts"):
        losses.text_loss(network)(ids, silent)


class Root(torch.nn.Module):
    """At a = 0 the loss is finite and its gradient 0 · ∞; clipping would spread the NaN to v."""

    def __init__(self, a):
        super().__init__()
        self.a, self.v = torch.nn.Parameter(torch.tensor([a])), torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def loss(self, ids, labels):
        return self.a.pow(2).sum().sqrt() + self.v.pow(2).sum()


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_no_number_stops_before_the_step(tmp_path, max_grad_norm):
    plan, path, ids = (
        FitPlan(steps=5, lr=0.1, max_grad_norm=max_grad_norm, save_every=1),
        tmp_path / "s.pt",
        random_ids(3),
    )
    network = Root(0.0)
    with pytest.raises(FloatingPointError, match="gradient's norm must be a number; got nan at step 1"):
        fit_(network, lambda step: [(ids, ids)], network.loss, plan, state_path=path)
    assert not path.exists() and network.a == 0 and network.v.tolist() == [1.0, 2.0]
    network = Root(1.0)
    calls = iter(range(1, 9))

    def too_steep(*part):
        return network.loss(*part) * (1e30 if next(calls) == 3 else 1)

    with pytest.raises(FloatingPointError, match="got inf at step 3"):
        fit_(network, lambda step: [(ids, ids)], too_steep, plan, state_path=path)
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == 2 and torch.equal(saved["model"]["v"], network.v)


def test_a_weight_or_a_state_that_is_no_number_is_never_saved(tmp_path):
    network, path, ids = Root(1.0), tmp_path / "s.pt", random_ids(3)
    plan = FitPlan(steps=4, lr=0.1, save_every=1)
    steps = iter(range(9))

    def spoil():
        if next(steps) == 2:
            network.v.data[1] = torch.inf

    with pytest.raises(FloatingPointError, match="every number of v must be finite; 1 are not"):
        fit_(network, lambda step: [(ids, ids)], network.loss, plan, state_path=path, after_step=spoil)
    assert torch.load(path, weights_only=True)["step"] == 2
    network = Root(1.0)
    state = loop.TrainingState(network, [torch.optim.AdamW(network.parameters())])
    network.loss(ids, ids).backward()
    state.update_(1.0, [0.1])
    state.optimizers[0].state[network.a]["exp_avg_sq"][0] = torch.inf
    with pytest.raises(FloatingPointError, match="every number of exp_avg_sq of a must be finite; 1 are not"):
        state.write(tmp_path / "other.pt", plan={})
    assert list(tmp_path.iterdir()) == [path]


def test_weights_too_coarse_for_adam_are_refused():
    network = tiny_model("llama-gqa-tied").half()
    with pytest.raises(ValueError, match="must be float32 or bfloat16; got float16"):
        fit_(network, parts_of, losses.text_loss(network), PLAN)


def test_parameter_groups_keep_their_ratio_through_schedule_and_resumption():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizers = [
        torch.optim.AdamW([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 1.0}]),
        torch.optim.SGD([b], lr=3.0),
    ]
    state = loop.TrainingState(torch.nn.ParameterList([a, b]), optimizers)
    for rate in (0.05, 0.0, 0.2):
        a.grad, b.grad = torch.ones(1), torch.ones(1)
        state.update_(1.0, [rate, 0.5])
        assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([rate, 10 * rate, 0.5])
    again = torch.optim.AdamW([{"params": [a], "lr": 7.0}, {"params": [b], "lr": 7.0}])
    again.load_state_dict(optimizers[0].state_dict())
    loop.set_learning_rate_(again, 0.3)
    assert [g["lr"] for g in again.param_groups] == pytest.approx([0.3, 3.0])
    with pytest.raises(ValueError, match="must begin with a rate above 0"):
        loop.set_learning_rate_(torch.optim.SGD([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 1.0}]), 0.1)


def test_clipping_is_torchs_and_forgets_older_gradients():
    ours, theirs = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied")
    losses.text_loss(ours)(random_ids(9), random_ids(9)).backward()  # must not count in the first step
    plan = FitPlan(steps=1, lr=1e-2, max_grad_norm=0.01)
    fit_(ours, lambda step: [(random_ids(12), random_ids(12))], losses.text_loss(ours), plan)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    losses.text_loss(theirs.train())(random_ids(12), random_ids(12)).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def padded_rows(side, *, pad=96):
    """Texts of 9, 5 and 2 tokens as a tokenizer pads them: ids, labels, mask."""
    texts = [random_ids(count, seed=count, vocab=90)[0] for count in (9, 5, 2)]
    rows = [(t, torch.full((9 - len(t),), pad)) for t in texts]
    ids = torch.stack([torch.cat(row if side == "right" else row[::-1]) for row in rows])
    mask = (ids != pad).long()
    return texts, ids, ids.masked_fill(mask == 0, losses.IGNORED), mask


@pytest.mark.parametrize("family", ["llama-gqa-tied", "qwen3", "gpt2"])
def test_padding_on_either_side_gives_the_loss_of_each_text_alone(family):
    network, teacher = tiny_model(family), tiny_model(family, seed=1)
    for loss_of in (losses.text_loss(network), losses.teacher_loss(network, teacher)):
        for side in ("left", "right"):
            texts, ids, labels, mask = padded_rows(side)
            each = [(loss_of(t[None], t[None]), len(t) - 1) for t in texts]
            alone = sum(loss * count for loss, count in each) / sum(count for _, count in each)
            torch.testing.assert_close(loss_of(ids, labels, mask), alone)
            torch.testing.assert_close(loss_of(ids, ids, mask.bool()), alone)  # the mask alone says what is text
            parts = [(ids[:1], labels[:1], mask[:1]), (ids[1:], labels[1:], mask[1:])]
            assert loop.targets_in(parts) == 13
            nats = loop.backward(parts, loss_of, tokens=13, device="cpu")
            assert nats / 13 == pytest.approx(alone.item(), rel=1e-5)


def test_rows_that_look_padded_on_the_left_need_a_mask():
    network = tiny_model("llama-gqa-tied")
    loss_of, (_, ids, labels, mask) = losses.text_loss(network), padded_rows("left")
    for wrong in (labels, ids):
        network.config.pad_token_id = None if wrong is labels else 96
        with pytest.raises(ValueError, match="need the tokenizer's attention mask; row 1 looks like one"):
            loss_of(ids, wrong)
    one = torch.tensor([[96, 5, 6]])
    with pytest.raises(ValueError, match="row 0 looks like one"):
        loss_of(one, one)
    network.config.bos_token_id = 96  # now it may as well begin the text
    assert loss_of(one, one) > 0
    with pytest.raises(ValueError, match=r"must have the ids' shape \(3, 9\); got \(3, 8\)"):
        loss_of(ids, labels, mask[:, 1:])


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
