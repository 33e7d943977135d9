"""LabLM's recorded opinions of intents: asked once, true to the model, and right on phrasings never shown."""

import pytest
import torch

from labutils.lab.data import service
from labutils.lab.models import intents
from labutils.lab.models.load import load_model


def test_intent_queries_carry_their_own_labels():
    queries, names = intents.intent_queries("test"), list(service.intents())
    assert len(queries.texts) == len(queries.chats) == len(queries.labels) == intents.COUNTS["test"]
    items = service.evaluation_set(service.INTENT, "test", intents.COUNTS["test"], seed=intents.SEED)
    for item, text, chat, label in zip(items, queries.texts, queries.chats, queries.labels, strict=True):
        assert names[label] == item.messages[-1]["content"] and chat[-1]["content"] == text


def test_no_test_phrasing_is_among_the_lessons():
    assert not set(intents.intent_queries("train").texts) & set(intents.intent_queries("test").texts)


def test_committed_opinions_are_distributions_and_mostly_right():
    for split, opinions in intents.recorded_opinions().items():
        assert opinions.shape == (intents.COUNTS[split], 63)
        torch.testing.assert_close(opinions.exp().sum(dim=1), torch.ones(len(opinions)), atol=5e-3, rtol=0)
        assert (opinions.argmax(dim=1) == intents.intent_queries(split).labels).float().mean() > 0.9


@pytest.mark.parametrize("index", [0, 199])
def test_committed_opinions_are_the_shipped_model_s(index):
    live = intents.intent_opinion(load_model("lablm"), intents.intent_queries("test").chats[index])
    torch.testing.assert_close(live.exp(), intents.recorded_opinions()["test"][index].exp(), atol=5e-3, rtol=0)


def test_opinions_are_asked_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(intents, "COUNTS", {"train": 3, "test": 2})
    monkeypatch.setattr(intents, "load_model", lambda name: name)
    monkeypatch.setattr(intents, "intent_opinion", lambda loaded, chat: asked.append(chat) or torch.arange(63.0))
    for _ in range(2):
        opinions = intents.recorded_opinions(tmp_path / "o.safetensors")
        assert {split: len(rows) for split, rows in opinions.items()} == {"train": 3, "test": 2}
    assert len(asked) == 5 and opinions["test"][1, 62] == 62
