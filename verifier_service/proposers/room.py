"""How many draft contexts a drafter has room for, as far as one of its verifiers can tell. Pure policy."""

from __future__ import annotations

FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0


class Room:
    """A drafter says what it holds in all; other verifiers have their share of it, which shows when it turns one away.

    Then nothing more is tried than it held at that moment, until a pause is over: one more, and if that one stays twice
    as many the next time. Each try that fails doubles the pause. Times in seconds, monotonic.
    """

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, capacity: int) -> None:
        """With another drafter. capacity: contexts that it holds over all verifiers; 0 = unknown."""
        self._capacity = capacity
        self._limit: int | None = None  # None: it has turned nothing away so far
        self._step, self._stayed = 1, True
        self._pause_s, self._try_at = FIRST_PAUSE_S / 2, 0.0

    def has_place(self, taken: int, now: float) -> bool:
        """Whether one more than `taken` may be tried."""
        if self._capacity and taken >= self._capacity:
            return False
        if self._limit is None or taken < self._limit:
            return True
        if now < self._try_at:
            return False
        if self._stayed:
            self._pause_s = FIRST_PAUSE_S / 2
        self._limit += self._step
        self._step, self._stayed = 2 * self._step, True
        self._try_at = now + FIRST_PAUSE_S
        return True

    def turned_away(self, taken: int, now: float) -> None:
        """There was no place for one more than `taken`."""
        self._limit = taken if self._limit is None else min(taken, self._limit)
        if self._stayed:
            self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        self._step, self._stayed = 1, False
        self._try_at = now + self._pause_s
