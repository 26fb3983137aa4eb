"""What the verifier's end knows of its open asks: which are answered, which are waited for, what was dropped."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from cluster.link.messages import DraftAnswer, DraftAsk

# What a drafter gone mad may make the host keep; a context that was appended to but never asked can be evicted too.
MAX_EVICTED = 1 << 14  # contexts lost of either kind
MAX_CONTEXT_ID = 1024  # characters


class AnswerBook:
    """Thread-safe. One open ask a context: a newer ask of the same context replaces the older one.

    `counters` counts answers and everything dropped: "stale" (the context moved on), "duplicate", "unknown" (a context
    that never asked or is closed) and "invalid" (more rows than asked, ids outside the vocabulary, a confidence that is
    no probability: handed out as an empty answer, so that nobody waits for a better one).
    """

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary
        self._changed = threading.Condition(threading.Lock())
        self._epoch: int | None = None
        self._asked: dict[str, DraftAsk] = {}
        self._open: set[str] = set()
        self._answers: dict[str, DraftAnswer] = {}
        self._awaited: set[str] = set()
        self._waiting = False
        self._evicted: dict[str, None] = {}  # sets in order of arrival
        self._unshared: dict[str, None] = {}
        self.counters: Counter[str] = Counter(answers=0, stale=0, duplicate=0, unknown=0, invalid=0)

    def begin(self, epoch: int) -> None:
        """A link stands: asks of this epoch are recorded from now on."""
        with self._changed:
            self._epoch = epoch

    def end(self) -> None:
        """The link is gone and every open ask with it. Answers that have come can still be collected."""
        with self._changed:
            self._epoch = None
            self._asked.clear()
            self._open.clear()
            self._awaited.clear()
            self._evicted.clear()
            self._unshared.clear()
            self._changed.notify_all()

    def asked(self, asks: Sequence[DraftAsk], epoch: int) -> None:
        """Open asks, before they are sent. Ignored if that epoch is over."""
        with self._changed:
            for ask in asks:
                self._answers.pop(ask.context_id, None)
            if self._epoch != epoch:
                return
            for ask in asks:
                self._asked[ask.context_id] = ask
                self._open.add(ask.context_id)

    def deliver(self, answers: Iterable[DraftAnswer]) -> None:
        with self._changed:
            for answer in answers:
                self._deliver(answer)
            if self._waiting and not self._awaited:
                self._changed.notify_all()

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        """Wait until all asks that are still open are answered, the link ends or timeout_s passes; take what came."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._awaited = {ask.context_id for ask in asks if self._is_open(ask)}
            self._waiting = True
            while self._awaited and self._epoch is not None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            self._waiting = False
            taken = []
            for ask in asks:
                answer = self._answers.get(ask.context_id)
                if answer is not None and answer.base == ask.base:
                    del self._answers[ask.context_id]
                    taken.append(answer)
            return taken

    def close(self, context_ids: Sequence[str]) -> None:
        with self._changed:
            for context_id in context_ids:
                self._asked.pop(context_id, None)
                self._open.discard(context_id)
                self._answers.pop(context_id, None)

    def evict(self, context_id: str) -> None:
        self._note(self._evicted, context_id)

    def unshare(self, context_id: str) -> None:
        self._note(self._unshared, context_id)

    def take_evicted(self) -> list[str]:
        return self._taken(self._evicted)

    def take_unshared(self) -> list[str]:
        return self._taken(self._unshared)

    def _note(self, lost: dict[str, None], context_id: str) -> None:
        with self._changed:
            if len(lost) < MAX_EVICTED and len(context_id) <= MAX_CONTEXT_ID:
                lost[context_id] = None

    def _taken(self, lost: dict[str, None]) -> list[str]:
        if not lost:
            return []
        with self._changed:
            taken = list(lost)
            lost.clear()
            return taken

    def _is_open(self, ask: DraftAsk) -> bool:
        return ask.context_id in self._open and self._asked[ask.context_id].base == ask.base

    def _deliver(self, answer: DraftAnswer) -> None:
        context_id = answer.context_id
        ask = self._asked.get(context_id)
        if ask is None:
            self.counters["unknown"] += 1
        elif ask.base != answer.base:
            self.counters["stale"] += 1
        elif context_id not in self._open:
            self.counters["duplicate"] += 1
        else:
            if not self._is_valid(answer, ask):
                self.counters["invalid"] += 1
                answer = DraftAnswer(context_id, answer.base, (), ())
            self.counters["answers"] += 1
            self._answers[context_id] = answer
            self._open.discard(context_id)
            self._awaited.discard(context_id)

    def _is_valid(self, answer: DraftAnswer, ask: DraftAsk) -> bool:
        ids, confidence = answer.token_ids, answer.confidence
        if not ids:
            return not confidence
        return (
            len(ids) == len(confidence) <= ask.rows
            and min(ids) >= 0
            and max(ids) < self._vocabulary
            and math.isfinite(sum(confidence))
            and min(confidence) >= 0.0
            and max(confidence) <= 1.001  # half precision rounds up
        )
