"""Context features, kept on the host so that a draft context can be built at any time: of running requests by
position, of cached KV blocks by hash.

A new drafter, a new epoch of the link or an eviction loses what was sent; the last W tokens' features are sent again
from here. After a prefix hit they come from the blocks that were found. Bounded in bytes: over the bound the blocks
used least recently lose theirs, then the longest request its oldest rows, which costs acceptance only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence

import torch

from verifier_service.block_features import BlockFeatures
from verifier_service.block_hashes import BlockHash

LOOSE = 32  # a request's newest rows are views of steps' tensors; so many are joined into a copy, and the steps' freed
PINNED = 8  # times its own bytes: a view that keeps more than this alive is copied at once


class FeatureStore:
    """By request: rows [count, hidden] for consecutive positions. Not thread-safe: the engine's thread owns it.

    block_tokens: of a KV block. bytes: of the requests' rows; block_bytes: of the blocks'.
    """

    def __init__(self, max_bytes: int, block_tokens: int):
        self._max_bytes = max_bytes
        self.block_tokens = block_tokens
        self._held: dict[Hashable, _Held] = {}
        self._blocks = BlockFeatures()
        self.bytes = 0

    @property
    def block_bytes(self) -> int:
        return self._blocks.bytes

    def put(self, key: Hashable, start: int, rows: torch.Tensor, window: int) -> None:
        """Add rows for positions start.. ; the newest `window` positions are kept.

        Positions already held are skipped (a preempted request computes them again). A gap starts afresh at `start`.
        The rows must not be written to: they are copied only where they are a small part of a large tensor.
        """
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held(start)
        elif start > held.end:
            self.bytes -= held.restart(start)
        known = held.end - start
        if known > 0:
            rows = rows[known:]
            if not rows.shape[0]:
                return
        if rows.untyped_storage().nbytes() > PINNED * rows.nbytes:
            rows = rows.clone()
        self.bytes += held.add(rows) - held.trim(window)
        self._shrink()

    def put_blocks(self, key: Hashable, start: int, rows: torch.Tensor, hashes: Sequence[BlockHash]) -> None:
        """Keep a copy for every block that these rows complete, beside what the request holds of it. Call before put.

        hashes: of the request's blocks from the first on; blocks without one are not kept.
        """
        size, stop = self.block_tokens, start + rows.shape[0]
        for index in range(start // size, min(stop // size, len(hashes))):
            first = index * size
            if self._blocks.get(hashes[index]) is not None:
                continue
            own = rows[max(0, first - start) : first + size - start]
            if first < start:
                begin, pieces = self.between(key, first, start)
                if begin != first or self.end(key) < start:
                    continue
                self._blocks.put(hashes[index], torch.cat([*pieces, own]))
            else:
                self._blocks.put(hashes[index], own.clone())
        self._shrink()

    def put_from_blocks(self, key: Hashable, hashes: Sequence[BlockHash], wanted: int) -> bool:
        """A request goes on after blocks with these hashes: give it the newest rows of them, as many as are wanted and
        there. False: none.
        """
        pieces: list[torch.Tensor] = []
        for block_hash in reversed(hashes):
            if len(pieces) * self.block_tokens >= wanted:
                break
            rows = self._blocks.get(block_hash)
            if rows is None:
                break
            pieces.append(rows)
        if not pieces:
            return False
        self.put(key, (len(hashes) - len(pieces)) * self.block_tokens, torch.cat(pieces[::-1]), wanted)
        return True

    def forget_blocks(self, hashes: Iterable[BlockHash]) -> None:
        """These blocks are evicted."""
        self._blocks.forget(hashes)

    def first(self, key: Hashable) -> int:
        """The oldest position held, or the end if there is none."""
        held = self._held.get(key)
        return held.first if held is not None else 0

    def end(self, key: Hashable) -> int:
        """One past the newest position held; 0 for an unknown request."""
        held = self._held.get(key)
        return held.end if held is not None else 0

    def between(self, key: Hashable, start: int, end: int) -> tuple[int, list[torch.Tensor]]:
        """Rows of positions start..end-1, as far as they are held: first position, pieces in order."""
        held = self._held.get(key)
        return held.between(start, end) if held is not None else (start, [])

    def forget(self, key: Hashable) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.bytes -= held.bytes

    def _shrink(self) -> None:
        while self.bytes + self._blocks.bytes > self._max_bytes and len(self._blocks):
            self._blocks.forget_oldest()
        while self.bytes > self._max_bytes:
            longest = max(self._held.values(), key=lambda held: held.bytes)
            rows = longest.end - longest.first
            if rows == 0:
                return
            self.bytes -= longest.trim(rows // 2, exact=True)


class _Held:
    """One request's pieces, which begin at position `begin`; positions first..end-1 of them are valid."""

    __slots__ = ("begin", "bytes", "end", "first", "loose", "pieces")

    def __init__(self, start: int):
        self.begin = self.first = self.end = start
        self.pieces: deque[torch.Tensor] = deque()
        self.loose = 0
        self.bytes = 0

    def restart(self, start: int) -> int:
        freed, self.bytes = self.bytes, 0
        self.pieces.clear()
        self.loose = 0
        self.begin = self.first = self.end = start
        return freed

    def add(self, rows: torch.Tensor) -> int:
        added = rows.nbytes
        self.pieces.append(rows)
        self.end += rows.shape[0]
        self.bytes += added
        self.loose += 1
        if self.loose >= LOOSE:
            newest = [self.pieces.pop() for _ in range(LOOSE)]
            self.pieces.append(torch.cat(newest[::-1]))
            self.loose = 0
        return added

    def trim(self, window: int, exact: bool = False) -> int:
        """Keep the newest `window` positions; bytes freed. Whole pieces go at once, parts of one when exact."""
        if self.end - self.first <= window:
            return 0
        before, self.first = self.bytes, self.end - window
        while self.pieces and self.begin + self.pieces[0].shape[0] <= self.first:
            piece = self.pieces.popleft()
            self.begin += piece.shape[0]
            self.bytes -= piece.nbytes
            self.loose = min(self.loose, len(self.pieces))
        stale = self.first - self.begin
        if self.pieces and stale and (exact or stale >= window):
            old = self.pieces[0]
            self.pieces[0] = old[stale:].clone()
            self.begin = self.first
            self.bytes -= old.nbytes - self.pieces[0].nbytes
        return before - self.bytes

    def between(self, start: int, end: int) -> tuple[int, list[torch.Tensor]]:
        start = max(start, self.first)
        wanted: list[torch.Tensor] = []
        at = self.end
        for piece in reversed(self.pieces):
            if at <= start:
                break
            at -= piece.shape[0]
            if at < end:
                wanted.append(piece[max(0, start - at) : end - at])
        return start, wanted[::-1]
