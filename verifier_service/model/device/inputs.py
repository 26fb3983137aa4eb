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


class InputWriter:
    """Writes plans; remembers where each slot's row began in the step before, for its commit.

    tables: the host's copy of the block tables, which follows the plans; max_blocks: of one slot.
    """

    def __init__(self, tables: BlockTables, max_blocks: int, device: torch.device):
        self._tables, self._max_blocks, self._device = tables, max_blocks, device
        self._first: dict[int, int] = {}  # by slot, of the last step's verify rows

    def changing(self, plan: StepPlan) -> ChangingLayout:
        completed = sum(chunk.completes_prompt for chunk in plan.prefill)
        replays = sum(self._replays(slot, kept) for slot, kept, _ in plan.saved)
        return ChangingLayout(
            wanted=sum(len(row.token_ids) for row in plan.verify) + completed if plan.prefill else 0,
            moves=len(plan.new_blocks),
            commits=sum(slot in self._first for slot, _ in plan.decided),
            replays=replays,
            copies=len(plan.saved) - replays,
        )

    def _replays(self, slot: int, kept: int) -> bool:
        """Whether a checkpoint is of a state inside the step before, or of the one that is there after its commit."""
        return kept > 0 and slot in self._first

    def write(
        self, plan: StepPlan, fixed: FixedLayout, changing: ChangingLayout, into: torch.Tensor | None = None
    ) -> StepInputs:
        """One copy to the device, which nobody waits for. into: a buffer to keep the words in; None: a new one.

        Releases slots and appends blocks in the host's tables.
        """
        count = fixed.words + changing.words
        host = torch.empty(count, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        words = host.numpy()
        self._write_changing(plan, changing.of(words[fixed.words :]))
        self._write_fixed(plan, fixed.of(words))
        there = torch.empty(count, dtype=torch.int32, device=self._device) if into is None else into[:count]
        there.copy_(host, non_blocking=True)
        return StepInputs(fixed.of(there), changing.of(there[fixed.words :]))

    def _write_fixed(self, plan: StepPlan, parts: FixedInputs[np.ndarray]) -> None:
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
        self._first = {row.slot: int(parts.query_starts[index]) for index, row in enumerate(plan.verify)}

    def _write_changing(self, plan: StepPlan, parts: ChangingInputs[np.ndarray]) -> None:
        first = self._first
        _fill(parts.commits, [(slot, first[slot], kept) for slot, kept in plan.decided if slot in first])
        replays = [(slot, first[slot], kept, at) for slot, kept, at in plan.saved if self._replays(slot, kept)]
        _fill(parts.replays, replays)
        _fill(parts.copies, [(slot, at) for slot, kept, at in plan.saved if not self._replays(slot, kept)])
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
