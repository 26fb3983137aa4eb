"""How long a step waits for drafts: pure policy. A late drafter is asked less and less often, then tried again."""

from __future__ import annotations

LONGEST_PAUSE = 16  # soft deadlines


class Patience:
    """A wait that ends without answers starts a pause in which nothing new is asked; the next one doubles it.

    So a stalled or slow drafter costs one soft deadline now and then, not one a step. Times in seconds, monotonic.
    """

    def __init__(self, soft_deadline_s: float):
        self.soft_deadline_s = soft_deadline_s
        self._misses = 0
        self._asks_from = 0.0

    def may_ask(self, now: float) -> bool:
        return now >= self._asks_from

    def missed(self, now: float) -> None:
        """A wait has ended at its deadline."""
        pause = min(2**self._misses, LONGEST_PAUSE) * self.soft_deadline_s
        self._misses += 1
        self._asks_from = now + pause

    def kept(self) -> None:
        """All answers came in time."""
        self._misses = 0

    def renew(self) -> None:
        """Another drafter, or another life of the link: nothing is held against it."""
        self._misses = 0
        self._asks_from = 0.0
