"""Context features beside cached KV blocks, so that a prefix hit drafts as well as a miss.

One per feature version, since features of another fuser say nothing to this one's drafters. A block's features go when
the block is evicted, or earlier, the least recently used first, when their memory is wanted for something else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch

from verifier_service.block_hashes import BlockHash


class BlockFeatures:
    """By block hash: rows [block_tokens, hidden] on the host. Not thread-safe: the engine's thread owns it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._held: OrderedDict[BlockHash, torch.Tensor] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._held

    def put(self, block_hash: BlockHash, rows: torch.Tensor) -> None:
        """Rows of a block that is not held. They are the store's own from now on: nobody else keeps or writes them."""
        self._held[block_hash] = rows
        self.bytes += rows.nbytes

    def get(self, block_hash: BlockHash) -> torch.Tensor | None:
        rows = self._held.get(block_hash)
        if rows is not None:
            self._held.move_to_end(block_hash)
        return rows

    def forget(self, block_hashes: Iterable[BlockHash]) -> None:
        """These blocks are gone. Unknown ones are ignored."""
        for block_hash in block_hashes:
            rows = self._held.pop(block_hash, None)
            if rows is not None:
                self.bytes -= rows.nbytes

    def forget_oldest(self) -> None:
        """Raises KeyError if none is held."""
        _, rows = self._held.popitem(last=False)
        self.bytes -= rows.nbytes
