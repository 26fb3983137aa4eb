"""A plan as the words that the device reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verifier_service.model.device.layout import ChangingInputs, ChangingLayout, FixedInputs, FixedLayout
from verifier_service.model.kv_cache import BlockTables
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow


@dataclass(frozen=True)
class StepInputs:
    """A step's inputs on the device; views of one buffer."""

    fixed: FixedInputs[torch.Tensor]
    changing: ChangingInputs[torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a plan makes of the tokens kept in the step before. goes_on: slot -> how many of its tokens a verify row
    takes into its state; the others as in ChangingInputs, row by row.
    """

    goes_on: dict[int, int]
    commits: list[tuple[int, int, int]]
    replays: list[tuple[int, int, int, int]]
    copies: list[tuple[int, int]]


class InputWriter:
    """Writes plans; remembers where the verify rows of the step before were kept, for their commit.

    tables: the host's copy of the block tables, which follows the plans; max_blocks: of one slot. kept: tokens of a
    step that recurrent states have room to keep, beside those of the step before; 0: there are no such states.
    """

    def __init__(self, tables: BlockTables, max_blocks: int, device: torch.device, kept: int):
        self._tables, self._max_blocks, self._device = tables, max_blocks, device
        self._kept, self._into = kept, 0
        self._first: dict[int, int] = {}  # by slot, of the last step's verify rows of several tokens

    def changing(self, plan: StepPlan) -> ChangingLayout:
        completed = sum(chunk.completes_prompt for chunk in plan.prefill)
        outcome = self._outcome(plan)
        return ChangingLayout(
            wanted=sum(len(row.token_ids) for row in plan.verify) + completed if plan.prefill else 0,
            moves=len(plan.new_blocks),
            commits=len(outcome.commits),
            replays=len(outcome.replays),
            copies=len(outcome.copies),
        )

    def _outcome(self, plan: StepPlan) -> Outcome:
        first = self._first
        inside = [(slot, first[slot], kept, at) for slot, kept, at in plan.saved if kept and slot in first]
        copies = [(slot, at) for slot, kept, at in plan.saved if not kept or slot not in first]
        decided = [(slot, kept) for slot, kept in plan.decided if slot in first]
        verified = {row.slot for row in plan.verify} - {slot for slot, _ in plan.restored} if decided else ()
        goes_on = {slot: kept for slot, kept in decided if slot in verified}
        commits = [(slot, first[slot], kept) for slot, kept in decided if slot not in goes_on]
        return Outcome(goes_on, commits, inside, copies)

    def write(
        self, plan: StepPlan, fixed: FixedLayout, changing: ChangingLayout, into: torch.Tensor | None = None
    ) -> StepInputs:
        """One copy to the device, which nobody waits for. into: a buffer to keep the words in; None: a new one.

        Releases slots and appends blocks in the host's tables.
        """
        count = fixed.words + changing.words
        host = torch.empty(count, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        words = host.numpy()
        outcome = self._outcome(plan)
        self._write_changing(plan, outcome, changing.of(words[fixed.words :]))
        self._write_fixed(plan, outcome, fixed.of(words))
        there = torch.empty(count, dtype=torch.int32, device=self._device) if into is None else into[:count]
        there.copy_(host, non_blocking=True)
        return StepInputs(fixed.of(there), changing.of(there[fixed.words :]))

    def _write_fixed(self, plan: StepPlan, outcome: Outcome, parts: FixedInputs[np.ndarray]) -> None:
        work = _work(plan)
        counts = [len(item.token_ids) for item in work]
        requests, total = len(work), sum(counts)
        parts.token_ids[:total] = [token for item in work for token in item.token_ids]
        parts.token_ids[total:] = 0
        parts.starts[:requests] = [item.start for item in work]
        parts.starts[requests:] = 0
        parts.slots[:requests] = [item.slot for item in work]
        parts.slots[requests:] = 0
        parts.query_starts[0] = 0
        np.cumsum(counts, out=parts.query_starts[1 : requests + 1])
        parts.query_starts[requests + 1 :] = total
        for item in work:
            self._tables.check(item.slot, item.start + len(item.token_ids))
        self._write_kept(plan, outcome, parts)

    def _write_kept(self, plan: StepPlan, outcome: Outcome, parts: FixedInputs[np.ndarray]) -> None:
        """Two steps in a row keep tokens in different halves of the room: one is read while the other is written."""
        for part in (parts.kept_first, parts.kept_standing, parts.kept_into):
            part[:] = 0
        if not self._kept:
            return
        verified = sum(len(row.token_ids) for row in plan.verify)
        assert verified <= self._kept, f"{verified} tokens to verify, and room to keep {self._kept}"
        before, self._first = self._first, {}
        self._into = self._kept - self._into
        for index, row in enumerate(plan.verify):
            into = self._into + int(parts.query_starts[index])
            parts.kept_into[index] = into
            if row.slot in outcome.goes_on:
                parts.kept_first[index], parts.kept_standing[index] = before[row.slot], outcome.goes_on[row.slot]
            if len(row.token_ids) > 1:
                self._first[row.slot] = into

    def _write_changing(self, plan: StepPlan, outcome: Outcome, parts: ChangingInputs[np.ndarray]) -> None:
        _fill(parts.commits, outcome.commits)
        _fill(parts.replays, outcome.replays)
        _fill(parts.copies, outcome.copies)
        for slot in plan.released:
            self._tables.release(slot)
        cells = [slot * self._max_blocks + self._tables.append(slot, block) for slot, block in plan.new_blocks]
        parts.cells[:] = cells
        parts.blocks[:] = [block for _, block in plan.new_blocks]
        if len(parts.logit_rows):
            parts.logit_rows[:] = _logit_rows(plan)


def _fill(columns: np.ndarray, rows: Sequence[tuple[int, ...]]) -> None:
    if rows:
        columns[:] = np.array(rows, dtype=np.int32).T


def _work(plan: StepPlan) -> list[VerifyRow | PrefillChunk]:
    return [*plan.verify, *plan.prefill]


def _logit_rows(plan: StepPlan) -> list[int]:
    """Every verify token, then the last token of each chunk that completes its prompt."""
    at = sum(len(row.token_ids) for row in plan.verify)
    rows = list(range(at))
    for chunk in plan.prefill:
        at += len(chunk.token_ids)
        if chunk.completes_prompt:
            rows.append(at - 1)
    return rows
