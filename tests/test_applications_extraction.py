"""Tags and spans there and back, heads on frozen states, and the labels that the service grammar knows."""

import random
import re

import pytest
import torch

from labutils.applications.extraction import Span, bio_tags, fit_head, spans_of
from labutils.lab.data import service, service_labels
from labutils.lab.data.service_labels import entities, keywords, read_answer, sentiment, value_form

RNG = random.Random(4)
QUERIES = [service.sample_query(RNG, split) for split in service.SPLITS for _ in range(80)]


def test_tags_by_hand():
    spans = [Span(0, 4, "name"), Span(5, 9, "city")]
    offsets = [(0, 2), (2, 4), (4, 7), (7, 9), (9, 10)]
    tags = bio_tags(spans, offsets)
    assert tags == ["B-name", "I-name", "B-city", "I-city", "O"]
    assert spans_of(tags, offsets, "Anna Rome.") == set(spans)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["I-a", "I-a", "O"], {(0, 2, "a")}),  # nothing began: the first I- begins
        (["B-a", "B-a", "O"], {(0, 1, "a"), (1, 2, "a")}),
        (["B-a", "I-b", "I-b"], {(0, 1, "a"), (1, 3, "b")}),
        (["O", "O", "O"], set()),
    ],
)
def test_spans_of_tags_that_no_text_would_give(tags, expected):
    assert {tuple(span) for span in spans_of(tags, [(0, 1), (1, 2), (2, 3)], "xyz")} == expected


@pytest.mark.parametrize("language", service.LANGUAGES)
def test_tokens_of_a_character_each_give_every_span_back(language):
    for query in QUERIES:
        text, spans = query.text(language), entities(query, language)
        offsets = [(i, i + 1) for i in range(len(text))]
        assert spans_of(bio_tags(spans, offsets), offsets, text) == spans


@pytest.mark.parametrize("language", service.LANGUAGES)
def test_entities_are_the_slots_and_stand_where_they_say(language):
    place = service.LANGUAGES.index(language)
    for query in QUERIES:
        found = {span.label: query.text(language)[span.start : span.end] for span in entities(query, language)}
        assert found == {name: pair[place] for name, pair in query.slots.items()}


def test_labels_of_one_query_by_hand():
    phrasing = service.Phrasing("failed_payment", 0, 5)
    slots = {"order_id": ("A12345", "A12345")}
    text_en, text_zh = service.render(phrasing, slots, opener=1)
    query = service.Query(text_en, text_zh, "failed_payment", slots, phrasing)
    assert sentiment(query) == "negative" and text_en.startswith("Hello! I tried to ")
    (span,) = entities(query, "en")
    assert text_en[span.start : span.end] == "A12345" and span.label == "order_id"
    assert not keywords(query) & {"tried", "hello", "to", "the", "work"} and "order" in keywords(query)


def test_a_frame_alone_can_tell_of_a_failure():
    slots = {"order_id": ("A12345", "A12345")}
    for frame, expected in ((5, "negative"), (0, "neutral")):
        phrasing = service.Phrasing("cancel_order", 0, frame)
        query = service.Query(*service.render(phrasing, slots), "cancel_order", slots, phrasing)
        assert sentiment(query) == expected and ("did not work" in query.text_en) == (frame == 5)


def test_sentiment_has_both_classes_and_keywords_stand_in_the_text():
    assert {sentiment(query) for query in QUERIES} == set(service_labels.SENTIMENTS)
    for query in QUERIES:
        words = {word for *_, word in service_labels.word_spans(query.text_en)}
        assert keywords(query) and keywords(query) <= words
    assert set(service.intents()) >= service_labels.FAILURES


def test_a_query_of_another_grammar_is_refused():
    query = QUERIES[0]
    strange = service.Query("Hello there", "你好", query.intent, query.slots, query.phrasing)
    with pytest.raises(ValueError, match="one that the service grammar makes; got 'Hello there'"):
        entities(strange, "en")
    with pytest.raises(ValueError, match="language must be one of en, zh; got 'fr'"):
        entities(query, "fr")


def test_value_forms_match_every_value_and_no_other():
    for query in QUERIES:
        for name, (english, _) in query.slots.items():
            assert re.fullmatch(value_form(name), english)
    assert re.fullmatch(value_form("city", "zh"), "罗马") and not re.fullmatch(value_form("city", "zh"), "Rome")
    assert re.fullmatch(value_form("amount"), "$12.30") and not re.fullmatch(value_form("amount"), "$12.35")
    assert not re.fullmatch(value_form("order_id"), "A1234") and not re.fullmatch(value_form("size"), "huge")
    with pytest.raises(ValueError, match="slot must be one of .*; got 'colour2'"):
        value_form("colour2")


@pytest.mark.parametrize("language", service.LANGUAGES)
def test_every_answer_is_read_back(language):
    place = service.LANGUAGES.index(language)
    for query in QUERIES:
        values = {name: pair[place] for name, pair in query.slots.items()}
        template = service.intents()[query.intent].answer[place]
        used = set(service.slot_names(template))
        expected = tuple(sorted((name, value) for name, value in values.items() if name in used))
        assert read_answer(template.format_map(values) + "\n") == (query.intent, expected)


def test_an_answer_with_another_value_or_ending_is_another_one():
    good = "Order A12345 has left our warehouse and is on its way."
    assert read_answer(good.replace("A12345", "B12345")) != read_answer(good)
    assert read_answer(good.replace("A12345", "12")) == ("track_order", (("order_id", "12"),))  # of no known form
    assert read_answer(good[:-1]) is None and read_answer("No: " + good) is None


def test_head_finds_a_linear_rule_and_takes_raw_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0]) + 3
    labels = ((x[:, 1] - 3) / 100 + (x[:, 2] - 3) / 0.01 > 0).long()
    head = fit_head(x[:150], labels[:150], 2)
    assert (head(x[150:]).argmax(dim=1) == labels[150:]).float().mean() > 0.9
    assert not any(p.requires_grad for p in head.parameters())


def test_head_takes_a_feature_that_never_changes():
    x = torch.cat([torch.ones(20, 1), torch.arange(20.0)[:, None]], dim=1)
    head = fit_head(x, (torch.arange(20) > 9).long(), 2)
    assert head(x).isfinite().all() and (head(x).argmax(dim=1) == (torch.arange(20) > 9)).all()


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_head_refuses_labels_that_are_none(labels):
    with pytest.raises(ValueError, match="labels from 0 to 1; got 2 items"):
        fit_head(torch.randn(2, 3), torch.tensor(labels), 2)
