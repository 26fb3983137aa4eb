"""How long a step waits for drafts: pure policy. A late drafter is asked less and less often, then tried again."""

from __future__ import annotations

DOUBLINGS = 6  # the longest pause is 2 ** 6 deadlines: one that is always late costs 1/65 of the time
FORGIVEN = 0.1  # doublings, by a wait that all answers came in: of fewer misses, none is worth a longer pause


class Patience:
    """A wait that ends without answers starts a pause in which nothing new is asked; the next one doubles it.

    So a stalled or slow drafter costs one deadline now and then, not one a step. Times in seconds, monotonic.
    """

    def __init__(self, soft_deadline_s: float):
        self.soft_deadline_s = soft_deadline_s
        self._doublings = 0.0
        self._asks_from = 0.0

    def may_ask(self, now: float) -> bool:
        return now >= self._asks_from

    def missed(self, now: float, deadline_s: float) -> None:
        """A wait has ended at its deadline, which was `deadline_s`."""
        self._asks_from = now + 2**self._doublings * deadline_s
        self._doublings = min(self._doublings + 1, DOUBLINGS)

    def kept(self) -> None:
        """All answers came in time."""
        self._doublings = max(0.0, self._doublings - FORGIVEN)

    def renew(self) -> None:
        """Another drafter: nothing is held against it."""
        self._doublings = 0.0
        self._asks_from = 0.0
