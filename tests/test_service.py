"""The service corpus: tables well formed and one-to-one, splits that do not leak, seeds that decide everything."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random

import pytest

from labutils.lab.data import service
from labutils.lab.data.service_grammar import CLOSERS, FRAMES, OPENERS, PATTERNS, VALUES

INTENTS = service.intents()
ACTS = [act for intent in INTENTS.values() for act in intent.acts]
REPLIES = [pair for i in INTENTS.values() for pair in [i.answer, *(half for turn in i.followups for half in turn)]]
TEMPLATES = ACTS + REPLIES + OPENERS + FRAMES + CLOSERS
FIRST_VALUES = {name: service.sample_slot(Random(0), name) for name in [*VALUES, *PATTERNS]}
CJK = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
DIGEST = "import hashlib; from labutils.lab.data.service import dialogues; "
DIGEST += "print(hashlib.sha256(repr([d.messages for d in dialogues(3, 'train', 100)]).encode()).hexdigest())"


def without_slots(template: str) -> str:
    return re.sub(r"\{\w+\}", "", template)


def all_text(dialogue: service.Dialogue) -> str:
    return "\n".join(message["content"] for message in dialogue.messages)


def test_tables_have_the_promised_size():
    counts = service.describe()
    assert counts["intents"] >= 44 and counts["frames"] >= 14 and counts["openers"] >= 8 and counts["closers"] >= 6
    assert counts["acts"] == len(ACTS) and len(service.phrasings()) == len(ACTS) * len(FRAMES)
    assert all(len(intent.acts) >= 4 and 1 <= len(intent.followups) <= 3 for intent in INTENTS.values())
    least = {"product": 30, "city": 24, "name": 30, "colour": 10, "payment": 6}
    assert all(counts["slot_values"][name] >= least[name] for name in least)


def test_slots_exist_and_agree():
    known = {*VALUES, *PATTERNS, "act"}
    for english, chinese in TEMPLATES:
        assert sorted(service.slot_names(english)) == sorted(service.slot_names(chinese)), english
        assert set(service.slot_names(english)) <= known, english
    for intent in INTENTS.values():
        slots = {frozenset(service.slot_names(english)) for english, _ in intent.acts}
        assert len(slots) == 1, intent.name
        replies = [intent.answer, *(half for turn in intent.followups for half in turn)]
        assert all(set(service.slot_names(english)) <= set(*slots) for english, _ in replies), intent.name
        assert bool(service.slot_names(intent.answer[0])) == bool(*slots), f"{intent.name}: repeat a slot in the answer"


@pytest.mark.parametrize("table", [ACTS, OPENERS, FRAMES, CLOSERS, *VALUES.values()])
def test_tables_are_one_to_one(table):
    english, chinese = zip(*table, strict=True)
    assert len(set(english)) == len(set(chinese)) == len(table)


def test_languages_do_not_mix():
    for english, chinese in TEMPLATES:
        assert not CJK.search(english), english
        assert not re.search(r"[A-Za-z?!,.:;]", without_slots(chinese)), chinese
    for english, chinese in (pair for pairs in VALUES.values() for pair in pairs):
        assert not CJK.search(english) and not re.search("[A-Za-z]", chinese)


def test_sentences_end_properly():
    for english, chinese in REPLIES + OPENERS[1:] + FRAMES + CLOSERS[1:]:
        assert english[-1] in ".!?" and chinese[-1] in "。！？"
        assert (english[-1] == "?") == (chinese[-1] == "？") or (english, chinese) in REPLIES
    for english, chinese in ACTS:
        assert english[-1] not in ".!?" and chinese[-1] not in "。！？"


def test_article_fits_the_next_sound():
    for english, _ in TEMPLATES:
        assert not re.search(r"\ban? \{", english), f"no article before a slot: {english}"
        assert not re.search(r"\ba [aeio]|\ban (?!hour)[^aeiou]", english, re.IGNORECASE), english


@pytest.mark.parametrize("language", [0, 1])
def test_phrasings_give_distinct_sentences(language):
    sentences = Counter(service.render(phrasing, FIRST_VALUES)[language] for phrasing in service.phrasings())
    assert max(sentences.values()) == 1


def test_render_by_hand():
    act, frame = [en for en, _ in INTENTS["cancel_order"].acts].index("cancel order {order_id}"), 0
    phrasing = service.Phrasing(intent="cancel_order", act=act, frame=frame)
    slots = {"order_id": ("A12345", "A12345"), "name": ("Anna", "安娜")}
    assert service.render(phrasing, slots) == ("I want to cancel order A12345.", "我想取消订单A12345。")
    opener = OPENERS.index(("Hello, this is {name}.", "您好，我是{name}。"))
    assert service.render(phrasing, slots, opener=opener, closer=1) == (
        "Hello, this is Anna. I want to cancel order A12345. Thank you!",
        "您好，我是安娜。我想取消订单A12345。谢谢！",
    )


def test_sample_slot_patterns():
    shapes = {"order_id": r"[A-Z]\d{5}", "tracking": r"TR\d{8}", "coupon": r"[A-Z]{4}\d\d", "phone": r"555-\d{4}"}
    rng = Random(1)
    for name, shape in shapes.items():
        english, chinese = service.sample_slot(rng, name)
        assert english == chinese and re.fullmatch(shape, english)
    english, chinese = service.sample_slot(rng, "amount")
    assert re.fullmatch(r"\$[1-9]\d\.\d0", english) and chinese == english[1:] + "美元"
    assert ("May 12", "5月12日") in VALUES["date"] and ("3 pm", "下午3点") in VALUES["time"]


def test_split_shares_and_coverage():
    shares = service.describe()["phrasings"]
    total = len(service.phrasings())
    for split, share in {"train": 0.65, "validation": 0.1, "test": 0.21}.items():  # the rest is reserved
        assert shares[split] / total == pytest.approx(share, abs=0.02)
    train = [phrasing for phrasing in service.phrasings() if service.split_of(phrasing) == "train"]
    acts = Counter((phrasing.intent, phrasing.act) for phrasing in train)
    frames = Counter(phrasing.frame for phrasing in train)
    novel = {(p.intent, p.act) for p in service.phrasings() if service.is_novel_act(p)}
    assert len(acts) == len(ACTS) - len(novel) and min(acts.values()) >= 2
    assert len(frames) == len(FRAMES) and min(frames.values()) >= 2


def test_novel_acts_never_reach_training():
    novel = [phrasing for phrasing in service.phrasings() if service.is_novel_act(phrasing)]
    splits = Counter(service.split_of(phrasing) for phrasing in novel)
    assert len(novel) == 16 * len(FRAMES) and splits["train"] == 0 and splits["test"] > 50
    trained = {(p.intent, p.act) for dialogue in service.dialogues(3, "train", 3000) for p in dialogue.phrasings}
    assert not trained & {(p.intent, p.act) for p in novel}


@pytest.mark.parametrize("split", service.SPLITS)
def test_dialogues_stay_in_their_split(split):
    for dialogue in service.dialogues(0, split, 2000):
        assert {service.split_of(phrasing) for phrasing in dialogue.phrasings} == {split}


def test_training_text_holds_no_test_sentence():
    """Independent of the bookkeeping: fix the slot values, then look for every test sentence in the training text."""
    rendered = {split: set() for split in (*service.SPLITS, "reserved")}
    for phrasing in service.phrasings():
        rendered[service.split_of(phrasing)] |= set(service.render(phrasing, FIRST_VALUES))
    train = "\n".join(rendered["train"])
    assert not [text for text in rendered["test"] | rendered["validation"] if f"{text}\n" in f"{train}\n"]


def test_dialogue_form():
    lengths = Counter()
    for dialogue in service.dialogues(1, "train", 3000):
        roles = [message["role"] for message in dialogue.messages]
        if roles[0] == "system":
            assert dialogue.messages[0]["content"] == service.SYSTEM_MESSAGES[dialogue.task]
            roles = roles[1:]
        else:
            assert dialogue.task == service.ANSWER
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not re.search(r"[{}]", all_text(dialogue))
        lengths[dialogue.task, len(roles) // 2] += 1
    assert {turns for task, turns in lengths if task == service.ANSWER} == {1, 2, 3, 4}
    assert {turns for task, turns in lengths if task != service.ANSWER} == {1}
    for task, weight in service.TASK_WEIGHTS.items():
        share = sum(n for (name, _), n in lengths.items() if name == task) / 3000
        assert share == pytest.approx(weight, abs=0.03)


def test_every_intent_has_about_equal_share():
    rng = Random(0)
    drawn = Counter(service.sample_query(rng, "train").intent for _ in range(100 * len(INTENTS)))
    assert drawn.keys() == INTENTS.keys() and min(drawn.values()) > 50


def test_dialogues_are_distinct():
    texts = {(d.task, all_text(d)) for d in service.dialogues(0, "train", 20_000)}
    assert len(texts) >= 0.99 * 20_000


def test_dialogues_depend_on_the_seed_only():
    first = list(service.dialogues(5, "test", 50))
    assert first == list(service.dialogues(5, "test", 50)) == list(islice(service.dialogues(5, "test", 80), 50))
    assert first != list(service.dialogues(6, "test", 50))


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_dialogues_ignore_the_hash_seed(hash_seed):
    here = repr([d.messages for d in service.dialogues(3, "train", 100)]).encode()
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    fresh = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == hashlib.sha256(here).hexdigest()


@pytest.mark.parametrize("task", service.TASKS)
def test_evaluation_set_items(task):
    items = service.evaluation_set(task, "test", 300, seed=0)
    assert items == service.evaluation_set(task, "test", 300, seed=0) and len(items) == 300
    assert len({item.phrasings for item in items}) == 300
    for item in items:
        system, question, reply = item.messages
        assert system["content"] == service.SYSTEM_MESSAGES[task] and item.task == task
        assert service.split_of(*item.phrasings) == "test"
        in_chinese = {service.TO_CHINESE: True, service.TO_ENGLISH: False, service.INTENT: False}
        assert bool(CJK.search(reply["content"])) == in_chinese.get(task, item.language == "zh")
        assert bool(CJK.search(question["content"])) == (item.language == "zh")
        if task == service.INTENT:
            assert reply["content"] == item.phrasings[0].intent


def test_evaluation_set_repeats_a_phrasing_only_after_all():
    size = service.describe()["phrasings"]["validation"]
    items = service.evaluation_set("intent", "validation", size + 5, seed=1)
    assert len({item.phrasings for item in items}) == size


def test_translations_are_inverse():
    """A sentence has one translation: the same English text never comes with two Chinese ones, or the reverse."""
    rng, forward, backward = Random(2), {}, {}
    for _ in range(5000):
        query = service.sample_query(rng, "train")
        assert forward.setdefault(query.text_en, query.text_zh) == query.text_zh
        assert backward.setdefault(query.text_zh, query.text_en) == query.text_en


def test_exact_match_strips_only():
    assert service.exact_match([" a\n", "A", "a b"], ["a", "a", "ab"]) == [True, False, False]
    with pytest.raises(ValueError, match=r"must number len\(references\)=2; got 1"):
        service.exact_match(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: service.dialogues(0, "dev", 3), "split must be one of train, validation, test; got 'dev'"),
        (lambda: service.dialogues(0, "train", -1), "count must be an integer of at least 0; got -1"),
        (lambda: service.dialogues(0, "train", 2.0), "count must be an integer of at least 0; got 2.0"),
        (lambda: service.sample_query(Random(0), "dev"), "split must be one of"),
        (lambda: service.sample_dialogue(Random(0), "dev"), "split must be one of"),
        (lambda: service.evaluation_set("sum", "test", 3, seed=0), "task must be one of answer, .*; got 'sum'"),
        (lambda: service.evaluation_set("intent", "test", -2, seed=0), "count must be .*; got -2"),
        (lambda: service.sample_slot(Random(0), "mood"), "slot must be one of .*; got 'mood'"),
        (lambda: service.sample_query(Random(0), "test").text("de"), "language must be one of en, zh; got 'de'"),
    ],
)
def test_bad_input_states_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
