"""Whole models: recipes on real pairs, the store, students' beginnings, texts written by teacher and student."""

import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.distillation import cache, recipe, sequences, sparse, student
from labutils.distillation.divergences import reverse_kl
from labutils.distillation.hidden import Projections
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import IGNORED, text_loss

FAMILIES = ["llama-gqa-tied", "qwen3", "gpt2"]


def ids_and_labels(*, padded=True):
    ids = random_ids(12, batch=3)
    labels = ids.clone()
    if padded:
        labels[0, 6:] = IGNORED
    return ids, labels


def small(family="llama-gqa-tied", layers=1, **sizes):
    config = copy.deepcopy(tiny_model(family).config)
    for name, value in ({"num_hidden_layers": layers} | sizes).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return type(tiny_model(family))(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_pair_learns_to_follow_its_teacher(family):
    teacher, pupil = tiny_model(family), small(family)
    losses = fit_(
        pupil,
        lambda step: [ids_and_labels()],
        recipe.distillation_loss(pupil, teacher, recipe.DISTILBERT),
        FitPlan(steps=25, lr=3e-3),
    )
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_recipe_is_the_weighted_sum_of_its_parts():
    teacher, pupil = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied", seed=1)
    ids, labels = ids_and_labels()

    def value(**weights):
        parts = {"soft": 0.0, "hard": 0.0} | weights
        return recipe.distillation_loss(pupil, teacher, recipe.Recipe(**parts))(ids, labels).item()

    assert value(hard=1.0) == pytest.approx(text_loss(pupil)(ids, labels).item(), rel=1e-5)
    parts = [value(soft=1.0), value(hard=1.0), value(cosine=1.0), value(hidden=1.0)]
    whole = value(soft=5.0, hard=2.0, cosine=1.0, hidden=3.0)
    assert whole == pytest.approx(5 * parts[0] + 2 * parts[1] + parts[2] + 3 * parts[3], rel=1e-5)


def test_soft_part_by_hand():
    teacher, pupil = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    ids, labels = ids_and_labels()
    found = recipe.distillation_loss(pupil, teacher, recipe.Recipe(soft=1.0, hard=0.0, temperature=3.0))(ids, labels)
    with torch.no_grad():
        ours, theirs = ((m(ids).logits[:, :-1] / 3).log_softmax(-1) for m in (pupil, teacher))
    each = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(found, 9 * each[labels[:, 1:] != IGNORED].mean())


@pytest.mark.parametrize("weights", [{"cosine": 1.0}, {"hidden": 1.0}, {"attention": 1.0}, {"soft": 1.0}])
def test_padding_never_counts(weights):
    teacher, pupil = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied", seed=1)
    if "attention" in weights:
        teacher.set_attn_implementation("eager")
        pupil.set_attn_implementation("eager")
    loss = recipe.distillation_loss(pupil, teacher, recipe.Recipe(**({"soft": 0.0, "hard": 0.0} | weights)))
    ids, labels = ids_and_labels()
    other = ids.clone()
    other[0, 6:] = 3
    torch.testing.assert_close(loss(ids, labels), loss(other, labels))
    assert loss(ids, labels) > 1e-4
    assert recipe.distillation_loss(teacher, teacher, recipe.Recipe(**({"soft": 0.0, "hard": 0.0} | weights)))(
        ids, labels
    ).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("part", ["soft", "hard", "cosine", "hidden", "attention", "stored"])
def test_padding_on_either_side_counts_and_moves_nothing(part, tmp_path):
    teacher, pupil = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied", seed=1)
    for model in (teacher, pupil):
        model.set_attn_implementation("eager")
    if part == "stored":
        store = cache.TeacherCache(tmp_path, teacher, k=97, tokens=99)
        loss = recipe.stored_loss(pupil, store, recipe.Recipe(temperature=1.0))
    else:
        loss = recipe.distillation_loss(pupil, teacher, recipe.Recipe(**({"soft": 0.0, "hard": 0.0} | {part: 1.0})))
    text, pad = random_ids(6)[0], torch.full((3,), 96)
    left, right, mask = torch.cat([pad, text])[None], torch.cat([text, pad])[None], torch.tensor([[0] * 3 + [1] * 6])
    values = [loss(left, left, mask), loss(right, right, mask.flip(1))]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], loss(text[None], text[None]))
    with pytest.raises(ValueError, match="need the tokenizer's attention mask"):
        loss(left, left.masked_fill(mask == 0, IGNORED))


def test_narrow_student_needs_projections():
    teacher = tiny_model("llama-gqa-tied")
    pupil = small(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    ids, labels = ids_and_labels()
    inside = recipe.Recipe(soft=0.0, hard=0.0, hidden=1.0)
    with pytest.raises(ValueError, match="use Projections"):
        recipe.distillation_loss(pupil, teacher, inside)(ids, labels)
    both = torch.nn.ModuleDict({"student": pupil, "projections": Projections(2, student_width=16, teacher_width=32)})
    loss = recipe.distillation_loss(pupil, teacher, inside, projections=both["projections"])
    losses = fit_(both, lambda step: [(ids, labels)], loss, FitPlan(steps=20, lr=1e-2))
    assert losses[-1] < 0.8 * losses[0]


def test_recipe_refuses_what_cannot_be_compared():
    teacher = tiny_model("llama-gqa-tied")
    with pytest.raises(ValueError, match="one vocabulary; got 50 and 97"):
        recipe.distillation_loss(small(vocab_size=50), teacher, recipe.Recipe())
    with pytest.raises(ValueError, match="evaluation mode"):
        recipe.distillation_loss(small(), copy.deepcopy(teacher).train(), recipe.Recipe())
    with pytest.raises(ValueError, match="temperature 1 only"):
        recipe.stored_loss(small(), lambda ids: None, recipe.Recipe(temperature=2.0))


def test_store_gives_the_teachers_loss_and_asks_once(tmp_path):
    teacher, pupil = tiny_model("llama-gqa-tied"), small()
    ids, labels = ids_and_labels()
    store = cache.TeacherCache(tmp_path, teacher, k=97, tokens=33)
    plain = recipe.Recipe(soft=1.0, hard=0.0, temperature=1.0)
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=teacher(ids).logits[:, :-1]).entropy()
        wanted = recipe.distillation_loss(pupil, teacher, plain)(ids, labels)
        found = recipe.stored_loss(pupil, store, plain)(ids, labels)
    torch.testing.assert_close(found - entropy[labels[:, 1:] != IGNORED].mean(), wanted, atol=2e-3, rtol=0)
    store.teacher = None  # it would fail if it were asked again
    assert torch.equal(store(ids).ids, store(ids.clone()).ids) and len(list(tmp_path.glob("*.pt"))) == 1


def test_store_says_its_size_and_refuses_strangers(tmp_path):
    teacher = tiny_model("llama-gqa-tied")
    store = cache.TeacherCache(tmp_path / "a", teacher, k=8, tokens=10_000)
    for seed in range(5):
        store(random_ids(401, batch=5, seed=seed))
    assert store.announced_bytes == 480_000
    assert store.announced_bytes < store.used_bytes < store.announced_bytes + 5 * 2500
    with pytest.raises(ValueError, match="one teacher's answers at one k"):
        cache.TeacherCache(tmp_path / "a", tiny_model("llama-gqa-tied", seed=1), k=8, tokens=10)
    with pytest.raises(ValueError, match="of disk"):
        cache.TeacherCache(tmp_path / "b", teacher, k=8, tokens=10**15)


def test_store_keeps_two_batches_of_the_same_numbers_apart(tmp_path):
    store = cache.TeacherCache(tmp_path, tiny_model("llama-gqa-tied"), k=4, tokens=100)
    ids = random_ids(12)
    assert store(ids).ids.shape == (1, 11, 4) and store(ids.view(2, 6)).ids.shape == (2, 5, 4)


def test_spaced_layers_by_hand():
    assert student.spaced_layers(2, of=6) == [0, 5] and student.spaced_layers(1, of=6) == [0]


class FakeTokenizer:
    def __init__(self, vocab, cut=1):
        self.vocab, self.cut = vocab, cut

    def get_vocab(self):
        return self.vocab

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(range(len(text) // self.cut))}


def test_other_tokenizers_are_refused_with_a_reason():
    student.require_same_tokens(FakeTokenizer({"a": 0}), FakeTokenizer({"a": 0}))
    with pytest.raises(ValueError, match="got 2 and 1 tokens, 1 of the student's.*sequence-level"):
        student.require_same_tokens(FakeTokenizer({"a": 0, "b": 1}), FakeTokenizer({"a": 0}))
    with pytest.raises(ValueError, match="1 of the student's with another id"):
        student.require_same_tokens(FakeTokenizer({"a": 1}), FakeTokenizer({"a": 0}))
    with pytest.raises(ValueError, match="cut text alike"):
        student.require_same_tokens(FakeTokenizer({"a": 0}), FakeTokenizer({"a": 0}, cut=2))


def test_written_follows_generate_and_marks_what_was_written():
    model = tiny_model("llama-gqa-tied")
    prompts = [random_ids(5)[0], random_ids(3, seed=1)[0], random_ids(5, seed=2)[0]]
    ids, labels = sequences.written(model, prompts, max_new_tokens=6, end_id=96)
    for row, marks, prompt in zip(ids, labels, prompts, strict=True):
        wanted = model.generate(prompt[None], max_new_tokens=6, do_sample=False, eos_token_id=96, pad_token_id=96)[0]
        assert row[: len(wanted)].tolist() == wanted.tolist()
        assert (marks[: len(prompt)] == IGNORED).all()
        assert marks[len(prompt) : len(wanted)].tolist() == wanted[len(prompt) :].tolist()
        assert (marks[len(wanted) :] == IGNORED).all()
    with pytest.raises(ValueError, match="at least one prompt"):
        sequences.written(model, [], max_new_tokens=1, end_id=96)


def test_written_leaves_the_model_as_it_was_when_writing_fails():
    model = tiny_model("llama-gqa-tied").train()
    with pytest.raises(IndexError):
        sequences.written(model, [torch.tensor([999])], max_new_tokens=2, end_id=96)
    assert model.training


def test_written_stops_at_the_end_and_counts_it():
    model = tiny_model("llama-gqa-tied")
    first = int(model(random_ids(5)).logits[0, -1].argmax())
    ids, labels = sequences.written(model, [random_ids(5)[0]], max_new_tokens=6, end_id=first)
    assert ids.shape == (1, 6) and labels[0].tolist() == [IGNORED] * 5 + [first]


def test_sampled_texts_follow_the_models_probabilities():
    model = tiny_model("gpt2")
    prompts = [random_ids(4)[0]] * 400
    generator = torch.Generator().manual_seed(0)
    ids, _ = sequences.written(model, prompts, max_new_tokens=1, end_id=96, temperature=1.0, generator=generator)
    probs = model(random_ids(4)).logits[0, -1].softmax(-1)
    counts = torch.bincount(ids[:, 4], minlength=97) / 400
    assert (counts - probs).abs().max() < 0.06


def test_on_policy_steps_follow_the_schedule_and_repeat_exactly():
    model, data = tiny_model("llama-gqa-tied"), [ids_and_labels()]
    schedule = sequences.OnPolicySchedule(final=0.5, rising_steps=10)
    parts = sequences.on_policy_parts(
        model, lambda step: data, lambda step: [random_ids(4)[0]], schedule, max_new_tokens=3, end_id=96
    )
    own = [step for step in range(60) if parts(step) is not data]
    assert 0 not in own and 15 <= len(own) <= 40
    assert torch.equal(parts(own[0])[0][0], parts(own[0])[0][0])


def test_on_policy_training_lowers_the_reverse_kl_on_own_texts():
    teacher, pupil = tiny_model("llama-gqa-tied"), tiny_model("llama-gqa-tied", seed=1)
    always = sequences.OnPolicySchedule(final=1.0, rising_steps=1)
    parts = sequences.on_policy_parts(
        pupil,
        lambda step: [ids_and_labels()],
        lambda step: list(random_ids(4, batch=8)),
        always,
        max_new_tokens=4,
        end_id=96,
    )
    only_soft = recipe.Recipe(soft=1.0, hard=0.0, temperature=1.0, divergence=reverse_kl)
    losses = fit_(pupil, parts, recipe.distillation_loss(pupil, teacher, only_soft), FitPlan(steps=30, lr=3e-3))
    assert sum(losses[-5:]) < 0.7 * sum(losses[1:6])


def test_store_and_sparse_agree_on_places(tmp_path):
    teacher = tiny_model("gpt2")
    ids = random_ids(8)
    stored = cache.TeacherCache(tmp_path, teacher, k=5, tokens=7)(ids)
    exact = sparse.top_k(teacher(ids).logits[:, :-1], 5)
    assert torch.equal(stored.ids, exact.ids)
    torch.testing.assert_close(stored.probs, exact.probs, atol=1e-3, rtol=1e-3)
