"""Checks of chapter 11, third part: names of blocks, what is found again, what may be written."""

from labutils.course.checks import cases_of, exercise, expect_function


def _join(parent, tokens):
    """A stand-in for a hash that a person can read."""
    return f"{parent}/{','.join(map(str, tokens))}"


def _names(token_ids, block_size, salt, digest, *, chained=True, partial=False, salted=True, steps=None):
    names, parent = [], salt if salted else ""
    last = len(token_ids) if partial else len(token_ids) - block_size + 1
    for start in range(0, last, steps or block_size):
        name = digest(parent, token_ids[start : start + block_size])
        names.append(name)
        parent = name if chained else parent
    return names


def _names_wrong(**change):
    return lambda token_ids, block_size, salt, digest: _names(token_ids, block_size, salt, digest, **change)


@exercise("11.8")
def block_names(answer):
    """A name for each full block, which stands for its tokens and all before them."""
    expect_function(
        answer,
        _names,
        cases=cases_of(
            "token_ids block_size salt digest",
            ([1, 2, 3, 4, 5], 2, "", _join),
            ([9, 9, 3, 4], 2, "", _join),
            ([1, 2, 3, 4], 2, "mine", _join),
            ([7], 2, "", _join),
            ([1, 2, 3, 4, 5, 6, 7, 8, 9], 3, "s", _join),
        ),
        mistakes=[
            (
                _names_wrong(chained=False),
                "the same tokens behind another beginning got one name: chain in the name of the block before",
            ),
            (
                _names_wrong(partial=True),
                "a block that is not full got a name: it will be written on, so nobody may share it",
            ),
            (_names_wrong(salted=False), "the salt is missing: it is the parent of the first block"),
            (_names_wrong(steps=1), "blocks do not overlap: go from start to start in steps of block_size"),
        ],
    )


def leading(names, known):
    """How many of the first names are known, up to the first that is not."""
    return next((i for i, name in enumerate(names) if name not in known), len(names))


def _cached(names, known, block_size, prompt, *, count=leading, end=lambda found, prompt: min(found, prompt - 1)):
    return end(count(names, known) * block_size, prompt)


def _cached_wrong(**change):
    return lambda names, known, block_size, prompt: _cached(names, known, block_size, prompt, **change)


@exercise("11.9")
def cached_tokens(answer):
    """Prompt tokens that need not be computed."""
    expect_function(
        answer,
        _cached,
        cases=cases_of(
            "names known block_size prompt",
            (["a", "b"], ["a", "b", "x"], 4, 8),
            (["a", "b", "c"], ["a", "c"], 4, 14),
            (["a", "b"], ["a", "b"], 4, 10),
            (["a", "b"], [], 4, 9),
            ([], ["a"], 4, 3),
        ),
        mistakes=[
            (
                _cached_wrong(end=lambda found, prompt: found),
                "zero queries: with every block found no token would be computed, and there are no logits to draw from",
            ),
            (
                _cached_wrong(end=lambda found, prompt: max(found - 1, 0)),
                "one token is given up too often: only a prompt that is found WHOLE computes its last token again",
            ),
            (
                _cached_wrong(count=lambda names, known: sum(name in known for name in names)),
                "blocks behind a gap do not help: count from the beginning, up to the first unknown name",
            ),
            (
                lambda names, known, block_size, prompt: min(leading(names, known), prompt - 1),
                "that counts blocks: times block_size",
            ),
        ],
    )


def _take(free, cached, block_of, *, forget=True, oldest=True, cached_first=False):
    free, cached, block_of = list(free), list(cached), dict(block_of)
    if free and not (cached_first and cached):
        block = free.pop(0)
    else:
        block = cached.pop(0 if oldest else -1)
        if forget:
            block_of = {name: b for name, b in block_of.items() if b != block}
    return block, free, cached, block_of


def _take_wrong(**change):
    return lambda free, cached, block_of: _take(free, cached, block_of, **change)


def _forgets_all(free, cached, block_of):
    block, left, kept, names = _take(free, cached, block_of)
    return block, left, kept, names if free else {}


@exercise("11.10")
def take_block(answer):
    """A block to be written: a free one, else the least recently used cached one."""
    known = {"a": 2, "b": 5, "c": 0}
    expect_function(
        answer,
        _take,
        cases=cases_of(
            "free cached block_of",
            ([], [5, 2], known),
            ([3, 4], [5, 2], known),
            ([1], [], {"c": 0}),
            ([], [0, 5, 2], known),
        ),
        mistakes=[
            (
                _take_wrong(forget=False),
                "a stale hash: the block's old name still leads to it, and it will hold another text",
            ),
            (_take_wrong(oldest=False), "the newest was evicted: `cached` begins with the least recently used"),
            (
                _take_wrong(cached_first=True),
                "a known text was thrown away while a free block was there: free ones first",
            ),
            (_forgets_all, "all names are gone: only the evicted block's own"),
        ],
    )


def _own(table, index, references, block_of, new, *, copies=None, unpublish=True, lower=True):
    table, references, block_of = list(table), list(references), dict(block_of)
    block = table[index]
    if references[block] > 1 if copies is None else copies:
        table[index], references[new] = new, 1
        references[block] -= lower
        return table, references, block_of, (block, new)
    if unpublish:
        block_of = {name: b for name, b in block_of.items() if b != block}
    return table, references, block_of, None


def _own_wrong(**change):
    return lambda table, index, references, block_of, new: _own(table, index, references, block_of, new, **change)


@exercise("11.11")
def write_alone(answer):
    """A table that may write its block: copy on write, or in place where nobody shares or finds it."""
    known = {"a": 0, "b": 1}
    expect_function(
        answer,
        _own,
        cases=cases_of(
            "table index references block_of new",
            ([0, 1], 1, [2, 2, 0], known, 2),
            ([0, 1], 1, [2, 1, 0], known, 2),
            ([0, 1], 1, [1, 1, 0], {"a": 0}, 2),
            ([1, 0, 3], 0, [1, 3, 0, 1], known, 2),
        ),
        mistakes=[
            (
                _own_wrong(copies=False),
                "a live block was written while others read it: where references > 1, copy first",
            ),
            (
                _own_wrong(unpublish=False),
                "the block is written in place but still published: who asks next would share half a text",
            ),
            (_own_wrong(lower=False), "the old block has one holder fewer: lower its reference count"),
            (_own_wrong(copies=True), "nobody else holds that block: a copy costs memory for nothing"),
        ],
    )
