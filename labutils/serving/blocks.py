"""Paged memory: blocks of a few positions each, shared by reference count, found again by what they hold.

A sequence's *block table* lists the blocks of its positions in order, so they need not lie side by side (vLLM's
PagedAttention, arXiv:2309.06180). A full block is *published* under a chained hash, which names its tokens and all that
stand before them; a later request with the same beginning takes the block instead of computing it.

At any time a block is exactly one of: *free*, with nothing worth keeping; *cached*, published and in no table; *owned*,
in as many tables as its reference count says.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def chained_hashes(
    token_ids: Sequence[int], block_size: int, *, salt: str = "", known: Sequence[bytes] = ()
) -> list[bytes]:
    """One hash for each full block: H_i = hash(H_{i-1}, tokens of block i), and H_{-1} = hash(salt).

    The same tokens behind another beginning, or under another salt, have another hash. Clients with different salts
    share nothing, so neither can learn from a fast first token what the other has asked.

    >>> a, b = (chained_hashes(text, 2) for text in ([1, 2, 3, 4, 5], [9, 9, 3, 4]))
    >>> len(a), len(b), a[1] == b[1]
    (2, 2, False)

    Args:
        token_ids: The text.
        block_size: Positions of a block.
        salt: Of the client.
        known: The hashes of the text's first blocks, from an earlier call; only those behind them are computed.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=16).digest()
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + tokens, digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """A fixed number of blocks and who holds them; the keys and values themselves lie in the model.

    >>> pool = BlockPool(4, block_size=2)
    >>> table = pool.allocate([], 3)
    >>> pool.publish(table[0], chained_hashes([7, 8], 2)[0])
    >>> pool.release(table)
    >>> pool.available, pool.match(chained_hashes([7, 8, 9], 2)) == table[:1]
    (4, True)

    Attributes:
        references: How many tables each block is in.
        cached: Published blocks in no table, the least recently used first.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, blocks: int, *, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"blocks and block_size must be at least 1; got {blocks} and {block_size}")
        self.block_size = block_size
        self.references = [0] * blocks
        self.free = deque(range(blocks))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.block_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be handed out: free ones, and cached ones after eviction."""
        return len(self.free) + len(self.cached)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The published blocks that hold the longest known beginning. Only looks: nothing is taken, nothing ages."""
        found = []
        for name in hashes:
            if name not in self.block_of:
                break
            found.append(self.block_of[name])
        return found

    def room_for(self, shared: Sequence[int], new: int) -> bool:
        """Whether `allocate` would succeed: a cached block that is shared can no longer be evicted."""
        return new <= self.available - sum(block in self.cached for block in shared)

    def allocate(self, shared: Sequence[int], new: int) -> list[int]:
        """A table of `shared` blocks, each referenced once more, and `new` ones behind them.

        Raises:
            ValueError: If there is no room; nothing has changed then.
        """
        if not self.room_for(shared, new):
            raise ValueError(
                f"the pool must have room for {new} more blocks beside {list(shared)}; got {self.available}"
            )
        for block in shared:
            self.references[block] += 1
            self.cached.pop(block, None)
        return [*shared, *(self._take() for _ in range(new))]

    def own(self, table: list[int], index: int) -> tuple[int, int] | None:
        """Makes a table the only one that holds its block `index`, so that it may be written: copy on write.

        A block that is not copied is no longer known by its hash until it is published again: nobody shares what is
        being written.

        Returns:
            The block to copy from and the block to copy to, or None if nobody else held it.

        Raises:
            ValueError: If a copy is needed and there is no room; nothing has changed then.
        """
        shared = table[index]
        if self.references[shared] == 1:
            self._forget(shared)
            return None
        (table[index],) = self.allocate([], 1)
        self.references[shared] -= 1
        return shared, table[index]

    def publish(self, block: int, name: bytes) -> None:
        """Makes a full block known under its hash; where another block already has it, that one stays the known one.

        Raises:
            ValueError: If the block is in no table.
        """
        if not self.references[block]:
            raise ValueError(f"only a block in some table can be published; got {block}")
        if name not in self.block_of and block not in self.hash_of:
            self.block_of[name], self.hash_of[block] = block, name

    def release(self, table: Sequence[int]) -> None:
        """Gives a table back, its end first: a beginning is worth more to others than what follows it.

        Raises:
            ValueError: If one of its blocks is in no table; nothing has changed then.
        """
        if any(self.references[block] < count for block, count in Counter(table).items()):
            raise ValueError(f"a table can be released once; got {list(table)}")
        for block in reversed(table):
            self.references[block] -= 1
            if not self.references[block]:
                if block in self.hash_of:
                    self.cached[block] = None
                else:
                    self.free.append(block)

    def _take(self) -> int:
        """A free block, or else the least recently used cached one, which loses its hash before anybody writes it."""
        if self.free:
            block = self.free.popleft()
        else:
            block, _ = self.cached.popitem(last=False)
            self._forget(block)
        self.references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        if block in self.hash_of:
            del self.block_of[self.hash_of.pop(block)]


def check_blocks(pool: BlockPool, tables: Iterable[Sequence[int]]) -> None:
    """Verifies that each block is free, cached or owned, and that all counts add up; for tests, after every step.

    Raises:
        AssertionError: With the rule that is broken.
    """
    held = Counter(block for table in tables for block in table)
    free, cached = set(pool.free), set(pool.cached)
    owned = {block for block, count in enumerate(pool.references) if count}
    rules = {
        "a block is referenced as often as tables hold it": {b: pool.references[b] for b in owned} == dict(held),
        "no block is free twice": len(free) == len(pool.free),
        "every block is free, cached or owned": free | cached | owned == set(range(len(pool.references))),
        "no block is two of them": len(free) + len(cached) + len(owned) == len(pool.references),
        "free blocks have no hash and cached ones do": cached <= set(pool.hash_of) and not free & set(pool.hash_of),
        "hashes and blocks name each other": pool.block_of == {name: block for block, name in pool.hash_of.items()},
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise AssertionError("; ".join(broken))
