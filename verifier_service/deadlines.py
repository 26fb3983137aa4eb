"""Which requests are past their deadline. Plain Python."""

from __future__ import annotations

import heapq

from verifier_service.sequence import Key


class Deadlines:
    """Unix seconds by request; asking costs nothing while none has passed."""

    def __init__(self) -> None:
        self._by_key: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def add(self, key: Key, deadline: float) -> None:
        self._by_key[key] = deadline
        heapq.heappush(self._heap, (deadline, key))

    def forget(self, key: Key) -> None:
        """Unknown keys are ignored. The heap drops its entry when it comes up."""
        self._by_key.pop(key, None)

    def passed(self, now: float) -> list[Key]:
        """Keys whose time is over, each once."""
        over = []
        while self._heap and self._heap[0][0] <= now:
            deadline, key = heapq.heappop(self._heap)
            if self._by_key.get(key) == deadline:
                del self._by_key[key]
                over.append(key)
        return over
