"""Which checkpoints of recurrent state there are, and of what. Plain Python; the tensors live in the runners.

A checkpoint is a copy of one request's recurrent state at a block boundary, named by the hash of the block before it.
There are few, since one of a large model is tens of megabytes on every rank: the least recently used one goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from verifier_service.block_hashes import BlockHash


class CheckpointPool:
    """Checkpoints 0..total-1: blank, taken (its content is not there yet) or kept under a hash."""

    def __init__(self, total: int):
        self.total = total
        self.evictions = 0
        self._blank = list(range(total - 1, -1, -1))
        self._kept: OrderedDict[BlockHash, int] = OrderedDict()  # the least recently used first

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._kept

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def taken(self) -> int:
        return self.total - len(self._blank) - len(self._kept)

    def use(self, block_hash: BlockHash) -> int:
        """The kept checkpoint of this hash, which is now the most recently used. Raises KeyError."""
        self._kept.move_to_end(block_hash)
        return self._kept[block_hash]

    def take(self) -> int | None:
        """One to write to, if need be the least recently used; None if all are being written to."""
        if not self._blank and self._kept:
            self.evictions += 1
            self._blank.append(self._kept.popitem(last=False)[1])
        return self._blank.pop() if self._blank else None

    def keep(self, checkpoint: int, block_hash: BlockHash) -> None:
        """A taken one holds the state after this block. If another one does as well, this one is blank again."""
        if block_hash in self._kept:
            self._kept.move_to_end(block_hash)
            self._blank.append(checkpoint)
        else:
            self._kept[block_hash] = checkpoint

    def give_back(self, checkpoint: int) -> None:
        """A taken one that is not kept after all."""
        self._blank.append(checkpoint)

    def drop(self, block_hash: BlockHash) -> int | None:
        """Nobody finds this one any more; which it was, if it was there. It is blank now."""
        checkpoint = self._kept.pop(block_hash, None)
        if checkpoint is not None:
            self._blank.append(checkpoint)
        return checkpoint
