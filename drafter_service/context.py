"""Which draft contexts are held, where, and up to which position. Pure bookkeeping: the rows live in `pool`.

Each context owns one slot: a ring of `window` rows. Position p lies in ring row (p - origin) mod window, so that a
context that has not wrapped yet is the contiguous rows 0..length-1, and one that has is all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

Key = tuple[str, str]  # link id, context id
MAX_POSITION = 1 << 40  # far above any model's; positions are int64 in tensors


@dataclass(slots=True)
class Context:
    """Holds positions origin..watermark-1, the last `window` of them in the ring. Mutated by its table only."""

    slot: int
    origin: int
    watermark: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What an append means: write the given rows from `skip` on, as positions first..first+count-1, into `context`.

    restarted: earlier rows of this context are void. evicted: whose slot was taken. count is at most the window.
    """

    context: Context
    first: int
    skip: int
    count: int
    restarted: bool
    evicted: Key | None = None


class ContextTable:
    """At most `slots` contexts of `window` positions; a new one takes the slot of the least recently used."""

    def __init__(self, slots: int, window: int):
        self.window = window
        self._free = list(range(slots - 1, -1, -1))
        self._contexts: OrderedDict[Key, Context] = OrderedDict()  # least recently used first

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

    def append(self, key: Key, start: int, count: int) -> Placement:
        """Place rows for positions start..start+count-1.

        Known positions are skipped. A gap (start beyond the watermark) restarts the context at `start`: what counts is
        the newest window, and a context row does not depend on the rows before it. So does an append that brings what
        is missing before the origin and all that is held behind it.
        """
        context, evicted = self.get(key), None
        restarted = (
            context is None
            or start > context.watermark
            or (start < context.origin and start + count >= context.watermark)
        )
        if context is None:
            slot, evicted = self._take_slot()
            context = self._contexts[key] = Context(slot, start, start)
        elif restarted:
            context.origin = context.watermark = start
        end = max(start + count, context.watermark)
        first = max(context.watermark, end - self.window)
        context.watermark = end
        return Placement(context, first, first - start, end - first, restarted, evicted)

    def held(self, context: Context) -> int:
        """How many ring rows are filled."""
        return min(context.watermark - context.origin, self.window)

    def free(self, key: Key) -> None:
        """Unknown keys are ignored."""
        context = self._contexts.pop(key, None)
        if context is not None:
            self._free.append(context.slot)

    def keys(self) -> list[Key]:
        return list(self._contexts)

    def _take_slot(self) -> tuple[int, Key | None]:
        if self._free:
            return self._free.pop(), None
        key, context = self._contexts.popitem(last=False)
        return context.slot, key
