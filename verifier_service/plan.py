"""A step is a value: what rank 0 decides, every rank executes. Plain Python, no torch.

Lengths and positions in tokens; a slot is the index of a request's per-rank state (KV length, recurrent state).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VerifyRow:
    """Verify bonus + k drafts of one slot. token_ids[0] is the bonus token, at absolute position `start`."""

    slot: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start.. of a prompt (or of a resumed request). completes_prompt: the last token's logits are wanted."""

    slot: int
    start: int
    token_ids: tuple[int, ...]
    completes_prompt: bool


@dataclass(frozen=True)
class StepPlan:
    """One target forward. Executed in this order: commit `decided`, apply released, new_blocks, then verify + prefill.

    decided: (slot, kept) for every verify row of the step before: how many of its tokens stay (1 = bonus only).
    new_blocks: (slot, block id) appended to the slot's block table, in order. heartbeat: nothing to compute.
    A slot's first chunk has start 0 and zeroes its recurrent state. stop: the ranks leave their loop.
    """

    step: int
    verify: tuple[VerifyRow, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    new_blocks: tuple[tuple[int, int], ...] = ()
    released: tuple[int, ...] = ()
    decided: tuple[tuple[int, int], ...] = ()
    heartbeat: bool = False
    stop: bool = False
