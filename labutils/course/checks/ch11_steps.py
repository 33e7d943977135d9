"""Checks of chapter 11, second part: what a step computes, who leaves, who gives way, who answers."""

import json

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.course.checks.ch11_blocks import leading


def _plan(left, budget, *, decode_first=True, whole=False, even=False):
    sizes = [0] * len(left)
    if decode_first:
        for i, tokens in enumerate(left):
            if tokens == 1:
                sizes[i], budget = 1, budget - 1
    reading = [i for i, tokens in enumerate(left) if sizes[i] == 0]
    for i in reading:
        share = budget // len(reading) if even else budget
        sizes[i] = left[i] if whole and budget else max(min(left[i], share), 0)
        if not even:
            budget = max(budget - sizes[i], 0)
    return sizes


def _plan_wrong(**change):
    return lambda left, budget: _plan(left, budget, **change)


def _twice(left, budget):
    """The budget forgets the decoding tokens."""
    return _plan(left, budget + sum(tokens == 1 for tokens in left))


@exercise("11.6")
def plan_step(answer):
    """Tokens of each running request in the next step: decoding first, then prompts in chunks."""
    expect_function(
        answer,
        _plan,
        cases=cases_of(
            "left budget",
            ([1, 500, 1, 1], 64),
            ([300, 1, 40, 1], 100),
            ([20, 30, 1], 40),
            ([10, 1, 10], 64),
            ([1, 1, 7], 2),
            ([90], 32),
        ),
        mistakes=[
            (
                _plan_wrong(decode_first=False),
                "in order of arrival, a prompt takes the step from those who decode: decode first",
            ),
            (_plan_wrong(whole=True), "the whole prompt went into one step: the budget cuts it into chunks"),
            (
                _plan_wrong(even=True),
                "prompts are read one after the other, not in equal parts: the first ends sooner so",
            ),
            (_twice, "the step is too large: decoding tokens count in the budget too"),
        ],
    )


def _complete(running, ended, references, *, at_the_end=False, blocks=True, for_all=False):
    running, references = list(running), list(references)
    if at_the_end and any(name not in ended for name, _ in running):
        return [name for name, _ in running], references
    for name, table in running:
        for block in table if blocks and name in ended else []:
            references[block] = 0 if for_all else references[block] - 1
    return [name for name, _ in running if name not in ended], references


def _skipping(running, ended, references):
    running, references = list(running), list(references)
    for request in running:
        if request[0] in ended:
            running.remove(request)  # the list moves up, and the loop passes over the next one
            for block in request[1]:
                references[block] -= 1
    return [name for name, _ in running], references


def _complete_wrong(**change):
    return lambda running, ended, references: _complete(running, ended, references, **change)


@exercise("11.7")
def clear_ended(answer):
    """Who still runs after a step, and how many tables hold each block."""
    running = [("a", [0, 1]), ("b", [0, 2]), ("c", [3]), ("d", [4, 5])]
    expect_function(
        answer,
        _complete,
        cases=cases_of(
            "running ended references",
            (running, ["c"], [2, 1, 1, 1, 1, 1]),
            (running, ["a", "b"], [2, 1, 1, 1, 1, 1]),
            (running, ["b", "d"], [2, 1, 1, 1, 1, 1]),
            (running, [], [2, 1, 1, 1, 1, 1]),
            (running, ["a", "b", "c", "d"], [2, 1, 1, 1, 1, 1]),
        ),
        mistakes=[
            (
                _skipping,
                "the neighbour of an ended request was passed over: do not remove from the list you walk through",
            ),
            (
                _complete_wrong(at_the_end=True),
                "ended requests stay until the whole batch has ended: clear them after EVERY step",
            ),
            (_complete_wrong(blocks=False), "the memory leaks: an ended request gives its blocks back"),
            (_complete_wrong(for_all=True), "a shared block lost ALL its holders: take one reference for each table"),
        ],
    )


def _victims(held, free, needed, *, order=reversed):
    gone = []
    for i in order(range(len(held))):
        if free >= needed:
            break
        free += held[i]
        gone.append(i)
    return gone


def _largest_first(held, free, needed):
    return _victims(held, free, needed, order=lambda places: sorted(places, key=lambda i: -held[i]))


@exercise("11.12")
def preempted(answer):
    """Who gives its blocks back, the last in line first, until enough are free."""
    expect_function(
        answer,
        _victims,
        cases=cases_of(
            "held free needed",
            ([4, 2, 6, 1], 0, 1),
            ([4, 2, 3, 1], 1, 3),
            ([4, 2, 6, 1], 5, 3),
            ([1, 9, 2], 0, 9),
            ([3, 3], 2, 3),
        ),
        mistakes=[
            (
                lambda held, free, needed: _victims(held, free, needed, order=iter),
                "the oldest gave way: it is closest to its end, and would be preempted again and again",
            ),
            (_largest_first, "the largest gave way: a large request would never end while small ones keep coming"),
            (
                lambda held, free, needed: _victims(held, 0, needed),
                "some blocks are free already: preempt only for what is missing",
            ),
            (
                lambda held, free, needed: _victims(held, free, needed + 1),
                "one too many gave way: stop as soon as `needed` blocks are free",
            ),
        ],
    )


def _route(names, replicas, slack, *, measure=leading, balanced=True, ties=True):
    shortest = min(queue for _, queue in replicas)
    open_ones = [i for i, (_, queue) in enumerate(replicas) if not balanced or queue <= shortest + slack]
    return max(open_ones, key=lambda i: (measure(names, replicas[i][0]), -replicas[i][1] * ties, -i))


def _route_wrong(**change):
    return lambda names, replicas, slack: _route(names, replicas, slack, **change)


@exercise("11.14")
def route(answer):
    """The replica that knows most of a prompt's beginning, among those whose queue is not too long."""
    expect_function(
        answer,
        _route,
        cases=cases_of(
            "names replicas slack",
            (["a", "b", "c"], [(["a"], 1), (["a", "b"], 2), ([], 0)], 3),
            (["a", "b", "c"], [(["a"], 1), (["a", "b"], 9), ([], 0)], 3),
            (["a", "b", "c"], [(["b", "c"], 2), (["a"], 1)], 3),
            (["x"], [(["a"], 2), (["a"], 1), ([], 1)], 3),
            (["a", "b"], [(["a"], 4), (["a"], 2), ([], 3)], 2),
        ),
        mistakes=[
            (
                _route_wrong(balanced=False),
                "everybody goes to one hot replica: leave out queues longer than the shortest + slack",
            ),
            (
                _route_wrong(measure=lambda names, known: 0),
                "the shortest queue alone: the prefix that a replica knows saves its prefill",
            ),
            (
                _route_wrong(measure=lambda names, known: len(set(names) & set(known))),
                "blocks behind a gap are of no use: count from the beginning, up to the first unknown name",
            ),
            (_route_wrong(ties=False), "of equals, take the one with the shorter queue"),
        ],
    )


def _text_of(body, *, done=True, first=False):
    events = [line[6:] for line in body.split("\n") if line.startswith("data: ")]
    forms = [json.loads(event) for event in events if event != "[DONE]" or not done]
    if first:
        return "".join(form["choices"][0]["delta"].get("content", "") for form in forms)
    return "".join(choice["delta"].get("content", "") for form in forms for choice in form["choices"])


def _streamed_wrong(*, text=lambda parts: b"".join(parts).decode(), **change):
    return lambda parts: _text_of(text(parts), **change)


def _by_part(parts):
    return "".join(_text_of(part.decode()) for part in parts)


def _stream(*contents, usage=False):
    forms = [{"choices": [{"delta": {"content": text}}]} for text in contents]
    forms = [{"choices": [{"delta": {"role": "assistant"}}]}, *forms] + [{"choices": []}] * usage
    return ("".join(f"data: {json.dumps(f, ensure_ascii=False)}\n\n" for f in forms) + "data: [DONE]\n\n").encode()


def _cut(body, *places):
    return [body[i:j] for i, j in zip((0, *places), (*places, None), strict=True)]


@exercise("11.13")
def streamed_text(answer):
    """The text of a stream of server-sent events that the network has cut anywhere."""
    plain, chinese = _stream("Hel", "lo", " you", usage=True), _stream("您", "好", "!")
    inside = chinese.index("您".encode()) + 1
    expect_function(
        answer,
        _streamed_wrong(),
        cases=[
            {"parts": [plain]},
            {"parts": _cut(plain, 60, 75, 140)},
            {"parts": _cut(chinese, inside, inside + 40)},
            {"parts": [bytes([byte]) for byte in plain]},
        ],
        mistakes=[
            (
                _by_part,
                "a part of the network is not an event: an event ends with an empty line, so keep what is unfinished",
            ),
            (
                _streamed_wrong(text=lambda parts: "".join(part.decode(errors="replace") for part in parts)),
                "a letter may be cut in two: join the bytes first, then decode",
            ),
            (
                _streamed_wrong(text=lambda parts: b"".join(parts).decode().split("\n\n")[0]),
                "that is the first event only: a stream has one for each piece of text",
            ),
            (
                _streamed_wrong(first=True),
                "an event may have no choices, as the count of tokens: take all that are there",
            ),
            (_streamed_wrong(done=False), "`[DONE]` is not JSON: it says that the stream has ended"),
        ],
    )
