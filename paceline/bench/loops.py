"""Repeated cycles in generated text. Small models loop, and a loop is easy to draft: it flatters the tau."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_PERIOD = 16
REPEATS = 3


def in_loops(
    token_ids: Sequence[int], longest_period: int = LONGEST_PERIOD, repeats: int = REPEATS
) -> tuple[bool, ...]:
    """For each token: does it repeat a cycle of at most `longest_period` tokens that occurs `repeats` times in a row?

    The first occurrence of a cycle is not counted as a loop, all further ones are; text after a loop is text again.
    """
    marks = [False] * len(token_ids)
    for period in range(1, longest_period + 1):
        first = period
        while first < len(token_ids):
            end = first
            while end < len(token_ids) and token_ids[end] == token_ids[end - period]:
                end += 1
            if end - first >= period * (repeats - 1):
                marks[first:end] = [True] * (end - first)
            first = max(end, first) + 1
    return tuple(marks)


@dataclass(frozen=True)
class Tau:
    """Acceptance length in tokens per target step (accepted + bonus). None where there was no such step.

    outside_loops: of the steps whose first token is outside loops. loop_share: of all generated tokens.
    """

    overall: float | None
    outside_loops: float | None
    loop_share: float


def tau(outputs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tau:
    """outputs: (token ids, tokens committed by each decode step). Tokens before the steps' came with the prefill."""
    steps = tokens = outside_steps = outside_tokens = looped = total = 0
    for token_ids, commits in outputs:
        marks = in_loops(token_ids)
        looped += sum(marks)
        total += len(token_ids)
        position = len(token_ids) - sum(commits)
        for committed in commits:
            steps += 1
            tokens += committed
            if not marks[position]:
                outside_steps += 1
                outside_tokens += committed
            position += committed
    return Tau(
        overall=tokens / steps if steps else None,
        outside_loops=outside_tokens / outside_steps if outside_steps else None,
        loop_share=looped / total if total else 0.0,
    )
