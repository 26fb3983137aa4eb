"""Cutting a stream of text at stop strings. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopCutter:
    """Feed text in pieces of any size; get back what is safe to show.

    Only text that may still become a stop string is held back. After a match nothing more is shown.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now. Sets `stopped` once a stop string is complete; it and what follows is dropped."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        matches = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)]
        keep = self._may_become_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The generation ended: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _may_become_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
