"""The service corpus: customer-service queries, answers, intents and translations, English and Chinese.

A *phrasing* is one surface pattern: an intent, one of its acts, and a sentence frame. The split is by phrasing: a test
phrasing never occurs in training, in any task or language, so a score measures generalization and not memory. Most
held-out phrasings recombine known acts and frames; some hold an act that training never shows (`is_novel_act`).
Everything is a pure function of its seed; the tables are in `service_grammar.py`.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random
from string import ascii_uppercase

from labutils.lab.data.service_grammar import CLOSERS, FRAMES, INTENTS, OPENERS, PATTERNS, VALUES

ANSWER, INTENT, TO_CHINESE, TO_ENGLISH = TASKS = ("answer", "intent", "to_chinese", "to_english")
SYSTEM_MESSAGES = {
    ANSWER: "You are the service desk.",
    INTENT: "Name the intent.",
    TO_CHINESE: "Translate into Chinese.",
    TO_ENGLISH: "Translate into English.",
}
TASK_WEIGHTS = {ANSWER: 0.45, INTENT: 0.15, TO_CHINESE: 0.2, TO_ENGLISH: 0.2}
TURN_WEIGHTS = (0.5, 0.3, 0.15, 0.05)  # 1, 2, 3 or 4 turns in an answer dialogue
SPLITS = ("train", "validation", "test")
LANGUAGES = ("en", "zh")
MARKS = {"@": ascii_uppercase, "%": "BCDFGHJKLMNPQRSTVWXZ", "#": "0123456789", "&": "123456789"}

Pair = tuple[str, str]  # English, Chinese
Slots = dict[str, Pair]


@dataclass(frozen=True)
class Intent:
    """What a customer may want: its name, verb phrases (acts), one answer, and follow-up questions with answers."""

    name: str
    acts: tuple[Pair, ...]
    answer: Pair
    followups: tuple[tuple[Pair, Pair], ...]


@dataclass(frozen=True, order=True)
class Phrasing:
    """One surface pattern: an intent's name, the index of the act within it, and the index of the frame."""

    intent: str
    act: int
    frame: int


@dataclass(frozen=True)
class Query:
    """One customer sentence in both languages; `slots` maps a slot's name to its (English, Chinese) value."""

    text_en: str
    text_zh: str
    intent: str
    slots: Slots = field(hash=False)
    phrasing: Phrasing

    def text(self, language: str) -> str:
        """The query in `"en"` or `"zh"`."""
        return (self.text_en, self.text_zh)[_language_index(language)]


@dataclass(frozen=True)
class Dialogue:
    """A chat of {"role", "content"} messages; the last one is the assistant's. Lists each first-turn phrasing used."""

    task: str
    language: str
    messages: tuple[dict[str, str], ...] = field(hash=False)
    phrasings: tuple[Phrasing, ...]


def _require_member(value: object, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _require_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be an integer of at least 0; got {count!r}")


def _language_index(language: str) -> int:
    _require_member(language, LANGUAGES, "language")
    return LANGUAGES.index(language)


def _parse_intent(block: str) -> Intent:
    """Reads one block of the table: `name]`, then rows `act`, `> answer`, `? question`, `! its answer`."""
    header, *rows = block.strip().splitlines()
    kinds: dict[str, list[Pair]] = {"": [], ">": [], "?": [], "!": []}
    for row in rows:
        kind = row[0] if row[0] in kinds else ""
        english, chinese = row.removeprefix(kind).split("|")
        kinds[kind].append((english.strip(), chinese.strip()))
    followups = tuple(zip(kinds["?"], kinds["!"], strict=True))
    (answer,) = kinds[">"]
    return Intent(name=header.rstrip("]"), acts=tuple(kinds[""]), answer=answer, followups=followups)


@cache
def intents() -> dict[str, Intent]:
    """All intents by name, in the order of the table."""
    blocks = INTENTS.replace("\n  |", " |").strip().removeprefix("[").split("\n[")
    return {intent.name: intent for intent in map(_parse_intent, blocks)}


def phrasings() -> list[Phrasing]:
    """Every (intent, act, frame), in a fixed order."""
    return [
        Phrasing(intent=intent.name, act=act, frame=frame)
        for intent in intents().values()
        for act in range(len(intent.acts))
        for frame in range(len(FRAMES))
    ]


def is_novel_act(phrasing: Phrasing) -> bool:
    """Whether training never sees the phrasing's act in any frame: the last act of every fourth intent."""
    position = list(intents()).index(phrasing.intent)
    return position % 4 == 0 and phrasing.act == len(intents()[phrasing.intent].acts) - 1


def split_of(phrasing: Phrasing) -> str:
    """The split a phrasing belongs to, about 70 : 10 : 20, by a hash of its English pattern (stable across runs).

    Novel acts that would fall into training are "reserved": they belong to no split. The text is hashed, not the
    indices: inserting an act or a frame leaves every other phrasing where it is.
    """
    act = intents()[phrasing.intent].acts[phrasing.act][0]
    pattern = f"{phrasing.intent}\n{act}\n{FRAMES[phrasing.frame][0]}"
    bucket = int.from_bytes(hashlib.sha256(pattern.encode()).digest()[:8], "big") % 10
    if bucket >= 7:
        return "validation" if bucket == 7 else "test"
    return "reserved" if is_novel_act(phrasing) else "train"


@cache
def _phrasings_by_intent(split: str) -> tuple[tuple[Phrasing, ...], ...]:
    """The split's phrasings, grouped by intent, so that each intent is drawn equally often."""
    _require_member(split, SPLITS, "split")
    groups: dict[str, list[Phrasing]] = {}
    for phrasing in phrasings():
        if split_of(phrasing) == split:
            groups.setdefault(phrasing.intent, []).append(phrasing)
    return tuple(map(tuple, groups.values()))


def slot_names(template: str) -> list[str]:
    """The slots a template mentions, in order: `"send {order_id} to {city}"` gives `["order_id", "city"]`."""
    return re.findall(r"\{(\w+)\}", template)


def sample_slot(rng: Random, name: str) -> Pair:
    """A random (English, Chinese) value of a slot: a row of its table, or its pattern with each mark filled in."""
    if name in VALUES:
        return rng.choice(VALUES[name])
    if name not in PATTERNS:
        raise ValueError(f"slot must be one of {', '.join([*VALUES, *PATTERNS])}; got {name!r}")
    pattern, english, chinese = PATTERNS[name]
    value = "".join(rng.choice(MARKS.get(char, char)) for char in pattern)
    return english.format(value), chinese.format(value)


def _fill(template: Pair, slots: Slots) -> Pair:
    """Both languages of a template with the slot values in place."""
    english, chinese = template
    return (
        english.format_map({name: pair[0] for name, pair in slots.items()}),
        chinese.format_map({name: pair[1] for name, pair in slots.items()}),
    )


def render(phrasing: Phrasing, slots: Slots, *, opener: int = 0, closer: int = 0) -> Pair:
    """The (English, Chinese) query of a phrasing. Opener 0 and closer 0 are empty."""
    act = _fill(intents()[phrasing.intent].acts[phrasing.act], slots)
    sentences = [
        _fill(OPENERS[opener], slots),
        tuple(frame.format(act=text) for frame, text in zip(FRAMES[phrasing.frame], act, strict=True)),
        CLOSERS[closer],
    ]
    return " ".join(filter(None, (en for en, _ in sentences))), "".join(zh for _, zh in sentences)


def _query(rng: Random, phrasing: Phrasing) -> Query:
    """Draws opener, closer (each empty half the time) and slot values for a phrasing."""
    opener = rng.randrange(len(OPENERS)) if rng.random() < 0.5 else 0
    closer = rng.randrange(len(CLOSERS)) if rng.random() < 0.5 else 0
    names = slot_names(OPENERS[opener][0]) + slot_names(intents()[phrasing.intent].acts[phrasing.act][0])
    slots = {name: sample_slot(rng, name) for name in names}
    text_en, text_zh = render(phrasing, slots, opener=opener, closer=closer)
    return Query(text_en=text_en, text_zh=text_zh, intent=phrasing.intent, slots=slots, phrasing=phrasing)


def sample_query(rng: Random, split: str) -> Query:
    """A random query of a split: an intent, then one of its phrasings, both uniformly."""
    return _query(rng, rng.choice(rng.choice(_phrasings_by_intent(split))))


def _messages(task: str, turns: list[Pair]) -> tuple[dict[str, str], ...]:
    messages = [{"role": "system", "content": SYSTEM_MESSAGES[task]}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return tuple(messages)


def _answer_turns(query: Query, language: str) -> list[Pair]:
    """The (question, answer) turns an intent offers: the query first, then its follow-ups."""
    intent, index = intents()[query.intent], _language_index(language)
    turns = [(query.text(language), _fill(intent.answer, query.slots)[index])]
    for question, answer in intent.followups:
        turns.append((_fill(question, query.slots)[index], _fill(answer, query.slots)[index]))
    return turns


def _single_turn(task: str, query: Query, language: str) -> Dialogue:
    """One query and its expected reply; the translation tasks fix the language of the query."""
    if task == ANSWER:
        turn = _answer_turns(query, language)[0]
    elif task == INTENT:
        turn = (query.text(language), query.intent)
    else:
        language = "en" if task == TO_CHINESE else "zh"
        turn = (query.text(language), query.text("zh" if task == TO_CHINESE else "en"))
    messages = _messages(task, [turn])
    return Dialogue(task=task, language=language, messages=messages, phrasings=(query.phrasing,))


def _answer_dialogue(rng: Random, split: str, language: str) -> Dialogue:
    """One to four turns: a query, perhaps follow-ups, perhaps other intents; half have no system message."""
    (length,) = rng.choices(range(1, 5), TURN_WEIGHTS)
    turns: list[Pair] = []
    used: list[Phrasing] = []
    while len(turns) < length:
        query = sample_query(rng, split)
        if query.intent in (phrasing.intent for phrasing in used):
            continue
        offered = _answer_turns(query, language)
        kept = rng.randint(1, min(len(offered), length - len(turns)))
        turns += offered[:kept]
        used.append(query.phrasing)
    messages = _messages(ANSWER, turns)[rng.randrange(2) :]
    return Dialogue(task=ANSWER, language=language, messages=messages, phrasings=tuple(used))


def sample_dialogue(rng: Random, split: str) -> Dialogue:
    """A random dialogue of a split: the task by `TASK_WEIGHTS`, the language by a fair coin."""
    _require_member(split, SPLITS, "split")
    (task,) = rng.choices(TASKS, [TASK_WEIGHTS[task] for task in TASKS])
    language = rng.choice(LANGUAGES)
    if task == ANSWER:
        return _answer_dialogue(rng, split, language)
    return _single_turn(task, sample_query(rng, split), language)


def dialogues(seed: int, split: str, count: int) -> Iterator[Dialogue]:
    """`count` random dialogues of a split, the same for the same seed; a longer run begins with the shorter one."""
    _require_member(split, SPLITS, "split")
    _require_count(count)
    rng = Random(f"{split}-{seed}")
    return (sample_dialogue(rng, split) for _ in range(count))


def evaluation_set(task: str, split: str, count: int, seed: int) -> list[Dialogue]:
    """`count` single-turn items for scoring: the last message is the expected reply.

    The split's phrasings come in a shuffled order, so none repeats before all have been used.
    """
    _require_member(task, TASKS, "task")
    _require_member(split, SPLITS, "split")
    _require_count(count)
    rng = Random(f"evaluation-{task}-{split}-{seed}")
    pool = [phrasing for group in _phrasings_by_intent(split) for phrasing in group]
    rng.shuffle(pool)
    queries = [_query(rng, pool[index % len(pool)]) for index in range(count)]
    return [_single_turn(task, query, rng.choice(LANGUAGES)) for query in queries]


def exact_match(predictions: list[str], references: list[str]) -> list[bool]:
    r"""Whether each prediction equals its reference, apart from white space at the ends.

    >>> exact_match([" yes\n", "Yes"], ["yes", "yes"])
    [True, False]
    """
    if len(predictions) != len(references):
        raise ValueError(f"predictions must number len(references)={len(references)}; got {len(predictions)}")
    return [guess.strip() == truth.strip() for guess, truth in zip(predictions, references, strict=True)]


def describe() -> dict[str, object]:
    """Counts for the data card."""
    splits = [split_of(phrasing) for phrasing in phrasings()]
    return {
        "intents": len(intents()),
        "acts": sum(len(intent.acts) for intent in intents().values()),
        "followups": sum(len(intent.followups) for intent in intents().values()),
        "frames": len(FRAMES),
        "openers": len(OPENERS),
        "closers": len(CLOSERS),
        "phrasings": {split: splits.count(split) for split in SPLITS},
        "slot_values": {name: len(pairs) for name, pairs in VALUES.items()},
        "slot_patterns": {name: pattern for name, (pattern, *_) in PATTERNS.items()},
    }
