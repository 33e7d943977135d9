"""Checks of chapter 12, speech: word error rate, CTC's collapse, committed text, noise at a ratio."""

import math

from labutils.course.checks import cases_of, exercise, expect_function


def _distance(said, heard, *, insertions=True, substitution=1):
    above = list(range(len(heard) + 1)) if insertions else [0] * (len(heard) + 1)
    for i, a in enumerate(said, start=1):
        row = [i]
        for j, b in enumerate(heard, start=1):
            changed = above[j - 1] + (substitution if a != b else 0)
            row.append(min(above[j] + 1, row[j - 1] + (1 if insertions else 0), changed))
        above = row
    return above[-1]


def _wer(said, heard, **change):
    return _distance(said.split(), heard.split(), **change) / len(said.split())


def _by_place(said, heard):
    a, b = said.split(), heard.split()
    return (sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))) / len(a)


@exercise("12.7")
def word_error_rate(answer):
    """Fewest edits between the words of two sentences, per word that was said."""
    expect_function(
        answer,
        _wer,
        cases=cases_of(
            "said heard",
            ("return the red coat", "return the bread coat"),
            ("please return the coat", "return the red coat"),
            ("yes", "yes of course sir"),
            ("pay with points", ""),
            ("find a shop in rome", "find a new shop in rome please"),
        ),
        mistakes=[
            (
                lambda said, heard: _distance(said, heard) / len(said),
                "that is the rate of characters: split both sentences into words first",
            ),
            (_by_place, "one missing word shifts all others: take the FEWEST edits, not a comparison place by place"),
            (
                lambda said, heard: _distance(said.split(), heard.split()) / max(len(heard.split()), 1),
                "divide by the words that were SAID: a recogniser must not improve its rate by inventing words",
            ),
            (
                lambda said, heard: _wer(said, heard, insertions=False),
                "inserted words are errors too: count them",
            ),
            (
                lambda said, heard: min(_wer(said, heard), 1.0),
                "do not cut at 1: with enough insertions the rate exceeds 1",
            ),
            (
                lambda said, heard: _wer(said, heard, substitution=2),
                "a word heard as another one is ONE edit, not a deletion and an insertion",
            ),
        ],
    )


def _collapse(ids, blank=0, *, merge=True, first_drop=False, keep=False):
    if first_drop:
        ids = [i for i in ids if i != blank]
    if merge:
        ids = [i for k, i in enumerate(ids) if k == 0 or i != ids[k - 1]]
    return [i for i in ids if keep or i != blank]


def _collapse_wrong(**change):
    return lambda ids, blank: _collapse(ids, blank, **change)


@exercise("12.10")
def collapse(answer):
    """CTC's reading of one id a frame: repeats merged, then blanks dropped."""
    expect_function(
        answer,
        _collapse,
        cases=cases_of(
            "ids blank",
            ([0, 3, 3, 0, 5, 5, 5], 0),
            ([3, 0, 3, 3], 0),
            ([7, 7, 2, 7, 2, 2], 7),
            ([4, 5, 4], 0),
            ([0, 0], 0),
            ([], 0),
        ),
        mistakes=[
            (
                _collapse_wrong(first_drop=True),
                "merge repeats BEFORE you drop blanks: a blank between two equal letters keeps both",
            ),
            (_collapse_wrong(merge=False), "a letter that lasts several frames is one letter: merge neighbours first"),
            (lambda ids, blank: _collapse(ids, 0), "the blank is not always 0: use the argument"),
            (_collapse_wrong(keep=True), "a blank is no letter: drop blanks after merging"),
            (
                lambda ids, blank: list(dict.fromkeys(i for i in ids if i != blank)),
                "only NEIGHBOURS merge: a letter may come again later",
            ),
        ],
    )


def _agreed(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _commit(done, before, now, *, revoke=False, unchecked=False, letters=False, anywhere=False):
    a, b = before.split(), now.split()
    if anywhere:
        words = [x for x, y in zip(a, b, strict=False) if x == y]
    elif letters:
        return now[: max(_agreed(before, now), len(done))]
    else:
        words = b[: _agreed(a, b)]
    kept = done.split()
    if not revoke and (len(words) <= len(kept) or (not unchecked and words[: len(kept)] != kept)):
        return done
    return " ".join(words)


def _commit_wrong(**change):
    return lambda done, before, now: _commit(done, before, now, **change)


@exercise("12.9")
def commit(answer):
    """The text that may be shown for good: the beginning on which two partial texts in a row agree."""
    expect_function(
        answer,
        _commit,
        cases=cases_of(
            "done before now",
            ("", "can i", "can i pay"),
            ("can", "can eye pay", "can i pay with"),
            ("can i pay", "can i pay with", "can eye pay with"),
            ("can", "could i pay", "could i pay"),
            ("", "return the print", "return the printer"),
            ("", "i want a red coat", "i want the red coat"),
            ("can i", "", "can i pay"),
            ("", "", "can"),
        ),
        mistakes=[
            (
                _commit_wrong(unchecked=True),
                "the two agree on a text that contradicts what was shown: then return `done` as it is",
            ),
            (
                lambda done, before, now: now,
                "the newest text may still change: show only what the one before said too",
            ),
            (_commit_wrong(revoke=True), "what was shown stays: never return less than `done`"),
            (_commit_wrong(letters=True), "compare words, not letters: half a word is not agreed on"),
            (
                _commit_wrong(anywhere=True),
                "only the common BEGINNING counts: stop at the first word that differs",
            ),
        ],
    )


def _scale(speech, noise, snr_db, *, factor=10, amplitude=False, inverse=False, root=True):
    powers = [sum(x * x for x in part) / len(part) for part in (speech, noise)]
    if amplitude:
        powers = [max(abs(x) for x in part) for part in (speech, noise)]
    ratio = powers[0] / powers[1]
    wanted = 10 ** (snr_db / factor)
    gain = ratio * wanted if inverse else ratio / wanted
    return math.sqrt(gain) if root else gain


def _gain_wrong(**change):
    return lambda speech, noise, snr_db: _scale(speech, noise, snr_db, **change)


def _by_sum(speech, noise, snr_db):
    powers = [sum(x * x for x in part) for part in (speech, noise)]
    return math.sqrt(powers[0] / powers[1] / 10 ** (snr_db / 10))


@exercise("12.8")
def noise_gain(answer):
    """The factor that brings noise to a signal-to-noise ratio in decibels."""
    expect_function(
        answer,
        _scale,
        cases=cases_of(
            "speech noise snr_db",
            ([4.0, -4.0], [1.0, -1.0], 0),
            ([3.0, -3.0, 1.0, 1.0], [1.0, -2.0], 20),
            ([6.0, 0.0], [2.0, 2.0, -2.0], 10),
            ([1.0, 5.0, -2.0], [3.0, 1.0, 1.0], -5),
        ),
        mistakes=[
            (
                _gain_wrong(factor=20),
                "decibels of a POWER ratio divide by 10: 20 belongs to a ratio of amplitudes",
            ),
            (
                _gain_wrong(root=False),
                "the ratio is one of powers, and noise is scaled in amplitude: take the square root",
            ),
            (_gain_wrong(amplitude=True, root=False, factor=20), "a peak is no power: take the mean of the squares"),
            (_gain_wrong(amplitude=True), "a peak is no power: take the mean of the squares"),
            (_gain_wrong(inverse=True), "more decibels mean LESS noise: divide by 10^(snr_db / 10)"),
            (_by_sum, "sound and noise differ in length: power is the MEAN of the squares, not their sum"),
        ],
    )
