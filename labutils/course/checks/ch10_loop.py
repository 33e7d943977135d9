"""Checks of chapter 10: how far to draft, prompt lookup, a loop with a real bug."""

import torch
from torch.nn.functional import one_hot

from labutils.course.checks import cases_of, exercise, expect_function


def _speedups(acceptance, step_s, draft_s, *, tokens=None, rows=1, drafting=True):
    made = tokens or (lambda a, g: sum(a**i for i in range(g + 1)))
    for count in range(len(step_s)):
        seconds = step_s[max(count + rows, 1) - 1] + count * draft_s * drafting
        yield made(acceptance, count) * step_s[0] / seconds


def _best(**change):
    def choose(acceptance, step_s, draft_s):
        gains = list(_speedups(acceptance, step_s, draft_s, **change))
        count = max(range(len(gains)), key=gains.__getitem__)
        return count, gains[count]

    return choose


def _swapped(acceptance, draft_tokens):
    if draft_tokens == 1:
        return acceptance + 1
    return (1 - draft_tokens ** (acceptance + 1)) / (1 - draft_tokens)


def _most_tokens(acceptance, step_s, draft_s):
    gains = list(_speedups(acceptance, step_s, draft_s))
    return len(gains) - 1, gains[-1]


@exercise("10.4")
def best_draft_tokens(answer):
    """The γ with the highest predicted speed-up, and that speed-up."""
    flat, linear = [1.0] * 9, [1.0 + 0.5 * i for i in range(9)]
    steps = [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 3.0, 3.2]
    expect_function(
        answer,
        _best(),
        cases=cases_of(
            "acceptance step_s draft_s",
            (0.5, [2.0, 2.0, 4.0], 0.0),
            (0.8, steps, 0.1),
            (0.7, linear, 0.0),
            (0.2, linear, 0.6),
            (0.9, flat, 0.3),
            (1.0, steps, 0.05),
        ),
        rtol=1e-4,
        mistakes=[
            (
                _best(tokens=_swapped),
                "γ and α are swapped: (1 - α^(γ + 1)) / (1 - α), with the acceptance α as the base",
            ),
            (_best(rows=0), "γ drafted tokens make γ + 1 rows: step_s[γ], counted from 0"),
            (_best(drafting=False), "drafting is not free: add γ · draft_s to the step"),
            (
                _best(tokens=lambda a, g: 1 + a * g),
                "a token counts only if all before it stood: 1 + α + α² + … + α^γ, not 1 + α γ",
            ),
            (
                _best(tokens=lambda a, g: sum(a**i for i in range(1, g + 1))),
                "the target's own token comes in every step: the sum begins with α^0 = 1",
            ),
            (_most_tokens, "the most tokens a step is not the most speed: divide by the step's seconds"),
        ],
    )


def _lookup(token_ids, count, longest, *, shortest_first=False, first=False, itself=False, unbounded=False):
    lengths = range(min(longest, len(token_ids) - 1), 0, -1)
    for n in reversed(lengths) if shortest_first else lengths:
        suffix = token_ids[-n:]
        starts = [i for i in range(len(token_ids) - n + itself) if token_ids[i : i + n] == suffix]
        if starts:
            start = (starts[0] if first else starts[-1]) + n
            return token_ids[start:] if unbounded else token_ids[start : start + count]
    return []


def _lookup_wrong(**change):
    return lambda token_ids, count, longest: _lookup(token_ids, count, longest, **change)


def _only_longest(token_ids, count, longest):
    found = [i for i in range(len(token_ids) - longest) if token_ids[i : i + longest] == token_ids[-longest:]]
    return token_ids[found[-1] + longest :][:count] if found else []


@exercise("10.5")
def prompt_lookup(answer):
    """What followed the longest suffix where it last occurred."""
    expect_function(
        answer,
        _lookup,
        cases=cases_of(
            "token_ids count longest",
            ([1, 2, 3, 4, 5, 1, 2], 2, 3),
            ([1, 2, 7, 8, 1, 2, 9, 6, 1, 2], 3, 3),  # twice before
            ([5, 1, 2, 8, 3, 2, 9, 5, 1, 2], 2, 3),  # a longer match further back
            ([1, 2, 3, 1], 5, 2),
            ([1, 2, 3], 4, 2),
            ([4], 4, 2),
        ),
        mistakes=[
            (_only_longest, "if the longest suffix has no match, try shorter ones, down to one token"),
            (_lookup_wrong(itself=True), "the suffix found itself at the end: look only where something follows"),
            (_lookup_wrong(first=True), "that is the first occurrence: take the most recent one"),
            (_lookup_wrong(shortest_first=True), "a longer match is a better one: begin with the longest suffix"),
            (_lookup_wrong(unbounded=True), "more than `count` tokens were proposed"),
        ],
    )


class ToyTarget:
    """A target of 11 tokens whose next token depends on everything in its cache; it counts what it reads."""

    def __init__(self, seed):
        self.seed, self.cache, self.read = seed, [], 0

    @property
    def length(self):
        """Positions cached."""
        return len(self.cache)

    def extend(self, token_ids):
        """Reads tokens and returns the logits after each."""
        rows = []
        for token in token_ids:
            self.cache.append(token)
            self.read += 1
            rows.append(toy_next(self.seed, self.cache))
        return one_hot(torch.tensor(rows), 11).float()

    def rewind(self, count):
        """Forgets the last positions."""
        if not 0 <= count <= len(self.cache):
            raise ValueError(f"a cache can be rewound by 0..{len(self.cache)} positions; got {count}")
        del self.cache[len(self.cache) - count :]


def toy_next(seed, text):
    """What the toy target writes after a text: a rule without a pattern."""
    state = seed
    for token in text:
        state = (state * 31 + token * 17 + 7) % 1009
    return state % 11


class ToyDraft:
    """Right three times of four."""

    def __init__(self, seed):
        self.seed = seed

    def propose(self, token_ids, count):
        """Proposes `count` tokens, some of them wrong."""
        text = list(token_ids)
        for _ in range(count):
            right = toy_next(self.seed, text)
            text.append((right + 1) % 11 if len(text) % 4 == 3 else right)
        return text[len(token_ids) :]


def loop_with(*, forget=lambda target, drafted, accepted: target.rewind(drafted - accepted), first_free=False):
    """The speculative loop of exercise 10.6, right or with one bug."""

    def loop(target, draft, token_ids, new_tokens, draft_tokens):
        text = list(token_ids)
        target.extend(text[:-1])
        while len(text) < len(token_ids) + new_tokens:
            drafted = draft.propose(text, draft_tokens)
            own = target.extend([text[-1], *drafted]).argmax(-1).tolist()
            start = min(first_free, len(drafted))
            accepted = next((i for i in range(start, len(drafted)) if drafted[i] != own[i]), len(drafted))
            forget(target, len(drafted), accepted)
            text += [*drafted[:accepted], own[accepted]]
        return text[: len(token_ids) + new_tokens]

    return loop


def _watched(loop):
    def run(seed, token_ids, new_tokens, draft_tokens):
        target = ToyTarget(seed)
        text = loop(target, ToyDraft(seed), list(token_ids), new_tokens, draft_tokens)
        return {"text": list(text), "tokens the target read": target.read}

    return run


@exercise("10.6")
def repaired_loop(answer):
    """The target's own text, and no token read twice."""

    def reset_and_reread(target, draft, token_ids, new_tokens, draft_tokens):
        text = list(token_ids)
        while len(text) < len(token_ids) + new_tokens:
            target.rewind(target.length)
            drafted = draft.propose(text, draft_tokens)
            own = target.extend([*text, *drafted])[len(text) - 1 :].argmax(-1).tolist()
            accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
            text += [*drafted[:accepted], own[accepted]]
        return text[: len(token_ids) + new_tokens]

    expect_function(
        _watched(answer) if callable(answer) else answer,
        _watched(loop_with()),
        cases=cases_of(
            "seed token_ids new_tokens draft_tokens", (3, [1, 2, 3], 12, 3), (8, [4, 4], 9, 4), (5, [7], 6, 1)
        ),
        mistakes=[
            (
                _watched(loop_with(forget=lambda target, drafted, accepted: target.rewind(target.length))),
                "still the bug: the whole cache is thrown away, and the text with it; forget only what was rejected",
            ),
            (
                _watched(loop_with(forget=lambda target, drafted, accepted: None)),
                "no rollback: rejected tokens stay in the cache, and the target goes on from a text that nobody wrote",
            ),
            (
                _watched(
                    loop_with(forget=lambda t, drafted, accepted: t.rewind(min(drafted - accepted + 1, t.length)))
                ),
                "one position too many is forgotten: the token before the first rejected one was right",
            ),
            (_watched(loop_with(first_free=True)), "the first drafted token goes unverified: judge it by row 0"),
            (
                _watched(reset_and_reread),
                "the text is right, but every step reads all of it again: rewind by the rejected tokens alone",
            ),
        ],
    )
