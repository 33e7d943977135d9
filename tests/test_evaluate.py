"""Bits per byte and service scores: windows score every token once, a uniform model costs log2(vocab), chrF is chrF."""

import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.lab.data import service
from labutils.lab.data.corpus import Document
from labutils.lab.models import evaluate_service, model_card
from labutils.lab.models.evaluate_text import bits_per_byte, document_bits, token_nats

VOCAB = 7


class Counting:
    """A stand-in whose logit for token v at a position is v / (1 + tokens seen), so that context shows in the score."""

    device = torch.device("cpu")

    def __call__(self, input_ids, use_cache):
        seen = torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        logits = torch.arange(VOCAB).view(1, 1, -1) / seen
        return types.SimpleNamespace(logits=logits.expand(len(input_ids), -1, -1).float())


class Uniform(Counting):
    def __call__(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), context=st.integers(2, 20), batch=st.integers(1, 5))
def test_windows_score_every_token_once(n, context, batch):
    ids = torch.arange(n) % VOCAB
    nats = token_nats(Uniform(), ids, context=context, batch=batch)
    torch.testing.assert_close(nats, torch.full((n - 1,), math.log(VOCAB)))


@pytest.mark.parametrize("n", [5, 8, 9, 12, 13, 21, 30])
def test_windows_equal_the_naive_loop(n):
    ids = torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n))
    context, stride, model = 8, 4, Counting()
    expected = []
    for target in range(1, n):
        # The window that scores `target` is the first whose end lies beyond it.
        start = 0 if target < context else stride * math.ceil((target - context + 1) / stride)
        logits = model(ids[None, start : start + context], use_cache=False).logits[0, target - start - 1]
        expected.append(-torch.log_softmax(logits, 0)[ids[target]])
    torch.testing.assert_close(token_nats(model, ids, context=context, stride=stride, batch=3), torch.stack(expected))


def test_bits_per_byte_by_hand():
    """A uniform model over 7 tokens, one token a byte: log2(7) bits for each byte, whatever the window."""

    class Bytes:
        bos_token_id, chat_template, added_tokens_decoder = 0, None, {}

        def __call__(self, text, add_special_tokens, split_special_tokens):
            return {"input_ids": [b % VOCAB for b in text.encode()]}

    documents = [Document("a", "hello"), Document("b", "naïve!")]
    assert document_bits(Uniform(), Bytes(), documents[1], context=4) == (pytest.approx(7 * math.log2(7)), 7)
    assert bits_per_byte(Uniform(), Bytes(), documents, context=4) == pytest.approx(math.log2(7))


def test_stride_beyond_the_window_is_refused():
    with pytest.raises(ValueError, match="stride must lie in 1 to context - 1 = 7; got 8"):
        token_nats(Uniform(), torch.arange(20) % VOCAB, context=8, stride=8)


def test_score_task_scores_replies_in_order(monkeypatch):
    """A perfect replier gets 1, one that errs on every third item gets about 2/3."""
    expected = {
        item.messages[-2]["content"]: item.messages[-1]["content"]
        for item in service.evaluation_set(service.INTENT, "test", 30, evaluate_service.SEED)
    }
    monkeypatch.setattr(
        evaluate_service, "reply", lambda model, tokenizer, chats: [expected[c[-1]["content"]] for c in chats]
    )
    score = evaluate_service.score_task(None, None, service.INTENT, count=30, batch=7)
    assert score.accuracy == 1.0 and len(score.references) == 30 and any(score.is_novel)
    wrong = evaluate_service.TaskScore("intent", ("a", "b", "x"), ("a", "b", "c"), (False,) * 3)
    assert wrong.accuracy == pytest.approx(2 / 3) and wrong.is_right == [True, True, False]


def test_score_task_refuses_no_items():
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        evaluate_service.score_task(None, None, service.INTENT, count=0)


def test_chrf_is_zero_to_hundred():
    same = evaluate_service.TaskScore("to_english", ("Where is it?",) * 2, ("Where is it?",) * 2, ())
    other = evaluate_service.TaskScore("to_english", ("zzz",) * 2, ("Where is it?",) * 2, ())
    assert evaluate_service.chrf(same) == pytest.approx(100) and evaluate_service.chrf(other) < 5


def test_card_rows_and_table(monkeypatch):
    score = evaluate_service.TaskScore("intent", ("a",) * 9 + ("x",), ("a",) * 10, (True,) * 2 + (False,) * 8)
    row = model_card._accuracy_row("intent, exact match", score)
    assert row["value"] == pytest.approx(0.9) and 0.6 <= row["low"] < 0.9 < row["high"] <= 1.0
    assert "| intent, exact match | 0.900 |" in model_card.table([row])
