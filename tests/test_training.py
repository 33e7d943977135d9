"""Training: the batch depends on the step alone, a killed run continues the same trajectory, Muon does what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from labutils.models import lablm, mixture, training
from labutils.models.checkpoint import save_checkpoint, verify_checksums
from labutils.models.load import load_model
from labutils.models.optimizer import Muon, orthogonalize
from labutils.models.tokenizer import train_tokenizer

TEXTS = {
    "stdlib": ["def add(a, b):\n    return a + b\n" * 40],
    "stdlib-tests": ["assert add(1, 2) == 3\n" * 60],
    "packages": ["import add\n\nprint(add(3, 4))\n" * 50],
    "service": ["<|user|>请帮我取消订单A12345。<|end|><|assistant|>cancel_order<|end|>"] * 30,
}
TINY = lablm.Shape(
    layers=2, hidden_size=32, intermediate_size=64, heads=2, kv_heads=1, head_dim=16, vocab_size=300, max_positions=64
)
PLAN = training.TrainingPlan(
    model="tiny", steps=8, sequences=8, sequence_length=16, long_sequence_length=16, warmup_steps=2, decay_fraction=0.35
)


@pytest.fixture
def tiny_corpus(monkeypatch):
    monkeypatch.setitem(training.SHAPES, "tiny", TINY)
    monkeypatch.setattr(training, "sources", lambda *, packages: TEXTS)
    monkeypatch.setattr(training.Run, "validation_bits_per_byte", lambda self, limit_bytes: 1.0)


def run_to(run, last_step):
    losses = []
    run.model.train()
    while run.step < last_step:
        losses.append(run.train_step(lambda ids: run.model(input_ids=ids, labels=ids).loss, micro_batch=32))
    return losses


def test_killed_run_continues_the_same_trajectory(tiny_corpus, tmp_path):
    unbroken = training.Run(PLAN, state_dir=tmp_path / "a")
    expected = run_to(unbroken, 8)
    first = training.Run(PLAN, state_dir=tmp_path / "b")
    head = run_to(first, 3)
    first.save()
    run_to(first, 5)  # lost: the kill comes before the next save
    resumed = training.Run(PLAN, state_dir=tmp_path / "b")
    assert resumed.step == 3
    assert head + run_to(resumed, 8) == pytest.approx(expected, abs=1e-6)
    for a, b in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_learns(tiny_corpus, tmp_path):
    losses = run_to(training.Run(replace(PLAN, steps=30), state_dir=tmp_path), 30)
    assert losses[-1] < 0.6 * losses[0]


def test_micro_batches_do_not_change_the_step(tiny_corpus, tmp_path):
    def loss_after_two(micro_batch, folder):
        run = training.Run(PLAN, state_dir=tmp_path / folder)
        run.train_step(lambda ids: run.model(input_ids=ids, labels=ids).loss, micro_batch)
        return run.train_step(lambda ids: run.model(input_ids=ids, labels=ids).loss, micro_batch)

    assert loss_after_two(16, "a") == pytest.approx(loss_after_two(128, "b"), abs=1e-4)


def test_only_steps_may_change_and_only_on_the_plateau(tiny_corpus, tmp_path):
    run = training.Run(PLAN, state_dir=tmp_path)
    run_to(run, 3)
    run.save()
    assert training.Run(replace(PLAN, steps=20), state_dir=tmp_path).step == 3
    with pytest.raises(ValueError, match="continues under its own plan"):
        training.Run(replace(PLAN, muon_lr=1.0), state_dir=tmp_path)
    with pytest.raises(ValueError, match="continues under its own plan"):
        training.Run(replace(PLAN, steps=4), state_dir=tmp_path)


def test_whole_program_writes_a_loadable_checkpoint(tiny_corpus, tmp_path):
    lines = []
    run = training.Run(PLAN, state_dir=tmp_path / "state")
    training.train(run, micro_batch=32, compile_model=False, save_every=4, log=lines.append)
    assert [r["step"] for r in run.curve if "validation_bits_per_byte" in r] == [4, 8]
    assert "tokens/s" in lines[-1]
    save_checkpoint(run.model, run.tokenizer, tmp_path / "out")
    verify_checksums(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.model.dtype == torch.float32 and loaded.tokenizer.chat_template


def test_schedule_by_hand():
    plan = replace(
        PLAN, steps=100, warmup_steps=10, decay_fraction=0.2, decay_from=0.5, long_fraction=0.1, long_sequence_length=32
    )
    assert [round(plan.lr_factor(s), 3) for s in (0, 4, 9, 79, 80, 90, 99)] == [0.1, 0.5, 1, 1, 0.5, 0.25, 0.025]
    assert plan.shape_of_batch(89) == (8, 16) and plan.shape_of_batch(90) == (4, 32)


def test_batch_reads_every_chunk_once_an_epoch():
    streams = {name: np.arange(64 * share, dtype=np.uint16) for name, share in mixture.RECIPE.items()}
    steps = [mixture.batch_at(streams, step=s, sequences=16, length=8, seed=1) for s in range(8)]
    first_source = torch.cat([batch[: mixture.RECIPE["stdlib"]].flatten() for batch in steps])
    assert sorted(first_source.tolist()) == list(range(512))
    assert torch.equal(steps[3], mixture.batch_at(streams, step=3, sequences=16, length=8, seed=1))
    assert not torch.equal(steps[3], mixture.batch_at(streams, step=3, sequences=16, length=8, seed=2))


def test_batch_refuses_a_broken_recipe():
    with pytest.raises(ValueError, match="multiple of 8.*got 12"):
        mixture.batch_at({}, step=0, sequences=12, length=8, seed=0)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_orthogonalize_moves_singular_values_towards_one(shape):
    update = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(update))
    assert singular.max() < 1.3 and singular.median() > 0.6
    u, _, vh = torch.linalg.svd(update, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(orthogonalize(update).flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95


def test_muon_follows_torch_muon():
    """torch's works in bfloat16, so the two agree within its precision."""
    torch.manual_seed(0)
    start, grads = torch.randn(24, 16), [torch.randn(24, 16) for _ in range(3)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own = Muon([ours], lr=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="original")
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        own.step()
        reference.step()
    moved, wanted = (ours - start).flatten(), (theirs - start).flatten()
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.999
    assert (moved.norm() / wanted.norm()).item() == pytest.approx(1, abs=0.02)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="2-D parameters only"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_shapes_fit_grouped_formats():
    for shape in lablm.SHAPES.values():
        assert {shape.hidden_size % 256, shape.intermediate_size % 256, shape.heads * shape.head_dim % 256} == {0}


def test_tokenizer_is_lossless_and_splits_digits():
    tokenizer = train_tokenizer(TEXTS["stdlib"] + TEXTS["service"], vocab_size=400, max_positions=64)
    for text in ("x = 1\n\n\n  y", "naïve ☃ 取消订单", "\t\tend \r\n", "A12345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer.tokenize("12345")) == 5
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|user|>hi<|end|><|assistant|>"
    assert mixture.chat_text([{"role": "user", "content": "hi"}]) + "<|assistant|>" == rendered


def test_tokenizer_refuses_a_vocabulary_without_room():
    with pytest.raises(ValueError, match="vocab_size must be at least 262.*got 200"):
        train_tokenizer(["x"], vocab_size=200, max_positions=64)
