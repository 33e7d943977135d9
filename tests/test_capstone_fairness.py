"""Fairness: groups, losses paired by meaning, gaps, and calibration texts that are mixed by their share."""

import json
from collections import Counter

import pytest
import torch

from labutils.applications.scores import paired_difference
from labutils.capstone import fairness
from labutils.capstone.designs import Design
from labutils.capstone.fairness import (
    COMPRESSED,
    KNOWN,
    MIXES,
    NEW_ACT,
    NEW_FRAME,
    answer_task,
    by_meaning,
    calibrated_decoder,
    calibration_statistics,
    drawn_requests,
    group_differences,
    groups_of,
    intent_counts,
    language_difference,
    loss_gap,
    mixed,
    stored_scores,
)
from labutils.lab.data import service
from labutils.lab.layers.calibration import InputStatistics
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.load import load_model


def test_requests_come_in_both_languages_with_one_meaning_and_every_phrasing():
    requests = drawn_requests(30)
    assert [r.language for r in requests] == ["en", "zh"] * 30
    assert all(a.query == b.query for a, b in zip(requests[::2], requests[1::2], strict=True))
    assert Counter(r.phrasing for r in requests) == {KNOWN: 20, NEW_FRAME: 20, NEW_ACT: 20}
    for request in requests:
        seen = service.split_of(request.query.phrasing)
        assert seen == ("train" if request.phrasing == KNOWN else "test")
    assert drawn_requests(10) == requests[:20]


def test_request_and_its_answer_are_what_the_corpus_writes():
    for request in drawn_requests(12):
        whole = service._single_turn(service.ANSWER, request.query, request.language).messages
        assert [*request.messages, {"role": "assistant", "content": request.answer}] == list(whole)


def test_task_takes_the_right_answer_and_no_other():
    requests = drawn_requests(6)
    task = answer_task(load_model().tokenizer, requests)
    assert [task.judge(request.answer, index) for index, request in enumerate(requests)] == [1.0] * 12
    assert task.judge(requests[2].answer, 0) == 0.0


def test_groups_split_by_language_phrasing_and_frequency():
    requests = drawn_requests(60)
    counts = {name: 100 - place for place, name in enumerate(service.intents())}
    groups = groups_of(requests, counts)
    assert groups["en"] == list(range(0, 120, 2)) and groups["zh"] == list(range(1, 120, 2))
    assert sorted(groups[KNOWN] + groups[NEW_FRAME] + groups[NEW_ACT]) == list(range(120))
    names, third = list(service.intents()), len(service.intents()) // 3
    assert {requests[i].query.intent for i in groups["frequent intent"]} <= set(names[:third])
    assert {requests[i].query.intent for i in groups["rare intent"]} <= set(names[-third:])


def test_intents_are_counted_in_what_training_read():
    counts = intent_counts(400)
    drawn = list(service.dialogues(seed=0, split="train", count=400))
    assert counts.total() == sum(len(d.phrasings) for d in drawn) and counts.total() > 400
    assert intent_counts(800).total() > counts.total()


def test_two_languages_of_one_meaning_are_one_observation():
    assert by_meaning([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 1, 2, 3]) == [0.5, 1.0]
    changed, baseline = [1.0, 0.0] * 20, [1.0, 1.0] * 20
    gap = group_differences(changed, baseline, {"all": range(40)})["all"]
    assert (gap.items, gap.mean) == (20, -0.5)
    naive = paired_difference(changed, baseline)
    assert naive.items == 40  # twice as many as there are meanings


def test_language_difference_by_hand():
    baseline, changed = [1.0] * 20, [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0] * 2
    assert language_difference(changed, baseline).mean == pytest.approx(-0.2)  # Chinese lost 2 of 5, English 1 of 5
    assert language_difference(baseline, baseline).mean == 0


def test_gap_is_between_losses_not_between_scores():
    baseline = {"a": [1.0] * 10, "b": [0.0] * 5 + [1.0] * 5, "c": [1.0] * 10}
    changed = {"a": [1.0] * 8 + [0.0] * 2, "b": [0.0] * 5 + [1.0] * 5, "c": [1.0] * 9 + [0.0]}
    gap = loss_gap(changed, baseline)
    assert (gap.worst, gap.best, gap.value) == ("a", "b", pytest.approx(0.2))  # "b" scores lowest and loses nothing
    assert gap.low == 0.0 and 0.4 <= gap.high <= 0.6 and "a loses +0.200" in str(gap)


def test_gap_is_between_two_groups_even_where_nothing_was_lost():
    same = {"a": [1.0] * 5, "b": [1.0] * 5}
    gap = loss_gap(same, same)
    assert (gap.worst, gap.best, gap.value) == ("a", "b", 0.0)


def test_interval_of_a_gap_has_the_width_of_theory():
    losses = {"a": [0.0, 1.0] * 100, "b": [0.0] * 150 + [1.0] * 50}
    gap = loss_gap({n: [1 - v for v in row] for n, row in losses.items()}, {n: [1.0] * 200 for n in losses})
    half = 1.96 * (0.25 / 200 + 0.1875 / 200) ** 0.5
    assert (gap.high - gap.low) / 2 == pytest.approx(half, rel=0.1)


def test_mixed_statistics_weigh_the_tokens():
    one, two = (InputStatistics.empty(torch.nn.Linear(2, 1), with_gram=True) for _ in range(2))
    one.add_(torch.tensor([[1.0, 0.0]]))
    two.add_(torch.tensor([[0.0, 2.0]]))
    seen = {"en": {"layer": one}, "zh": {"layer": two}}
    assert torch.equal(mixed(seen, {"en": 0.25, "zh": 0.75})["layer"].gram, torch.tensor([[0.25, 0.0], [0.0, 3.0]]))
    assert torch.equal(one.gram, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="add up to 1; got {'en': 1.0, 'zh': 1.0}"):
        mixed(seen, {"en": 1.0, "zh": 1.0})


def test_calibration_text_is_of_one_language():
    tokenizer = load_model().tokenizer
    english, chinese, more = (
        tokenizer.decode(calibration_batches(tokenizer, code=0, dialogues=2, context=64, **chosen)[0].flatten())
        for chosen in ({"language": "en"}, {"language": "zh"}, {"language": "en", "seed": 1})
    )
    assert not any("\u4e00" <= c <= "\u9fff" for c in english + more) and english != more
    assert any("\u4e00" <= c <= "\u9fff" for c in chinese)
    with pytest.raises(ValueError, match="language must be one of en, zh; got 'fr'"):
        calibration_batches(tokenizer, language="fr")


@pytest.mark.slow
def test_calibrated_decoder_depends_on_the_text():
    seen, design = calibration_statistics("en", "more en", rows=1, context=64), Design(bits=3)
    prompt = torch.tensor([[2, 70, 71, 72, 90]])
    decoders = [calibrated_decoder(design, seen, {text: 1.0}) for text in seen] + [design.decoder()]
    logits = [decoder.prefill(prompt).flatten().tolist() for decoder in decoders]
    assert len({tuple(row) for row in logits}) == 3


def test_stored_run_holds_whole_variants_alone(tmp_path):
    path = tmp_path / "fairness.jsonl"
    assert stored_scores(path) == {}
    blocks = range(0, 2 * fairness.MEANINGS, fairness.BLOCK)
    rows = [{"variant": "a", "first": first, "right": "01" * (fairness.BLOCK // 2)} for first in reversed(blocks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"variant": "b", "first": 0, "right": "11"}]))
    assert list(stored_scores(path)) == ["a"] and stored_scores(path)["a"] == [0.0, 1.0] * fairness.MEANINGS


def test_run_in_pieces_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, asked = tmp_path / "fairness.jsonl", []

    def answered(targets, tokenizer, requests):
        asked.append(next(iter(targets)))
        return {name: fairness.Outcome(tuple(1.0 for _ in requests), (), ()) for name in targets}

    monkeypatch.setattr(fairness, "answered", answered)
    monkeypatch.setattr(fairness, "MEANINGS", 50)
    monkeypatch.setattr(fairness, "COMPRESSED", {"int8": COMPRESSED["int8"], "int4": COMPRESSED["int4"]})
    monkeypatch.setattr(fairness, "MIXES", {})
    monkeypatch.setattr(Design, "decoder", lambda design: None)
    assert not fairness.store_run(path, minutes=0)
    assert fairness.store_run(path) and asked == ["int8"] * 2 + ["int4"] * 2
    assert fairness.store_run(path) and len(asked) == 4  # nothing is left to run
    assert stored_scores(path) == {"int8": [1.0] * 100, "int4": [1.0] * 100}


def test_shipped_run_is_whole_and_of_the_requests_that_are_drawn_now():
    scores = stored_scores()
    assert set(scores) == {*COMPRESSED, *MIXES}
    assert {len(row) for row in scores.values()} == {2 * fairness.MEANINGS}


@pytest.mark.slow
def test_shipped_run_can_be_repeated():
    requests = drawn_requests(fairness.MEANINGS)[:20]
    outcome = fairness.answered({"x": Design(bits=3).decoder()}, load_model().tokenizer, requests)["x"]
    same = sum(a == b for a, b in zip(outcome.scores, stored_scores()["int3"], strict=False))
    assert same >= 18  # another processor may round another way


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: drawn_requests(0), "meanings must be at least 1, of the validation or test split; got 0 of test"),
        (lambda: drawn_requests(3, split="train"), "got 3 of train"),
        (lambda: loss_gap({"a": [1.0]}, {"a": [1.0]}), "at least two groups; got 1"),
    ],
)
def test_fairness_bad_input_states_the_rule(call, words):
    with pytest.raises(ValueError, match=words):
        call()
