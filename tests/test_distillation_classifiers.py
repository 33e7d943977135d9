"""Opinions of a language model over choices, n-grams, and the two small classifiers."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.distillation import classifiers
from labutils.lab.training.loop import FitPlan, fit_


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gpt2"])
def test_choice_log_probs_follow_the_whole_text_read_naively(family):
    model, prompt = tiny_model(family), random_ids(6)[0]
    choices = [[3, 9], [5], [7, 1, 2]]
    naive = []
    for choice in choices:
        text = torch.tensor([*prompt.tolist(), *choice])
        logs = model(text[None]).logits[0].log_softmax(-1)
        naive.append(sum(logs[5 + i, token] for i, token in enumerate(choice)))
    wanted = torch.stack(naive).log_softmax(0)
    torch.testing.assert_close(classifiers.choice_log_probs(model, prompt, choices), wanted.detach())


def test_choice_log_probs_refuse_empty_choices():
    with pytest.raises(ValueError, match="at least one token; got lengths \\[1, 0\\]"):
        classifiers.choice_log_probs(tiny_model("gpt2"), random_ids(3)[0], [[1], []])


def test_ngrams_are_counted_once_and_stay_in_range():
    ids = classifiers.ngram_ids("取消订单 cancel", buckets=50)
    assert min(ids) >= 1 and max(ids) < 50 and len(ids) == len(set(ids))
    assert classifiers.ngram_ids("aaaa", buckets=10**6, sizes=(1, 2)) == classifiers.ngram_ids(
        "aa", buckets=10**6, sizes=(1, 2)
    )
    assert classifiers.ngram_ids("", buckets=50) == []


def make(kind):
    torch.manual_seed(0)
    if kind == "ngrams":
        return classifiers.NgramLinear(buckets=30, classes=3)
    return classifiers.TinyEncoder(vocab=30, classes=3, width=16)


def items():
    rows = classifiers.padded_rows([[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 2], [4, 5, 3], [6, 8]])
    return rows, torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("kind", ["ngrams", "encoder"])
def test_classifiers_learn_and_ignore_padding(kind):
    classifier = make(kind)
    rows, labels = items()
    fit_(
        classifier,
        classifiers.drawn_rows(rows, batch=6),
        classifiers.classifier_loss(classifier, labels),
        FitPlan(steps=60, lr=2e-2),
    )
    with torch.no_grad():
        assert classifier(rows).argmax(1).tolist() == labels.tolist()
        wider = torch.nn.functional.pad(rows, (0, 3))
        torch.testing.assert_close(classifier(wider), classifier(rows), atol=1e-5, rtol=1e-4)


def test_classifier_follows_its_teacher_where_labels_say_nothing():
    rows, labels = items()
    teacher = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(6, 3)
    classifier = make("ngrams")
    loss = classifiers.classifier_loss(classifier, labels, teacher, soft=1.0, temperature=1.0)
    fit_(classifier, classifiers.drawn_rows(rows, batch=6), loss, FitPlan(steps=200, lr=2e-2))
    torch.testing.assert_close(classifier(rows).softmax(1), teacher.exp(), atol=0.03, rtol=0)


def test_drawn_rows_depend_on_the_step_alone():
    parts = classifiers.drawn_rows(items()[0], batch=4, seed=3)
    assert torch.equal(parts(5)[0][0], parts(5)[0][0]) and not torch.equal(parts(5)[0][1], parts(6)[0][1])
