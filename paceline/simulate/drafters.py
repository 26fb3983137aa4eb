"""Drafters in virtual time: they batch what is queued as the real ones do, and fail in the ways that drafters fail.

Which contexts a drafter holds is decided by the service's own table; what it drafts is right as often as was assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from cluster.link.messages import DraftAnswer, DraftAsk, Piece
from drafter_service.context import ContextTable
from paceline.plan.times import DraftTimes
from paceline.simulate.virtual_time import VirtualTime

WRONG = 1 << 40  # no position's token


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a drafter. Seconds since the start; slow: times the usual. garbage: all drafts are wrong."""

    dies_at: float = float("inf")
    stalls_at: float = float("inf")
    stalls_s: float = float("inf")
    slow: float = 1.0
    garbage: bool = False

    def describe(self) -> str:
        """For people; empty if nothing is wrong."""
        parts = []
        if self.dies_at < float("inf"):
            parts.append(f"dies at {self.dies_at:g} s")
        if self.stalls_at < float("inf"):
            lasting = f" for {self.stalls_s:g} s" if self.stalls_s < float("inf") else " for good"
            parts.append(f"stalls at {self.stalls_at:g} s{lasting}")
        if self.slow != 1.0:
            parts.append(f"is {self.slow:g} times as slow")
        if self.garbage:
            parts.append("drafts garbage")
        return ", ".join(parts)


class Linked(Protocol):
    """A verifier's end, as a drafter sees it. link_id: of one epoch."""

    @property
    def link_id(self) -> str: ...

    def answered(self, answers: Sequence[DraftAnswer]) -> None: ...

    def dropped(self, context_id: str) -> None: ...


@dataclass(frozen=True)
class Guess:
    """How many drafts of a block are right, and what the drafter makes of it. Of each block the same, whoever drafts it
    and whenever.

    survival[i]: chance that the first i + 1 all are, falling. certainty: how often a hint at whether a draft is right
    is true; a draft's confidence is its chance with that hint. 0.5: the hints tell nothing.
    """

    survival: tuple[float, ...]
    certainty: float
    seed: int

    def block(self, context_id: str, base: int, rows: int) -> tuple[int, tuple[float, ...]]:
        """How many of the first `rows` are right, and each one's confidence: its chance if those before it are."""
        block = hash_of(context_id) ^ (self.seed * 0x9E3779B97F4A7C15) ^ (base << 20)
        chance = _uniform(block)
        right = sum(chance < each for each in self.survival[:rows])
        if self.certainty == 0.5:
            return right, self._chances[:rows]
        return right, tuple(self._hinted(block + 2 * i + 1, i, right) for i in range(rows))

    @cached_property
    def _chances(self) -> tuple[float, ...]:
        before = (1.0, *self.survival)
        return tuple(now / last if last else 0.0 for last, now in pairwise(before))

    def _hinted(self, draw: int, position: int, right: int) -> float:
        chance = self._chances[position]
        stands = position < right if position <= right else _uniform(draw << 8) < chance
        hint = stands == (_uniform(draw) < self.certainty)
        of_right, of_wrong = (self.certainty, 1 - self.certainty) if hint else (1 - self.certainty, self.certainty)
        whole = chance * of_right + (1 - chance) * of_wrong
        return chance * of_right / whole if whole else 0.0


class SimulatedDrafter:
    """One thread drafts for all linked verifiers: a pass takes all that is queued, then answers it together."""

    def __init__(
        self, time: VirtualTime, name: str, times: DraftTimes, slots: int, window: int, guess: Guess, fault: Fault
    ):
        self._time, self.name, self._times, self._guess, self._fault = time, name, times, guess, fault
        self._table = ContextTable(slots, window)
        self.slots, self.window = slots, window
        self._queue: list[Callable[[], tuple[Linked, Sequence[DraftAsk]] | None]] = []
        self._links: dict[str, Linked] = {}
        self._passing = False
        self.busy_s = 0.0

    @property
    def dies_at(self) -> float:
        return self._fault.dies_at

    @property
    def alive(self) -> bool:
        return self._time.now < self.dies_at

    # What comes over a link.

    def append(self, link: Linked, pieces: Sequence[Piece]) -> None:
        def take() -> None:
            self._links[link.link_id] = link
            for piece in pieces:
                placement = self._table.append((link.link_id, piece.context_id), piece.start, piece.count)
                if placement is None:
                    link.dropped(piece.context_id)
                elif placement.evicted is not None:
                    self._links[placement.evicted[0]].dropped(placement.evicted[1])

        self._queued(take)

    def ask(self, link: Linked, asks: Sequence[DraftAsk]) -> None:
        self._queued(lambda: (link, asks))

    def close(self, link: Linked, context_ids: Sequence[str]) -> None:
        def take() -> None:
            for context_id in context_ids:
                self._table.close((link.link_id, context_id))

        self._queued(take)

    def lost(self, link: Linked) -> None:
        def take() -> None:
            for key in [*self._table.keys()]:
                if key[0] == link.link_id:
                    self._table.free(key)

        self._queued(take)

    # Passes.

    def _queued(self, event: Callable[[], tuple[Linked, Sequence[DraftAsk]] | None]) -> None:
        self._queue.append(event)
        if not self._passing:
            self._begin()

    def _begin(self) -> None:
        """Take everything in; draft what can be drafted."""
        now, fault = self._time.now, self._fault
        if not self.alive:
            return
        if fault.stalls_at <= now < fault.stalls_at + fault.stalls_s:
            self._passing = True
            if fault.stalls_s < float("inf"):
                self._time.at(fault.stalls_at + fault.stalls_s, self._begin)
            return
        self._passing = False
        queue, self._queue = self._queue, []
        answers: list[tuple[Linked, list[DraftAnswer]]] = []
        blocks = rows = held = 0
        for asked in [found for event in queue if (found := event()) is not None]:
            link, asks = asked
            of_link = []
            for ask in asks:
                context = self._table.get((link.link_id, ask.context_id))
                if context is None or not 0 <= context.watermark - ask.base < self._table.held(context):
                    of_link.append(DraftAnswer(ask.context_id, ask.base, (), ()))
                    continue
                blocks, rows, held = blocks + 1, rows + ask.rows + 1, held + self._table.held(context)
                of_link.append(self._answer(ask))
            answers.append((link, of_link))
        if not answers:
            return
        seconds = self._times.draft_s(blocks, rows / blocks, held / blocks) * fault.slow if blocks else 0.0
        self._passing = True
        self.busy_s += seconds
        self._time.at(now + seconds, lambda: self._end(answers))

    def _end(self, answers: list[tuple[Linked, list[DraftAnswer]]]) -> None:
        self._passing = False
        if not self.alive:
            return
        for link, of_link in answers:
            link.answered(of_link)
        if self._queue:
            self._begin()

    def _answer(self, ask: DraftAsk) -> DraftAnswer:
        """The token of a position is its number."""
        right, confidence = self._guess.block(ask.context_id, ask.base, ask.rows)
        right = 0 if self._fault.garbage else right
        tokens = (*range(ask.base + 1, ask.base + 1 + right), *[WRONG] * (ask.rows - right))
        return DraftAnswer(ask.context_id, ask.base, tokens, confidence)


def hash_of(text: str) -> int:
    """The same in every process."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def _uniform(value: int) -> float:
    """In [0, 1), from 64 bits: the finalizer of splitmix64."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) / 2**64
