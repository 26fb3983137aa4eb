"""Which page of the feature store holds which positions of which request. Pure policy, no torch.

A page has as many rows as a KV block has tokens, and holds the context features of one block of one request. A full
page of a block that has a name can be found by it, as the block itself can: the next request that goes on from that
block shares the page, and nothing is copied. What no request holds any more stays until its page is wanted, the least
recently used first. When requests alone fill the store, the one that holds most gives up its older half: that costs
acceptance, and only its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from verifier_service.block_hashes import BlockHash
from verifier_service.blocks import BlockPool


@dataclass(slots=True)
class Parts:
    """Stretches of rows: counts[i] rows of some tensor, from of[i] on, have their place in the store from at[i] on."""

    of: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, of: int, at: int, count: int) -> None:
        self.of.append(of)
        self.at.append(at)
        self.counts.append(count)


@dataclass(slots=True, eq=False)
class PageTable:
    """One request's rows, of positions first..end-1. Changed by FeaturePages, and by `extend`.

    pages[i] holds the request's block oldest + i. at: the store's row for position `end`; room: how many fit from there
    before the next page is needed.
    """

    pages: list[int] = field(default_factory=list)
    oldest: int = 0
    first: int = 0
    end: int = 0
    at: int = 0
    room: int = 0

    def extend(self, count: int) -> int:
        """Fewer rows than there is room for, the usual case of a step. Returns the store's row of the first."""
        at = self.at
        self.at = at + count
        self.room -= count
        self.end += count
        return at


class FeaturePages:
    """`total` pages of `page_tokens` rows; page p has the store's rows p x page_tokens and on."""

    def __init__(self, total: int, page_tokens: int):
        self.page_tokens = page_tokens
        self._pool = BlockPool(total)
        self._tables: dict[Hashable, PageTable] = {}

    @property
    def idle(self) -> int:
        """Pages that are kept for their name alone."""
        return self._pool.idle

    @property
    def held(self) -> int:
        """Pages that requests hold."""
        return self._pool.total - self._pool.free

    def of(self, key: Hashable) -> PageTable:
        """This request's, until it is forgotten; empty if it is new."""
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = PageTable()
        return table

    def put(
        self,
        table: PageTable,
        start: int,
        count: int,
        window: int,
        names: Sequence[BlockHash],
        parts: Parts,
        before: int = 0,
    ) -> None:
        """Rows for positions start .. start+count-1: adds to `parts` where those have to go that are kept.

        Positions held already are skipped (a preempted request computes them again); a gap starts afresh at `start`.
        Pages wholly before the newest `window` positions are given up. names: of the request's blocks from the first
        on; full pages of those can be found. before: rows of others that come first in the tensor to be written.
        """
        stop = start + count
        if start > table.end:
            self._restart(table, start)
        while (end := table.end) < stop:
            room = table.room or self._open(table)
            if not room:
                self._restart(table, stop)
                break
            size = min(stop - end, room)
            parts.add(before + end - start, table.extend(size), size)
            if size == room:
                self._close(table, window, names)

    def adopt(self, table: PageTable, names: Sequence[BlockHash], wanted: int) -> bool:
        """A request goes on after blocks with these names: it holds their newest pages, in place of what it held.

        As many as hold `wanted` rows, or are there. False: none is, and nothing has changed.
        """
        found: list[int] = []
        for name in reversed(names):
            page = self._pool.find(name)
            if page is None or len(found) * self.page_tokens >= wanted:
                break
            found.append(page)
        if not found:
            return False
        self._pool.share(found)
        self._restart(table, (len(names) - len(found)) * self.page_tokens)
        table.pages, table.oldest, table.end = found[::-1], len(names) - len(found), len(names) * self.page_tokens
        return True

    def rows(self, table: PageTable, start: int, end: int) -> tuple[int, Parts]:
        """Of positions start..end-1, as far as they are held: the first of them, and where they are."""
        start, end = max(start, table.first), min(end, table.end)
        parts = Parts()
        at = start
        while at < end:
            block, inside = divmod(at, self.page_tokens)
            size = min(end - at, self.page_tokens - inside)
            parts.add(at - start, table.pages[block - table.oldest] * self.page_tokens + inside, size)
            at += size
        return start, parts

    def forget(self, key: Hashable) -> None:
        """The request is over. Unknown ones are ignored."""
        table = self._tables.pop(key, None)
        if table is not None:
            self._pool.release(reversed(table.pages))

    def forget_names(self, names: Iterable[BlockHash]) -> None:
        """These blocks are evicted. Unknown ones are ignored."""
        pages = [page for name in names if (page := self._pool.find(name)) is not None]
        self._pool.forget(pages)

    def _open(self, table: PageTable) -> int:
        """A page for position `end`; how many rows fit. 0: there is none."""
        while not self._pool.free:
            largest = max(self._tables.values(), key=_size)
            if len(largest.pages) < 2:
                return 0
            self._drop(largest, len(largest.pages) // 2)
        block, inside = divmod(table.end, self.page_tokens)
        if not table.pages:
            table.oldest, table.first = block, table.end
        page = self._pool.allocate(1)[0]
        table.pages.append(page)
        table.at = page * self.page_tokens + inside
        table.room = self.page_tokens - inside
        return table.room

    def _close(self, table: PageTable, window: int, names: Sequence[BlockHash]) -> None:
        """The newest page is full: it gets its name, and the oldest may lie before the window now."""
        block = table.end // self.page_tokens - 1
        if block < len(names) and table.first <= block * self.page_tokens:
            self._pool.cache(table.pages[-1], names[block])
        stale = (table.end - window) // self.page_tokens - table.oldest
        if stale > 0:
            self._drop(table, stale)

    def _drop(self, table: PageTable, count: int) -> None:
        self._pool.release(table.pages[:count])
        del table.pages[:count]
        table.oldest += count
        table.first = max(table.first, table.oldest * self.page_tokens)

    def _restart(self, table: PageTable, start: int) -> None:
        self._pool.release(reversed(table.pages))
        table.pages = []
        table.first = table.end = start
        table.room = 0


def _size(table: PageTable) -> int:
    return len(table.pages)
