"""Labels that the service grammar knows of its own sentences: entities, keywords, and whether something went wrong.

Every label is read off the tables that made the sentence; no sentence is changed, and nobody was asked. "Sentiment"
here means that the customer reports a failure, which the grammar says by its intents and by one frame.
"""

import re
from collections.abc import Callable
from functools import cache

from labutils.applications.extraction import Span
from labutils.lab.data.service import LANGUAGES, MARKS, Query, Slots, intents, render, slot_names
from labutils.lab.data.service_grammar import CLOSERS, FRAMES, OPENERS, PATTERNS, VALUES

NEGATIVE, NEUTRAL = SENTIMENTS = ("negative", "neutral")
FAILURES = {
    *("missing_parcel", "damaged_parcel", "refund_status", "wrong_item", "missing_part", "double_charge"),
    *("failed_payment", "device_not_starting", "complain_staff", "complain_late", "complain_quality"),
}
FAILED_FRAMES = {i for i, (english, _) in enumerate(FRAMES) if "did not work" in english}
FUNCTION_WORDS = set(
    re.findall(
        r"\w+",
        """a an and as at because before but by do for from have i in into is it like me my not of on one or our out
        that the this to was what when where which while with you your""",
    )
)
OPENS, CLOSES = "\ue000", "\ue001"


def sentiment(query: Query) -> str:
    """Whether the sentence reports that something went wrong."""
    failed = query.intent in FAILURES or query.phrasing.frame in FAILED_FRAMES
    return NEGATIVE if failed else NEUTRAL


def entities(query: Query, language: str) -> set[Span]:
    """The values of the sentence's slots, where they stand, with the slot's name.

    Raises:
        ValueError: For an unknown language, or a query that these tables did not make.
    """
    query.text(language)  # refuses an unknown language
    opener, closer = _ends_of(query)
    names = list(query.slots)
    marked: Slots = {n: tuple(f"{OPENS}{i}:{v}{CLOSES}" for v in query.slots[n]) for i, n in enumerate(names)}
    text = render(query.phrasing, marked, opener=opener, closer=closer)[LANGUAGES.index(language)]
    spans, done = set(), 0
    for found in re.finditer(f"{OPENS}(\\d+):(.*?){CLOSES}", text):
        start = found.start() - done
        spans.add(Span(start, start + len(found[2]), names[int(found[1])]))
        done += len(found[0]) - len(found[2])
    return spans


def keywords(query: Query) -> set[str]:
    """The words of the English sentence that say what the customer wants: its act without function words and values."""
    act = intents()[query.intent].acts[query.phrasing.act][0]
    return {word for *_, word in word_spans(re.sub(r"\{\w+\}", " ", act)) if word not in FUNCTION_WORDS}


def word_spans(text: str) -> list[tuple[int, int, str]]:
    """Where each word of a text begins and ends, and its lower-case form; hyphens inside are kept.

    >>> word_spans("By next-day post.")
    [(0, 2, 'by'), (3, 11, 'next-day'), (12, 16, 'post')]
    """
    return [(m.start(), m.end(), m[0]) for m in re.finditer(r"[a-z]+(?:-[a-z]+)*", text.lower())]


def value_form(slot: str, language: str = "en") -> str:
    r"""A regular expression of all values of a slot.

    >>> value_form("order_id"), value_form("amount", "zh")
    ('[A-Z][0-9][0-9][0-9][0-9][0-9]', '[1-9][0-9]\\.[0-9]0美元')

    Raises:
        ValueError: For a slot that the grammar does not have.
    """
    place = LANGUAGES.index(language)
    if slot in VALUES:
        longest_first = sorted((pair[place] for pair in VALUES[slot]), key=len, reverse=True)
        return f"(?:{'|'.join(map(re.escape, longest_first))})"
    if slot not in PATTERNS:
        raise ValueError(f"slot must be one of {', '.join([*VALUES, *PATTERNS])}; got {slot!r}")
    pattern, *written = PATTERNS[slot]
    classes = {mark: f"[{characters}]" for mark, characters in MARKS.items()}
    classes |= {"@": "[A-Z]", "#": "[0-9]", "&": "[1-9]"}
    return re.escape(written[place]).replace(r"\{\}", "".join(classes.get(c, re.escape(c)) for c in pattern))


def read_answer(text: str) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """The intent that an answer is about, with the values in it; None for a sentence that is no answer of the desk.

    >>> read_answer("Order A12345 has left our warehouse and is on its way.")
    ('track_order', (('order_id', 'A12345'),))
    >>> read_answer("Your order is on its way.") is None
    True
    """
    for name, form in _answer_forms():
        if found := form.fullmatch(text.strip()):
            return name, tuple(sorted(found.groupdict().items()))
    return None


@cache
def _answer_forms() -> list[tuple[str, re.Pattern]]:
    """Each intent's answer in each language: first with the values that the grammar knows, then with any."""
    strict, loose = [], []
    for intent in intents().values():
        for language, template in zip(LANGUAGES, intent.answer, strict=True):
            parts = re.split(r"\{(\w+)\}", template)
            for forms, form_of in ((strict, lambda slot, of=language: value_form(slot, of)), (loose, lambda _: ".+?")):
                forms.append((intent.name, re.compile(_pattern_of(parts, form_of))))
    return strict + loose


def _pattern_of(parts: list[str], form_of: Callable[[str], str]) -> str:
    """Text and slots in turn as a pattern; a slot that comes again must have the same value."""
    pattern, seen = "", set()
    for i, part in enumerate(parts):
        if i % 2:
            pattern += f"(?P={part})" if part in seen else f"(?P<{part}>{form_of(part)})"
            seen.add(part)
        else:
            pattern += re.escape(part)
    return pattern


def _ends_of(query: Query) -> tuple[int, int]:
    """The numbers of the query's opener and closer, by trying them all: only one pair gives its text."""
    for opener, (english, _) in enumerate(OPENERS):
        for closer in range(len(CLOSERS)):
            fits = set(slot_names(english)) <= set(query.slots)
            if fits and query.text_en == render(query.phrasing, query.slots, opener=opener, closer=closer)[0]:
                return opener, closer
    raise ValueError(f"a query must be one that the service grammar makes; got {query.text_en!r}")
