"""Checks of chapter 09, first part: requests over nodes (partition, schedule, merge)."""

import heapq

import torch

from labutils.course.checks import exercise, expect_function
from labutils.distributed import partition as parts


def _replicas():
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:  # replicas: the same weights
            layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]]))
            layer.bias.zero_()
    return layers


def _batches(sizes):
    return list(torch.arange(3.0 * sum(sizes)).view(-1, 3).split(sizes))


def _outputs(replicas, batches):
    return [replicas[i % len(replicas)](batch).detach() for i, batch in enumerate(batches)]


def _by_replica(replicas, batches):
    outputs = _outputs(replicas, batches)
    return torch.cat([outputs[i] for r in range(len(replicas)) for i in range(r, len(outputs), len(replicas))])


@exercise("9.1")
def all_answers(answer):
    """Every batch's answers, in order, from replicas that take turns."""

    def reference(replicas, batches):
        return torch.cat(_outputs(replicas, batches))

    expect_function(
        lambda **inputs: _detached(answer(**inputs)),
        reference,
        cases=[
            lambda: {"replicas": _replicas(), "batches": _batches([2, 2, 2])},
            lambda: {"replicas": _replicas(), "batches": _batches([3, 1, 2, 2])},
        ],
        may_modify=True,
        mistakes=[
            (
                lambda replicas, batches: _outputs(replicas, batches)[-1],
                "only the last batch's answers are left, as in the article: collect them all",
            ),
            (
                lambda replicas, batches: torch.cat(_outputs(replicas, batches)).mean(dim=1),
                "the mean over dim 1 mixes a request's own numbers, as in the article: nothing is to be averaged",
            ),
            (
                lambda replicas, batches: torch.cat(
                    [output.mean(dim=0, keepdim=True) for output in _outputs(replicas, batches)]
                ),
                "one answer per batch: the mean over dim 0 mixes different requests",
            ),
            (
                _by_replica,
                "ordered by replica: the answers must come back in the order of the batches",
            ),
            (
                lambda replicas, batches: torch.cat(_outputs(replicas, batches)[: len(replicas)]),
                "each replica answered one batch only: they take turns, replicas[i % len(replicas)]",
            ),
        ],
    )


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _greedy(lengths, order, fits):
    batches = []
    for i in order:
        if batches and fits([*batches[-1], i], lengths):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _arrival(lengths, max_tokens):
    fits = lambda batch, sizes: len(batch) * max(sizes[j] for j in batch) <= max_tokens  # noqa: E731
    return _greedy(lengths, range(len(lengths)), fits)


def _by_sum(lengths, max_tokens):
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return _greedy(lengths, order, lambda batch, sizes: sum(sizes[j] for j in batch) <= max_tokens)


@exercise("9.2")
def partition(answer):
    """Batches of similar length, each within its padded budget."""

    def reference(lengths, max_tokens):
        return parts.partition(lengths, max_requests=len(lengths), max_tokens=max_tokens)

    def strict(lengths, max_tokens):
        return parts.partition(lengths, max_requests=len(lengths), max_tokens=max_tokens - 1)

    expect_function(
        answer,
        reference,
        cases=[
            {"lengths": [5, 1, 4, 1], "max_tokens": 10},
            {"lengths": [3, 9, 2, 3, 8, 1, 2], "max_tokens": 12},
            {"lengths": [2, 2, 2, 2], "max_tokens": 4},
        ],
        mistakes=[
            (
                _arrival,
                "in the order of arrival: sort the ids by length first, or short requests pad along with long ones",
            ),
            (_by_sum, "the sum of the lengths is not what a batch costs: each request is padded to the longest"),
            (strict, "a batch of exactly max_tokens positions is allowed: compare with <="),
            (
                lambda lengths, max_tokens: [[lengths[i] for i in batch] for batch in reference(lengths, max_tokens)],
                "those are lengths: a batch holds ids, the requests' places in the list",
            ),
            (
                lambda lengths, max_tokens: reference(lengths, max_tokens)[:-1],
                "the last batch is missing: it is still open when the loop ends",
            ),
        ],
    )


@exercise("9.3")
def weighted_shares(answer):
    """Integer shares in proportion to the rates that add up."""

    def delays_taken(count, rates):
        return parts.weighted_shares(count, [1 / rate for rate in rates])

    def floors(count, rates):
        return [int(count * rate / sum(rates)) for rate in rates]

    def rest_to(pick):
        def shares(count, rates):
            found = floors(count, rates)
            found[pick(rates)] += count - sum(found)
            return found

        return shares

    expect_function(
        answer,
        parts.weighted_shares,
        cases=[
            {"count": 10, "rates": [25.0, 50.0, 6.25]},
            {"count": 11, "rates": [1.0, 1.0, 1.0]},
            {"count": 9, "rates": [0.4, 2.9, 3.0, 2.8]},
            {"count": 7, "rates": [0.1, 5.0]},
        ],
        mistakes=[
            (floors, "rounded down, so some requests belong to nobody: hand out what is left"),
            (
                lambda count, rates: [round(count * rate / sum(rates)) for rate in rates],
                "rounded each by itself: the shares need not add up to `count`",
            ),
            (rest_to(lambda rates: 0), "all that was left went to the first node: one each, to the largest fractions"),
            (
                rest_to(lambda rates: rates.index(max(rates))),
                "all that was left went to the fastest node: one each, to the largest fractions",
            ),
            (delays_taken, "the slowest got the most: a rate is requests per second, not seconds per request"),
            (
                lambda count, rates: parts.weighted_shares(count, [1.0] * len(rates)),
                "equal shares: that is the static policy, which waits for the slowest node",
            ),
        ],
    )


@exercise("9.4")
def pull_finish_s(answer):
    """A free node takes the next request."""

    def total_work(count, delays_s):
        free = [(0.0, node) for node in range(len(delays_s))]
        for _ in range(count):
            start, node = heapq.heappop(free)
            heapq.heappush(free, (start + delays_s[node], node))
        return min(free)[0]

    def earliest_end(count, delays_s):
        ends = [0.0] * len(delays_s)
        for _ in range(count):
            node = min(range(len(ends)), key=lambda i: ends[i] + delays_s[i])
            ends[node] += delays_s[node]
        return max(ends)

    expect_function(
        answer,
        parts.pull_finish_s,
        cases=[
            {"count": 3, "delays_s": [1.0, 4.0]},
            {"count": 9, "delays_s": [1.0, 4.5, 2.0]},
            {"count": 1, "delays_s": [3.0, 1.0]},
            {"count": 0, "delays_s": [1.0, 2.0]},
        ],
        mistakes=[
            (parts.ideal_s, "that is the ideal without whole requests: a request cannot be split among nodes"),
            (
                lambda count, delays_s: max(-(-(count - i) // len(delays_s)) * d for i, d in enumerate(delays_s)),
                "dealt out in turn: that is the static policy; here the node that is free first takes the next one",
            ),
            (
                earliest_end,
                "you chose the node that would end first: a free node takes the next request without such foresight",
            ),
            (total_work, "that is when the first node falls idle: all are done when the last one is"),
        ],
    )


@exercise("9.5")
def merge(answer):
    """Answers in order, with what is missing and what came twice."""

    def reference(count, pairs):
        found, twice = {}, []
        for request, value in pairs:
            if request in found:
                twice.append(request)
            found.setdefault(request, value)
        complete = [(i, found.get(i)) for i in range(count)]
        answers, _ = parts.merge(count, complete)
        return answers, [i for i in range(count) if i not in found], sorted(twice)

    expect_function(
        answer,
        reference,
        cases=[
            {"count": 3, "pairs": [(2, "c"), (0, "a"), (1, "b")]},
            {"count": 4, "pairs": [(3, "d"), (0, "a"), (3, "d")]},
            {"count": 3, "pairs": [(1, "b"), (1, "b"), (0, "a"), (1, "b")]},
            {"count": 0, "pairs": []},
        ],
        mistakes=[
            (
                lambda count, pairs: ([value for _, value in pairs], *reference(count, pairs)[1:]),
                "in the order of arrival: an answer belongs at the place that its id names",
            ),
            (
                lambda count, pairs: ([value for _, value in sorted(set(pairs))], *reference(count, pairs)[1:]),
                "the gaps closed up, and every later answer belongs to somebody else: put None where one is missing",
            ),
            (
                lambda count, pairs: (*reference(count, pairs)[:2], []),
                "duplicates went unnoticed: an id that comes again is to be reported",
            ),
            (
                lambda count, pairs: (*reference(count, pairs)[:2], sorted(set(reference(count, pairs)[2]))),
                "an id that came three times is two duplicates",
            ),
            (
                lambda count, pairs: (reference(count, pairs)[0], [], reference(count, pairs)[2]),
                "gaps went unnoticed: every id from 0 to count - 1 needs an answer",
            ),
        ],
    )
