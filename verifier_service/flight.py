"""A step between its plan and its outcome, and what can be said of it before the outcome is known. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from verifier_service.plan import PrefillChunk, VerifyRow
from verifier_service.sequence import RunningRequest

Planned = Sequence[tuple[RunningRequest, VerifyRow | PrefillChunk]]  # a step's rows with their requests, in order


@dataclass(slots=True, eq=False)
class Flight:
    """counted: how far its rows take their requests is in their `computed` already; their tokens are still to come."""

    work: list[tuple[RunningRequest, VerifyRow | PrefillChunk]] = field(default_factory=list)
    counted: bool = False


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows row .. row + count - 1 of the step's logits, of one request; row + i decides position `position` + i.

    Row + i follows the request's tokens and drafts[:i].
    """

    sequence: RunningRequest
    row: int
    count: int
    position: int
    drafts: tuple[int, ...] = ()


def sampled_rows(work: Planned) -> list[SampledRows]:
    """For the requests whose token is not just the best one."""
    return _rows_of(work, [not sequence.plain for sequence, _ in work])


def told_rows(work: Planned) -> list[SampledRows]:
    """For the requests whose log probabilities are wanted."""
    return _rows_of(work, [sequence.logprobs is not None for sequence, _ in work])


def _rows_of(work: Planned, wanted: list[bool]) -> list[SampledRows]:
    if True not in wanted:
        return []
    found = []
    row = 0
    for (sequence, item), here in zip(work, wanted):
        count = len(item.token_ids)
        if isinstance(item, VerifyRow):
            if here:
                found.append(SampledRows(sequence, row, count, item.start + 1, item.token_ids[1:]))
        else:
            position, count = item.start + count, int(item.completes_prompt)
            if count and here:
                found.append(SampledRows(sequence, row, count, position))
        row += count
    return found


def certain(work: Planned) -> bool:
    """Whether it is known before the outcome where every request of a step will stand, save for its next token.

    It is not with drafts, which may stand or fall. A request that has left meanwhile stands in nobody's way.
    """
    return not any(
        isinstance(item, VerifyRow) and len(item.token_ids) > 1 and sequence.slot >= 0 for sequence, item in work
    )


def awaits(work: Planned) -> bool:
    """Whether the host has to see a token that is under way before it can say how some row's token is taken."""
    return any(
        sequence.shaping is not None and isinstance(item, VerifyRow) and item.token_ids[0] < 0
        for sequence, item in work
    )
