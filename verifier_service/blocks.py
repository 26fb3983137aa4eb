"""Which KV blocks are in use, which hold something worth finding again, and which are blank.

Plain Python; the tensors live in the runners. A block whose last user is gone keeps its content while it can: it is
free, and found by its hash until it is needed for something else. The least recently used one goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from verifier_service.block_hashes import BlockHash


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free: the scheduler has to check or preempt first."""


class BlockPool:
    """Blocks 0..total-1, reference counted: a block is free again when its last user releases it.

    Blank blocks are handed out before cached ones, last-in first-out, so that a small working set stays warm.
    on_evict(hash): its block is handed out again, nobody can find it any more.
    """

    def __init__(self, total: int, on_evict: Callable[[BlockHash], None] = lambda _: None):
        if total < 1:
            raise ValueError(f"a pool needs at least one block, not {total}")
        self.total = total
        self.evictions = 0
        self._on_evict = on_evict
        self._blank = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, without users; the least recently used first
        self._users = [0] * total
        self._hashes: list[BlockHash | None] = [None] * total
        self._found: dict[BlockHash, int] = {}

    @property
    def free(self) -> int:
        """Blocks without a user, cached ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by their hash, in use or not."""
        return len(self._found)

    @property
    def idle(self) -> int:
        """Blocks that can be found and have no user."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one user each. Raises OutOfBlocksError, and then takes none."""
        if count > self.free:
            raise OutOfBlocksError(f"{count} KV blocks wanted, {self.free} of {self.total} free")
        return [self._take() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of each block, which is in use or cached. Raises ValueError for a blank block."""
        for block in blocks:
            if self._users[block] == 0:
                if block not in self._idle:
                    raise ValueError(f"block {block} is free and cannot be shared")
                del self._idle[block]
            self._users[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One user less of each block. Raises ValueError for a free block.

        Of cached ones that become free, the first released is evicted first: give a request's last block first.
        """
        for block in blocks:
            users = self._users[block]
            if users == 0:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._users[block] = users - 1
            if users == 1:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def users(self, block: int) -> int:
        return self._users[block]

    def find(self, block_hash: BlockHash) -> int | None:
        return self._found.get(block_hash)

    def cache(self, block: int, block_hash: BlockHash) -> None:
        """A used block is full, and from now on found by its hash.

        If another one is: that stays the one to find while it is in use, and is blank from now on if it is not.
        """
        if self._users[block] == 0 or self._hashes[block] is not None:
            raise ValueError(f"block {block} is free or has a name already")
        known = self._found.get(block_hash)
        if known is not None:
            if self._users[known]:
                return
            del self._idle[known]
            self._hashes[known] = None
            self._blank.append(known)
        self._found[block_hash] = block
        self._hashes[block] = block_hash

    def touch(self, blocks: Iterable[int]) -> None:
        """These were wanted just now, whether or not they could be used; the first of them is evicted first."""
        for block in blocks:
            if block in self._idle:
                self._idle.move_to_end(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """These blocks are not found any more; they are blank now, or once their users are gone."""
        for block in blocks:
            if self._hashes[block] is not None:
                self._unname(block)
                if block in self._idle:
                    del self._idle[block]
                    self._blank.append(block)

    def _take(self) -> int:
        block = self._blank.pop() if self._blank else self._evict()
        self._users[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._unname(block)
        self.evictions += 1
        return block

    def _unname(self, block: int) -> None:
        gone = self._hashes[block]
        assert gone is not None, "a cached block has a hash"
        self._hashes[block] = None
        del self._found[gone]
        self._on_evict(gone)
