"""Recovery keeps every zero, learns, and LoRA merges into what it computed."""

import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.pruning import masks, recovery, scores

BATCHES = [random_ids(32, batch=2, seed=i % 3) for i in range(12)]


def pruned(sparsity=0.6):
    dense = tiny_model("llama-gqa-tied")
    model = copy.deepcopy(dense)
    chosen = masks.mask_model(scores.magnitude_scores(model), sparsity, scope="row")
    masks.apply_masks_(model, chosen)
    return dense, model, chosen


def test_fine_tuning_lowers_the_loss_and_keeps_the_zeros():
    _, model, chosen = pruned()
    before = masks.sparsity(model)
    losses = recovery.fine_tune_(model, BATCHES, lr=3e-3, masks=chosen)
    assert sum(losses[-3:]) < sum(losses[:3]) and not model.training
    assert masks.sparsity(model) == before


def test_without_masks_the_zeros_fill_up():
    _, model, _ = pruned()
    recovery.fine_tune_(model, BATCHES[:1], lr=1e-3)
    assert masks.sparsity(model) < 0.1


def test_a_teacher_pulls_the_student_towards_itself():
    dense, model, chosen = pruned()

    def distance():
        with torch.no_grad():
            return (model(BATCHES[0]).logits - dense(BATCHES[0]).logits).norm().item()

    before, frozen = distance(), copy.deepcopy(dense.state_dict())
    losses = recovery.fine_tune_(model, BATCHES, lr=3e-3, masks=chosen, teacher=dense)
    assert distance() < before and losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], tensor) for name, tensor in dense.state_dict().items())


def test_the_teacher_itself_has_nothing_to_learn():
    dense, *_ = pruned()
    assert recovery.fine_tune_(copy.deepcopy(dense), BATCHES[:1], lr=1e-4, teacher=dense)[0] == pytest.approx(
        0, abs=1e-5
    )


def test_lora_starts_as_the_pruned_model_learns_and_merges_without_filling_zeros():
    _, model, chosen = pruned()
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        before = model(BATCHES[0]).logits
    recovery.add_lora_(model, chosen, rank=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]).logits, before)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(4 * sum(mask.shape) for mask in chosen.values())
    losses = recovery.fine_tune_(model, BATCHES, lr=1e-2)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        learnt = model(BATCHES[0]).logits
    recovery.merge_lora_(model)
    with torch.no_grad():
        assert torch.allclose(model(BATCHES[0]).logits, learnt, atol=1e-5)
    assert [name for name, _ in model.named_modules()] == names
    assert masks.sparsity(model) == pytest.approx(0.59375)  # round(0.6 * 32) of 32, round(0.6 * 64) of 64


def test_rewound_returns_survivors_to_their_start():
    dense, model, chosen = pruned()
    start = copy.deepcopy(dense.state_dict())
    recovery.fine_tune_(model, BATCHES[:2], lr=1e-2, masks=chosen)
    recovery.rewound_(model, start, chosen)
    expected = copy.deepcopy(dense)
    masks.apply_masks_(expected, chosen)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("by_movement", [False, True])
def test_gradual_ends_at_the_final_sparsity_and_learns(by_movement):
    model = tiny_model("llama-gqa-tied")
    with torch.no_grad():
        before = model(input_ids=BATCHES[0], labels=BATCHES[0]).loss
    chosen = recovery.gradual_(model, BATCHES, final=0.5, lr=3e-3, by_movement=by_movement)
    assert masks.sparsity(model) == 0.5
    assert all((~mask).float().mean() == 0.5 for mask in chosen.values())
    with torch.no_grad():
        assert model(input_ids=BATCHES[0], labels=BATCHES[0]).loss < before


def test_gradual_criteria_choose_differently():
    kept = [
        recovery.gradual_(tiny_model("llama-gqa-tied"), BATCHES[:3], final=0.5, lr=1e-3, by_movement=b)
        for b in (False, True)
    ]
    assert any(not torch.equal(a, b) for a, b in zip(kept[0].values(), kept[1].values(), strict=True))


def test_fine_tuning_needs_a_batch():
    with pytest.raises(ValueError, match="at least 2 batches; got 1"):
        recovery.gradual_(pruned()[1], BATCHES[:1], final=0.5, lr=1e-3)
    with pytest.raises(ValueError, match="at least one batch"):
        recovery.fine_tune_(pruned()[1], [], lr=1e-3)
