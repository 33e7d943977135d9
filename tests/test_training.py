"""Training: the batch depends on the step alone, a killed run continues the same trajectory, Muon does what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from labutils.lab.models import lablm, mixture, training
from labutils.lab.models.checkpoint import save_checkpoint, verify_checksums
from labutils.lab.models.load import load_model
from labutils.lab.models.optimizer import Muon, orthogonalize
from labutils.lab.models.tokenizer import train_tokenizer

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
    model="tiny",
    steps=8,
    code_tokens=128,
    dialogues=6,
    sequence_length=16,
    long_sequence_length=32,
    warmup_steps=2,
    decay_fraction=0.35,
    muon_lr=0.02,
    adam_lr=0.003,
)


@pytest.fixture
def tiny_corpus(monkeypatch):
    monkeypatch.setitem(training.SHAPES, "tiny", TINY)
    monkeypatch.setattr(training, "sources", lambda *, packages: TEXTS)
    monkeypatch.setattr(training.Run, "validation_bits_per_byte", lambda self, limit_bytes: 1.0)


def loss_in(run):
    return lambda ids, labels: run.model(input_ids=ids, labels=labels).loss


def run_to(run, last_step):
    losses = []
    run.model.train()
    while run.step < last_step:
        losses.append(sum(run.train_step(loss_in(run), loss_in(run), micro_batch=32)))
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
    def losses_after_two(micro_batch, folder):
        run = training.Run(PLAN, state_dir=tmp_path / folder)
        run.train_step(loss_in(run), loss_in(run), micro_batch)
        return run.train_step(loss_in(run), loss_in(run), micro_batch)

    assert losses_after_two(16, "a") == pytest.approx(losses_after_two(128, "b"), abs=1e-4)


def test_step_follows_the_mean_over_all_tokens(tiny_corpus, tmp_path, monkeypatch):
    """Gradients of the parts add up to that of the mean loss per token over code and dialogues together."""
    run = training.Run(PLAN, state_dir=tmp_path)
    code, dialogues = run._my_parts(32)
    nats = count = 0
    for ids, labels in code + dialogues:
        logits = run.model(ids).logits[:, :-1].transpose(1, 2)
        nats = nats + torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="sum")
        count += (labels[:, 1:] != -100).sum()
    (nats / count).backward()
    wanted = run.model.model.embed_tokens.weight.grad.clone()
    run.model.zero_grad()
    seen = {}
    for optimizer in run.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: None)
    monkeypatch.setattr(
        run.optimizers[1], "step", lambda: seen.update(g=run.model.model.embed_tokens.weight.grad.clone())
    )
    run.train_step(loss_in(run), loss_in(run), micro_batch=32)
    torch.testing.assert_close(seen["g"], wanted, atol=1e-6, rtol=1e-4)


def test_ranks_add_up_to_one_process(tiny_corpus, tmp_path, monkeypatch):
    """Five dialogues make three and two: each label weighs the same on whichever rank it counts."""
    run = training.Run(replace(PLAN, dialogues=5), state_dir=tmp_path)
    monkeypatch.setattr(run, "update_", lambda *_: None)

    def gradient_of_a_step():
        run.model.zero_grad()
        run.train_step(loss_in(run), loss_in(run), micro_batch=32)
        return torch.cat([p.grad.flatten() for p in run.model.parameters()])

    whole, flats = gradient_of_a_step(), []
    tokens = training.targets_in([part for kind in run._my_parts(32) for part in kind])
    monkeypatch.setattr(training, "world_size", lambda: 2)
    monkeypatch.setattr(
        training.dist, "all_reduce", lambda t: flats.append(t.clone()) if t.is_floating_point() else t.fill_(tokens)
    )
    for number in range(2):
        monkeypatch.setattr(training, "rank", lambda number=number: number)
        gradient_of_a_step()
    torch.testing.assert_close(flats[0] + flats[1], whole, atol=1e-6, rtol=1e-4)


def test_a_step_whose_dialogues_count_nothing_trains_on_code(tiny_corpus, tmp_path, monkeypatch):
    run = training.Run(PLAN, state_dir=tmp_path)
    prompt = torch.tensor([4, 9, 9, 9])  # cut before the assistant's turn
    monkeypatch.setattr(training, "dialogue_batch", lambda *_, **__: [prompt] * 6)
    code, dialogues = run.train_step(loss_in(run), loss_in(run), micro_batch=32)
    assert code > 0 and dialogues == 0 and run.step == 1
    assert all(p.isfinite().all() for p in run.model.parameters())


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
    assert "s a step" in lines[-1]
    save_checkpoint(run.model, run.tokenizer, tmp_path / "out")
    verify_checksums(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.model.dtype == torch.float32 and loaded.tokenizer.chat_template


def test_schedule_by_hand():
    plan = replace(PLAN, steps=100, warmup_steps=10, decay_fraction=0.2, long_fraction=0.1)
    assert [round(plan.lr_factor(s), 3) for s in (0, 4, 9, 79, 80, 90, 99)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.05]
    assert plan.shape_of_code(89) == (8, 16) and plan.shape_of_code(90) == (4, 32)


def numbered(count):
    return mixture.Stream(np.arange(count, dtype=np.uint16), np.arange(0, count, 4))


def test_code_batch_reads_every_chunk_once_an_epoch():
    streams = {"stdlib": numbered(48), "stdlib-tests": numbered(32), "packages": numbered(32)}
    batches = [mixture.code_batch(streams, step=step, sequences=4, length=8, seed=1) for step in range(2)]
    rows = torch.cat(batches)
    from_library = rows[[i for i, name in enumerate(mixture.PATTERN) if name == "stdlib"]]
    assert sorted(from_library.flatten().tolist()) == list(range(48))
    again = mixture.code_batch(streams, step=1, sequences=4, length=8, seed=1)
    other = mixture.code_batch(streams, step=1, sequences=4, length=8, seed=2)
    assert torch.equal(batches[1], again) and not torch.equal(batches[1], other)


def test_practised_copies_repeat_their_beginning():
    streams = {name: numbered(4096) for name in set(mixture.PATTERN)}
    rows = mixture.code_batch(streams, step=0, sequences=8, length=64, seed=0, practise_copying=True)
    copied = [len(set(row.tolist())) < 64 for row in rows]
    assert copied == [name == "packages" for name in mixture.PATTERN]


def test_dialogues_come_whole_alone_and_once_an_epoch():
    steps = [mixture.dialogue_batch(numbered(40), step=step, count=5, seed=0) for step in range(2)]
    firsts = sorted(int(dialogue[0]) for step in steps for dialogue in step)
    assert firsts == list(range(0, 40, 4)) and all(len(d) == 4 for step in steps for d in step)
    long = mixture.Stream(np.zeros(500, dtype=np.uint16), np.array([0, 3]))
    lengths = [len(d) for d in mixture.dialogue_batch(long, step=0, count=2, seed=0)]
    assert lengths == [3, mixture.LONGEST_DIALOGUE]


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
