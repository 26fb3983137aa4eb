"""Which KV blocks are free and how often each of the others is used. Plain Python; the tensors live in the runners."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free: the scheduler has to check or preempt first."""


class BlockPool:
    """Blocks 0..total-1, reference counted: a block is free again when its last user releases it.

    Freed blocks are handed out again last-in first-out, so that a small working set stays warm.
    """

    def __init__(self, total: int):
        if total < 1:
            raise ValueError(f"a pool needs at least one block, not {total}")
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one user each. Raises OutOfBlocksError, and then takes none."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} KV blocks wanted, {len(self._free)} of {self.total} free")
        if count <= 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for block in taken:
            self._users[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of each block. Raises ValueError for a free block."""
        for block in blocks:
            if self._users[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._users[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One user less of each block. Raises ValueError for a free block."""
        for block in blocks:
            users = self._users[block]
            if users == 0:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._users[block] = users - 1
            if users == 1:
                self._free.append(block)

    def users(self, block: int) -> int:
        return self._users[block]
