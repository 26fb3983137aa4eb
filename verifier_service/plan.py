"""A step is a value: what rank 0 decides, every rank executes. Plain Python, no torch.

Lengths and positions in tokens; a slot is the index of a request's per-rank state (KV length, recurrent state).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cluster.contracts import SamplingParams


class VerifyRow(msgspec.Struct, frozen=True, gc=False):  # hundreds a step: made in a tenth of a dataclass's time
    """Verify bonus + k drafts of one slot. token_ids[0] is the bonus token, at absolute position `start`.

    A bonus token below 0 is known to the devices only: see StepPlan.ahead.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start.. of a prompt (or of a resumed request). completes_prompt: the last token's logits are wanted.

    checkpoint: where to save the recurrent state that it ends with; -1: nowhere. A plan may hold several chunks of one
    slot, in order.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    completes_prompt: bool
    checkpoint: int = -1


class RowDraw(msgspec.Struct, frozen=True, gc=False):
    """Rows row .. row + count - 1 of a step's logits are one request's; row + i is sampled for position `position` + i.

    seed: as int64. params: temperature, above 0, and what truncates; nothing else in them is set.
    """

    row: int
    count: int
    position: int
    seed: int
    choice: int
    params: SamplingParams


class ShownRows(msgspec.Struct, frozen=True, gc=False):
    """Rows row .. row + count - 1 of a step's logits reach rank 0. late: it takes their tokens, after the forward."""

    row: int
    count: int
    late: bool

    @property
    def rows(self) -> range:
        return range(self.row, self.row + self.count)


@dataclass(frozen=True)
class StepPlan:
    """One target forward. Executed in this order: commit `decided`, saved, released, new_blocks, restored, then verify
    + prefill.

    decided: (slot, kept) for every verify row of the step before: how many of its tokens stay (1 = bonus only).
    saved: (slot, kept, checkpoint): a copy of the slot's recurrent state as it was after `kept` tokens of its verify
    row of the step before; kept 0: as it is now. restored: (slot, checkpoint), the other way round.
    new_blocks: (slot, block id) appended to the slot's block table, in order; a cached block may be in several tables.
    A chunk with start 0 zeroes its slot's recurrent state; a slot's first chunk may start later, after cached blocks.
    ahead: planned before the outcome of the step before was known. Token id -1 - row then stands for the token that
    was taken at that row of its logits.
    draws: the ranks take the tokens themselves, each in its part of the vocabulary: these rows are sampled, all others
    greedy. None: rank 0 gets all logits and takes all tokens. shown: in a plan with draws alone, the late ones
    first, which are not among the draws.
    heartbeat: nothing to compute. stop: the ranks leave their loop.
    """

    step: int
    verify: tuple[VerifyRow, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    new_blocks: tuple[tuple[int, int], ...] = ()
    released: tuple[int, ...] = ()
    decided: tuple[tuple[int, int], ...] = ()
    saved: tuple[tuple[int, int, int], ...] = ()
    restored: tuple[tuple[int, int], ...] = ()
    draws: tuple[RowDraw, ...] | None = None
    shown: tuple[ShownRows, ...] = ()
    ahead: bool = False
    heartbeat: bool = False
    stop: bool = False

    @property
    def late(self) -> bool:
        """Whether rank 0 takes some of the tokens that the ranks would take themselves."""
        return any(rows.late for rows in self.shown)
