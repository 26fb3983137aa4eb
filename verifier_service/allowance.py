"""What drafting may lose against plain decoding, in all: pure policy. The unit is the time of one plain step."""

from __future__ import annotations

FIRST = 12.0  # may be lost at once, when nothing is known
MOST = 20.0  # what is saved up, at most
SHARE = 0.01  # of the time, may be lost for good
ANEW, ANEW_EVERY = 8.0, 4000.0  # what a new drafter finds at least, if the last such favour was so long ago


class Allowance:
    """An account that time fills and losses empty; gains fill it too, up to MOST.

    Who starts nothing that can lose while it is empty loses at most FIRST + SHARE of the time + the last thing
    started; after gains, at most MOST instead of FIRST. It knows nothing of links and drafters: whatever comes and
    goes, the bound holds.
    """

    def __init__(self) -> None:
        self.left = FIRST
        self._time = 0.0
        self._anew_from = 0.0

    def passed(self, steps: float) -> None:
        """Time has passed."""
        self._time += steps
        self.earn(SHARE * steps)

    def earn(self, steps: float) -> None:
        """Drafting has gained so much, or lost it (negative)."""
        self.left = min(MOST, self.left + steps)

    def begin_anew(self) -> bool:
        """For another drafter, which is not to suffer for the last: false if there was one just before."""
        if self._time < self._anew_from:
            return False
        self._anew_from = self._time + ANEW_EVERY
        self.left = max(self.left, ANEW)
        return True
