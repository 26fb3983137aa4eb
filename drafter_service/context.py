"""Which draft contexts are held, where, and up to which position. Pure bookkeeping: the rows live in `pool`.

Each context owns one slot of `window` rows and fills them in the order in which its positions come: mostly upwards, but
a context that is built again comes newest first, and a context row does not depend on the others. So what is held is
always the slot's first rows, whatever their positions. Once all are filled, position p takes the row of p - window.

A closed context is held on to until its slot is needed, for a new one may begin with the same tokens: it then gets a
copy of those rows, which nobody has to send again.

Slots are shared fairly: when none is free, a link takes one from the link that holds most, if that leaves it with no
fewer than the taker then has; else its new context is turned away. So links do not take contexts from each other in
turns, and one that alone wants more than there is keeps what it has.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

Key = tuple[str, str]  # link id, context id
MAX_POSITION = 1 << 40  # far above any model's; positions are int64 in tensors


@dataclass(slots=True)
class Context:
    """Holds positions lowest..watermark-1, at most `window` of them. Mutated by its table only."""

    slot: int
    lowest: int
    watermark: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What an append means: write the given rows from `skip` on into these rows of the slot, one each.

    rows: of positions first..first+count-1. restarted: what was in the slot before is void.
    evicted: whose slot was taken.
    """

    context: Context
    first: int
    skip: int
    rows: list[int]
    restarted: bool = False
    evicted: Key | None = None


@dataclass(frozen=True, slots=True)
class Copied:
    """Rows of one slot that are to be copied into rows of another. first: the position of the first of them."""

    context: Context
    first: int
    sources: list[int]
    rows: list[int]
    source: Context
    evicted: Key | None


class ContextTable:
    """At most `slots` contexts of `window` positions."""

    def __init__(self, slots: int, window: int):
        self.window = window
        self._free = list(range(slots - 1, -1, -1))
        self._contexts: OrderedDict[Key, Context] = OrderedDict()  # least recently used first
        self._closed: OrderedDict[Key, Context] = OrderedDict()  # likewise; their slots are as good as free
        self._counts: Counter[str] = Counter()  # contexts by link
        self._row_of: list[list[int]] = [[] for _ in range(slots)]  # by slot, then position mod window

    def __len__(self) -> int:
        return len(self._contexts)

    def __contains__(self, key: Key) -> bool:
        return key in self._contexts

    def get(self, key: Key) -> Context | None:
        """The context, which counts as a use of it."""
        context = self._contexts.get(key)
        if context is not None:
            self._contexts.move_to_end(key)
        return context

    def append(self, key: Key, start: int, count: int) -> Placement | None:
        """Place rows for positions start..start+count-1; None if there is no room for a new context.

        Known positions are skipped, and so are those that lie below the window. Rows that end at the lowest position
        held, or above it, are added below. A gap on top (start beyond the watermark) restarts the context at `start`:
        what counts is the newest window. So does an append that brings all that is held and more on both sides.
        """
        context, end, evicted = self.get(key), start + count, None
        if context is None:
            opened = self._open(key, start)
            if opened is None:
                return None
            context, evicted = opened
        elif start <= context.watermark and not (start < context.lowest and end >= context.watermark):
            return self._below(context, start, end) if start < context.lowest else self._above(context, start, end)
        context.lowest = context.watermark = start
        placement = self._above(context, start, end)
        return replace(placement, restarted=True, evicted=evicted)

    def share(self, key: Key, source_key: Key, start: int, count: int) -> Copied | None:
        """Begin a context with positions start..start+count-1 of another, open or closed.

        None: there is no room, the source does not hold them, or the context is no new one.
        """
        source = self._contexts.get(source_key) or self._closed.get(source_key)
        if source is None or key == source_key or key in self._contexts or not self._holds(source, start, count):
            return None
        was_closed = self._closed.pop(source_key, None) is not None  # so that its slot is not the one that is taken
        opened = self._open(key, start)
        if was_closed:
            self._closed[source_key] = source  # of the closed ones, used last
        if opened is None:
            return None
        context, evicted = opened
        sources = self._rows(source, start, start + count)
        return Copied(context, start, sources, self._above(context, start, start + count).rows, source, evicted)

    def close(self, key: Key) -> None:
        """Nobody will ask for this one any more. Unknown keys are ignored."""
        context = self._contexts.pop(key, None)
        if context is not None:
            self._uncount(key[0])
            self._closed[key] = context

    def held(self, context: Context) -> int:
        """How many rows of the slot are filled."""
        return context.watermark - context.lowest

    def free(self, key: Key) -> None:
        """Open or closed: nothing is held of it any more. Unknown keys are ignored."""
        context = self._contexts.pop(key, None)
        if context is not None:
            self._uncount(key[0])
        else:
            context = self._closed.pop(key, None)
        if context is not None:
            self._free.append(context.slot)

    def keys(self) -> list[Key]:
        """Of open and closed ones."""
        return [*self._contexts, *self._closed]

    def _open(self, key: Key, start: int) -> tuple[Context, Key | None] | None:
        """A new context without rows, and whose slot it took; None if there is no room."""
        self.free(key)  # a closed one of this name is another request's
        taken = self._take_slot(key[0])
        if taken is None:
            return None
        slot, evicted = taken
        self._row_of[slot] = self._row_of[slot] or [0] * self.window
        context = self._contexts[key] = Context(slot, start, start)
        self._counts[key[0]] += 1
        return context, evicted

    def _holds(self, context: Context, start: int, count: int) -> bool:
        return count > 0 and context.lowest <= start and start + count <= context.watermark

    def _uncount(self, link: str) -> None:
        self._counts[link] -= 1
        if not self._counts[link]:
            del self._counts[link]

    def _above(self, context: Context, start: int, end: int) -> Placement:
        first = max(context.watermark, end - self.window)
        if first > context.watermark:  # nothing that is held stays within the window
            context.lowest = context.watermark = first
        end = max(end, first)
        unfilled = self.window - self.held(context)
        self._fill(context, first, min(end, first + unfilled))
        context.watermark = end
        context.lowest = max(context.lowest, end - self.window)
        return Placement(context, first, first - start, self._rows(context, first, end))

    def _below(self, context: Context, start: int, end: int) -> Placement:
        first = max(start, context.watermark - self.window)
        if end < context.lowest or first >= context.lowest:
            return Placement(context, context.lowest, 0, [])
        lowest = context.lowest
        self._fill(context, first, lowest)
        context.lowest = first
        return Placement(context, first, first - start, self._rows(context, first, lowest))

    def _fill(self, context: Context, first: int, end: int) -> None:
        """Give positions first..end-1 the rows that follow those that are filled."""
        row_of, held = self._row_of[context.slot], self.held(context)
        for row, position in enumerate(range(first, end), held):
            row_of[position % self.window] = row

    def _rows(self, context: Context, first: int, end: int) -> list[int]:
        row_of = self._row_of[context.slot]
        return [row_of[position % self.window] for position in range(first, end)]

    def _take_slot(self, link: str) -> tuple[int, Key | None] | None:
        """A slot for a new context of this link, and whose it was."""
        if not self._free and self._closed:
            self._free.append(self._closed.popitem(last=False)[1].slot)
        if self._free:
            return self._free.pop(), None
        richest, most = self._counts.most_common(1)[0]
        if most <= self._counts[link] + 1:
            return None
        key = next(key for key in self._contexts if key[0] == richest)
        self.free(key)
        return self._free.pop(), key
