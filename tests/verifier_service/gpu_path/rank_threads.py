"""Tensor-parallel ranks as threads that take turns: Triton's interpreter serves one thread at a time.

A thread runs until it has to hear from the others, and hands on then; no launch is ever interrupted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from modeling.ranks import RankGroup

T = TypeVar("T")
PATIENCE_S = 60.0


class Turns:
    """Whose turn it is, and what the ranks have said in this round."""

    def __init__(self, size: int):
        self.size = size
        self._said: list[torch.Tensor | None] = [None] * size
        self._turn, self._changed = 0, threading.Condition()

    def await_turn(self, rank: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._turn == rank, PATIENCE_S):
                raise TimeoutError(f"rank {rank} never had its turn again: another one failed")

    def hand_on(self) -> None:
        with self._changed:
            self._turn = (self._turn + 1) % self.size
            self._changed.notify_all()

    def exchange(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        """Everyone's parts. Rank 0 sees them when its turn comes again, so do the others behind it."""
        self._said[rank] = part.clone()
        self.hand_on()
        self.await_turn(rank)
        if rank == 0:
            self._round = [said for said in self._said if said is not None]
        return list(self._round)


class ThreadRanks(RankGroup):
    """A RankGroup whose members are the threads of `in_turns`."""

    def __init__(self, rank: int, turns: Turns):
        super().__init__(rank, turns.size, group=turns)  # type: ignore[arg-type]

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        turns: Any = self.group
        return turns.exchange(self.rank, part)

    def gather_to_first(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        parts = self.gather(part)
        return parts if self.rank == 0 else None

    def sum_(self, partial: torch.Tensor) -> torch.Tensor:
        first, *rest = self.gather(partial)
        for part in rest:
            first = first + part
        return partial.copy_(first)


def in_turns(size: int, run: Callable[[ThreadRanks], T]) -> list[T]:
    """What `run` gives on each rank."""
    turns = Turns(size)

    def one(rank: int) -> T:
        turns.await_turn(rank)
        try:
            return run(ThreadRanks(rank, turns))
        finally:
            turns.hand_on()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        return [future.result() for future in futures]
