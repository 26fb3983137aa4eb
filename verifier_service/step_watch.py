"""How long a step may take before its engine counts as stuck: pure policy on the engine's own measured steps."""

from __future__ import annotations

WARM_UP_STEPS = 32  # a step of these may compile, page in or allocate: only the outer limit holds
FACTOR = 20.0  # times the longest lately seen of its size
LEAST_S = 15.0  # a machine may stall for seconds, and replacing a replica costs minutes
FORGET = 0.99  # of the longest, at every further step of its size


class StepWatch:
    """Limits by the step's tokens, in powers of two: a size never seen has that of the next larger one, or none."""

    def __init__(self) -> None:
        self._steps = 0
        self._longest: dict[int, float] = {}  # size -> seconds

    def limit(self, tokens: int) -> float:
        """Seconds after which a step of so many tokens is stuck; infinite while nothing is known of its size."""
        if self._steps < WARM_UP_STEPS:
            return float("inf")
        nearest = min((size for size in self._longest if size >= _size(tokens)), default=None)
        return float("inf") if nearest is None else max(LEAST_S, FACTOR * self._longest[nearest])

    def ended(self, tokens: int, seconds: float) -> float:
        """Take a finished step in. Returns the limit until the next begins: an idle engine makes empty ones."""
        self._steps += 1
        size = _size(tokens)
        self._longest[size] = max(seconds, FORGET * self._longest.get(size, 0.0))
        return self.limit(0)


def _size(tokens: int) -> int:
    return max(0, tokens - 1).bit_length()
