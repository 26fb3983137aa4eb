"""Which requests are past their deadline. Plain Python."""

from __future__ import annotations

import heapq

from verifier_service.sequence import Key

SPARE = 64  # entries of forgotten keys that are not worth a rebuild


class Deadlines:
    """Unix seconds by request; asking costs nothing while none has passed."""

    def __init__(self) -> None:
        self._by_key: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def add(self, key: Key, deadline: float) -> None:
        self._by_key[key] = deadline
        heapq.heappush(self._heap, (deadline, key))

    def forget(self, key: Key) -> None:
        """Unknown keys are ignored. The heap keeps the entry until it comes up, or until most of them are such."""
        self._by_key.pop(key, None)
        if len(self._heap) > 2 * len(self._by_key) + SPARE:
            self._heap = [(deadline, key) for key, deadline in self._by_key.items()]
            heapq.heapify(self._heap)

    def passed(self, now: float) -> list[Key]:
        """Keys whose time is over, each once."""
        over = []
        while self._heap and self._heap[0][0] <= now:
            deadline, key = heapq.heappop(self._heap)
            if self._by_key.get(key) == deadline:
                del self._by_key[key]
                over.append(key)
        return over
