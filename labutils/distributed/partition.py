"""Partition, schedule, merge, as plain arithmetic: which requests go together, who gets them, whether all came back."""

import heapq
from collections.abc import Iterable, Sequence


def partition(lengths: Sequence[int], *, max_requests: int, max_tokens: int | None = None) -> list[list[int]]:
    """Cuts requests into batches of similar length; a request's id is its place in `lengths`.

    A batch is padded to its longest request, so it costs (requests) x (longest) positions: sorted by length it wastes
    little. No batch has more than `max_requests` requests or, padded, more than `max_tokens` positions.

    >>> partition([5, 1, 4, 1], max_requests=3, max_tokens=10)
    [[1, 3], [2, 0]]

    Raises:
        ValueError: If a single request is longer than `max_tokens`, or `max_requests` is below 1.
    """
    if max_requests < 1:
        raise ValueError(f"max_requests must be at least 1; got {max_requests}")
    batches: list[list[int]] = []
    for request in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[request]
        if max_tokens is not None and length > max_tokens:
            raise ValueError(f"a request must fit max_tokens={max_tokens}; request {request} has {length}")
        last = batches[-1] if batches else []
        fits = max_tokens is None or (len(last) + 1) * length <= max_tokens
        if last and len(last) < max_requests and fits:
            last.append(request)
        else:
            batches.append([request])
    return batches


def padding(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Returns the share of all padded positions that hold no token.

    >>> padding([1, 2], [[0, 1]])
    0.25
    """
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def weighted_shares(count: int, rates: Sequence[float]) -> list[int]:
    """Splits `count` requests in proportion to the nodes' measured rates (requests/s), by largest remainder.

    share_i = floor(count * rate_i / sum(rates)); what is left goes one each to the largest fractions.

    >>> weighted_shares(10, [50.0, 25.0, 6.25])
    [6, 3, 1]

    Raises:
        ValueError: If a rate is not positive, or there is none.
    """
    if not rates or min(rates) <= 0:
        raise ValueError(f"every node needs a positive rate; got {list(rates)}")
    exact = [count * rate / sum(rates) for rate in rates]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: shares[i] - exact[i])
    for node in by_remainder[: count - sum(shares)]:
        shares[node] += 1
    return shares


def shares_finish_s(shares: Sequence[int], delays_s: Sequence[float]) -> float:
    """Returns when the last node is done that answers its share one by one: max of share x delay.

    >>> shares_finish_s([40, 40, 40], [0.020, 0.040, 0.160])
    6.4
    """
    return max(share * delay for share, delay in zip(shares, delays_s, strict=True))


def pull_finish_s(count: int, delays_s: Sequence[float]) -> float:
    """Returns when the last request is answered if each node takes the next one as soon as it is free.

    >>> pull_finish_s(3, [1.0, 3.0])
    3.0
    """
    free_at = [(0.0, node) for node in range(len(delays_s))]
    done = 0.0
    for _ in range(count):
        start, node = heapq.heappop(free_at)
        done = max(done, start + delays_s[node])
        heapq.heappush(free_at, (start + delays_s[node], node))
    return done


def ideal_s(count: int, delays_s: Sequence[float]) -> float:
    """Returns the time no schedule can beat: all nodes busy all the time, count / sum(1 / delay).

    >>> round(ideal_s(120, [0.020, 0.040, 0.160]), 3)
    1.477
    """
    return count / sum(1 / delay for delay in delays_s)


def merge(count: int, answers: Iterable[tuple[int, object]]) -> tuple[list, list[int]]:
    """Puts (id, answer) pairs of any order back into the order of the requests.

    Execution at least once means that an id may come twice: the same answer again is a duplicate, another one an error.

    >>> merge(2, [(1, "b"), (0, "a"), (1, "b")])
    (['a', 'b'], [1])

    Returns:
        The answers in order, and the ids of the duplicates.

    Raises:
        ValueError: For an id outside 0..count-1, an id without an answer, or two different answers to one id.
    """
    found: dict[int, object] = {}
    duplicates = []
    for request, answer in answers:
        if not 0 <= request < count:
            raise ValueError(f"ids must lie in 0..{count - 1}; got {request}")
        if request in found:
            if found[request] != answer:
                raise ValueError(f"each id has one answer; request {request} has {found[request]!r} and {answer!r}")
            duplicates.append(request)
        found[request] = answer
    if missing := [request for request in range(count) if request not in found]:
        raise ValueError(f"every id needs an answer; {len(missing)} are missing: {missing[:10]}")
    return [found[request] for request in range(count)], duplicates
