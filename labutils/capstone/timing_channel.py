"""What a shared prefix cache tells others: a prompt that somebody has asked before has a fast first token.

Gu et al. 2025 (arXiv:2502.07776) found such caches by time alone in services of their day; here the service is our own
engine. A salt for each user ends it (`labutils.serving.blocks.chained_hashes`), but nobody then shares the beginning
that is the same for all, unless only what stands behind that beginning is salted.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from labutils.serving.blocks import chained_hashes
from labutils.serving.engine import Engine
from labutils.serving.scheduler import Request


def probe(engine: Engine, prompt: Sequence[int], *, salt: str = "", public: int = 0) -> tuple[float, int]:
    """Asks for one token; returns the seconds until it came and how many prompt tokens were found in the cache.

    Asking changes what is asked about: the probe's own prompt is in the cache afterwards.

    Args:
        engine: With nothing else to do.
        prompt: Token ids.
        salt: The user's.
        public: How many tokens at the beginning are no secret, and are shared under every salt.
    """
    request = Request(list(prompt), max_new_tokens=1, salt=salt)
    if public:
        request.hashes = hashes_behind(prompt, engine.model.block_size, salt=salt, public=public)
    engine.submit(request)
    while request.end is None:
        engine.step()
    return request.times.ttft_s, request.cached


def hashes_behind(token_ids: Sequence[int], block_size: int, *, salt: str, public: int) -> list[bytes]:
    """`chained_hashes` in which the salt enters behind the full blocks of the first `public` tokens, not before them.

    Blocks that lie wholly in the public part have one name for everybody. The salt goes into the parent of the next
    one, and the chain carries it to all that follow. The last full block is salted in any case: the scheduler goes on
    from its hash, and the answer behind it is nobody else's.

    >>> a, b = (hashes_behind([1, 2, 3, 4, 5, 6], 2, salt=salt, public=3) for salt in ("ada", "bob"))
    >>> [x == y for x, y in zip(a, b)]
    [True, False, False]

    Raises:
        ValueError: If the public part is longer than the text.
    """
    if not 0 <= public <= len(token_ids):
        raise ValueError(f"public must lie between 0 and {len(token_ids)} tokens; got {public}")
    blocks = min(public // block_size, len(token_ids) // block_size - 1)
    if blocks < 1:
        return chained_hashes(token_ids, block_size, salt=salt)
    shared = chained_hashes(token_ids[: blocks * block_size], block_size)
    salted = blake2b(shared[-1] + salt.encode(), digest_size=16).digest()
    private = chained_hashes(token_ids, block_size, known=[*shared[:-1], salted])[blocks:]
    return shared + private
