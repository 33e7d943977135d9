"""Which of several replicas a request goes to: the one whose prefix cache holds most of it, unless its queue is long.

A prefix cache helps where the same beginnings come back to it. Dealt out in turn, each beginning is read and kept by
every replica; sent where it is known, by one. For `dispatch` of chapter 09 the router is a setting and a replica is the
function: `Settings(policy="routed", route=router, max_requests=8)`.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

from labutils.serving.blocks import chained_hashes


class PrefixRouter:
    """Remembers which blocks of prompts it has sent where; no replica is asked.

    Its record is a guess: a replica may have evicted a block, or have been started anew. A wrong guess costs time and
    never an answer, and the replica knows the block afterwards.

    >>> router = PrefixRouter(block_size=2, slack=1)
    >>> [router([1, 2, 3, n], {"a": 0, "b": n}) for n in (0, 1)], router([1, 2, 3, 4], {"a": 5, "b": 0})
    (['a', 'a'], 'b')

    Args:
        block_size: Tokens of a block, as in the replicas.
        blocks: How many of them to remember for each replica, the last used ones; as many as it has.
        slack: A replica that holds more requests than the least busy one and `slack` more is passed over.

    Raises:
        ValueError: If a size is below 1, or the slack negative.
    """

    def __init__(self, *, block_size: int = 16, blocks: int = 1024, slack: int = 8) -> None:
        if block_size < 1 or blocks < 1 or slack < 0:
            rule = "block_size and blocks must be at least 1 and slack at least 0"
            raise ValueError(f"{rule}; got {block_size}, {blocks} and {slack}")
        self.block_size, self.blocks, self.slack = block_size, blocks, slack
        self.sent: defaultdict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def __call__(self, prompt: Sequence[int], waiting: Mapping[str, int]) -> str:
        """The replica for a prompt's token ids.

        Args:
            prompt: Token ids.
            waiting: How many requests each replica holds, those in work included.

        Raises:
            ValueError: If there is no replica.
        """
        if not waiting:
            raise ValueError("a prompt needs a replica to go to; got none")
        hashes = chained_hashes(prompt, self.block_size)
        most = min(waiting.values()) + self.slack
        able = [name for name, count in waiting.items() if count <= most]
        chosen = max(able, key=lambda name: (self.known(name, hashes), -waiting[name]))
        record = self.sent[chosen]
        for each in reversed(hashes):  # the beginning is used last, so it is forgotten last
            record[each] = None
            record.move_to_end(each)
        while len(record) > self.blocks:
            record.popitem(last=False)
        return chosen

    def known(self, name: str, hashes: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks a replica has been sent."""
        record = self.sent[name]
        return next((n for n, each in enumerate(hashes) if each not in record), len(hashes))
