"""How a step's prefill budget is divided among the prompts under way: no prompt starves another, whatever its length.

Half of the budget goes by order (priority, then arrival), so that the first in order always gets at least half of what
there is and ends in bounded time. The other half goes, within a priority, to the prompts that are nearest their end, so
that a short prompt passes a long one that came before it. What the one half leaves over is the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """priority: lower goes first. remaining: tokens still to be computed, at least 1."""

    priority: int
    remaining: int


def prefill_shares(prompts: Sequence[Prompt], budget: int) -> list[int]:
    """Tokens for each of `prompts`, which are in order; all of the budget if they need it. Budget in tokens."""
    shares = [0] * len(prompts)
    half = budget - budget // 2
    _deal(prompts, shares, range(len(prompts)), half)
    nearest = sorted(range(len(prompts)), key=lambda i: (prompts[i].priority, prompts[i].remaining))
    _deal(prompts, shares, nearest, budget - sum(shares))
    return shares


def _deal(prompts: Sequence[Prompt], shares: list[int], order: Sequence[int], budget: int) -> None:
    for index in order:
        if budget <= 0:
            return
        more = min(prompts[index].remaining - shares[index], budget)
        shares[index] += more
        budget -= more
