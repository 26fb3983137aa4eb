"""Who gets what in the next step: pure policy over slots, KV blocks and a token budget. No torch.

First come, first served within a priority. A step holds one verify row for every decoding request, their drafts, and
prefill chunks in what is left of the budget, divided as prefill_shares says. A request enters when a slot and the
blocks of all its known tokens are there, with what the prefix cache has of them. When a decoding request needs a block
and none is free, the last in order gives up its own: it waits again and is prefilled again later, its output kept as it
was (the same path by which a request resumes on another engine).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.contracts import EngineRequest
from cluster.errors import OverloadedError
from verifier_service.acceptance import accepted_drafts, cut
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow
from verifier_service.prefill_shares import Prompt, prefill_shares
from verifier_service.prefix_cache import Hit, PrefixCache
from verifier_service.sequence import Key, Progress, RunningRequest

DEFERRED = 8  # so many waiting requests may stand aside for a prompt that computes what they need, and let others pass
PREFILL_SHARE = 4  # while prompts wait, at least 1/4 of a step's budget is theirs, or first tokens might never come


@dataclass(frozen=True)
class SchedulerLimits:
    """slots: requests running at once. blocks of block_tokens tokens each. step_tokens: budget of one step.

    checkpoints: of recurrent state; None for a target that has none, 0: it has, but nothing of it is cached.
    """

    slots: int
    blocks: int
    block_tokens: int
    step_tokens: int
    max_waiting: int
    prefix_cache: bool = True
    checkpoints: int | None = None


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


class Scheduler:
    """Use: add, plan, (forward), commit, plan, ... A request may be removed between a commit and the next plan."""

    def __init__(self, limits: SchedulerLimits):
        self.limits = limits
        self.cache = PrefixCache(
            limits.blocks, limits.block_tokens, enabled=limits.prefix_cache, checkpoints=limits.checkpoints
        )
        self.pool = self.cache.pool
        self.preemptions = 0
        self.step = 0
        self._arrivals = 0
        self._requests: dict[Key, RunningRequest] = {}
        self._waiting: list[RunningRequest] = []
        self._prefilling: list[RunningRequest] = []
        self._decoding: list[RunningRequest] = []
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._planned: list[tuple[RunningRequest, VerifyRow | PrefillChunk]] = []
        self._decided: list[tuple[int, int]] = []
        self._released: list[int] = []
        self._saved: dict[int, tuple[int, int]] = {}  # checkpoint -> slot, kept: what is saved last counts

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._requests) - len(self._waiting)

    def counters(self) -> dict[str, float]:
        """For Status; totals since the start, save for what is in use now."""
        return {"preemptions": float(self.preemptions), **self.cache.counters()}

    def __contains__(self, key: Key) -> bool:
        return key in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def requests(self) -> list[RunningRequest]:
        return list(self._requests.values())

    def sink_of(self, key: Key) -> Any:
        """None if the request is not here."""
        sequence = self._requests.get(key)
        return sequence.sink if sequence is not None else None

    def add(self, request: EngineRequest, sink: Any = None, shaping: Any = None) -> RunningRequest:
        """Queue a valid, new request. Raises OverloadedError if max_waiting others wait for whom no slot is free."""
        if len(self._waiting) - len(self._free_slots) >= self.limits.max_waiting:
            raise OverloadedError(
                f"{len(self._requests) - len(self._waiting)} requests run and {len(self._waiting)} wait, which is the "
                f"limit (max_waiting {self.limits.max_waiting}): try again later"
            )
        self._arrivals += 1
        sequence = RunningRequest(request, (request.priority, self._arrivals), sink, shaping)
        self._requests[sequence.key] = sequence
        insort(self._waiting, sequence, key=_order)
        return sequence

    def remove(self, key: Key) -> RunningRequest | None:
        """Take a request out, wherever it stands, and free what it held. None if it is not here."""
        sequence = self._requests.pop(key, None)
        if sequence is not None:
            if sequence.slot < 0:
                self._waiting.remove(sequence)
            else:
                self._vacate(sequence)
        return sequence

    def plan(self) -> StepPlan:
        """The next step. Takes over the drafts of the requests that it verifies; without work it is a heartbeat."""
        assert not self._planned, "the step before was never committed"
        self.step += 1
        new_blocks: list[tuple[int, int]] = []
        restored: list[tuple[int, int]] = []
        verify = self._plan_verify(self._budget_for_verify(), new_blocks)
        used = sum(len(row.token_ids) for row in verify)
        self._enter(new_blocks, restored)
        prefill = self._plan_prefill(self.limits.step_tokens - used)
        decided, released = tuple(self._decided), tuple(self._released)
        saved = tuple((slot, kept, checkpoint) for checkpoint, (slot, kept) in self._saved.items())
        self._decided, self._released, self._saved = [], [], {}
        return StepPlan(
            step=self.step,
            verify=tuple(verify),
            prefill=tuple(prefill),
            new_blocks=tuple(new_blocks),
            released=released,
            decided=decided,
            saved=saved,
            restored=tuple(restored),
            heartbeat=not verify and not prefill,
        )

    @property
    def planned(self) -> Sequence[tuple[RunningRequest, VerifyRow | PrefillChunk]]:
        """The planned step's rows with their requests, in order; a new list every step."""
        return self._planned

    def sampled_rows(self) -> list[SampledRows]:
        """Of the planned step, for the requests whose token is not just the best one."""
        if all(sequence.plain for sequence, _ in self._planned):
            return []
        found = []
        row = 0
        for sequence, work in self._planned:
            count = len(work.token_ids)
            if isinstance(work, VerifyRow):
                if not sequence.plain:
                    found.append(SampledRows(sequence, row, count, work.start + 1, work.token_ids[1:]))
            else:
                position, count = work.start + count, int(work.completes_prompt)
                if count and not sequence.plain:
                    found.append(SampledRows(sequence, row, count, position))
            row += count
        return found

    def commit(self, samples: Sequence[int]) -> list[Progress]:
        """Apply the planned step's outcome. samples: the target's own token for each row of its logits, in order.

        A negative sample stands for no token at all: its request finishes with "error".
        """
        done: list[Progress] = []
        row = logit_row = 0
        verify_only = True
        for sequence, work in self._planned:
            count = len(work.token_ids)
            if isinstance(work, VerifyRow):
                progress = self._commit_verify(sequence, work, samples, row, logit_row)
                logit_row += count
            else:
                verify_only = False
                progress = self._commit_chunk(sequence, work, samples, row, logit_row)
                logit_row += work.completes_prompt
            row += count
            done.append(progress)
            if progress.finish is not None:
                del self._requests[sequence.key]
                if progress.finish == "error":
                    self.cache.disown(sequence)
                self._vacate(sequence)
        if not verify_only:
            self._promote()
        self._planned = []
        return done

    # Verify rows.

    def _budget_for_verify(self) -> int:
        budget = self.limits.step_tokens
        if not self._prefilling and not (self._waiting and self._free_slots):
            return budget
        pending = sum(len(s.tokens) - s.computed for s in (*self._prefilling, *self._waiting[: len(self._free_slots)]))
        return budget - min(pending, budget // PREFILL_SHARE)

    def _plan_verify(self, budget: int, new_blocks: list[tuple[int, int]]) -> list[VerifyRow]:
        chosen = self._decoding
        if len(chosen) > budget:  # those that waited longest, in order
            chosen = sorted(sorted(chosen, key=lambda s: (s.last_step, s.order))[:budget], key=_order)
        block_tokens = self.limits.block_tokens
        for sequence in list(chosen):
            if sequence.slot >= 0 and sequence.computed >= len(sequence.blocks) * block_tokens:
                self._need_block(sequence, new_blocks)
        rows: list[VerifyRow] = []
        spare = budget - len(chosen)
        for sequence in chosen:
            if sequence.slot < 0:
                continue
            drafts = self._affordable(sequence, spare, new_blocks) if sequence.drafts else ()
            spare -= len(drafts)
            row = VerifyRow(sequence.slot, sequence.computed, (sequence.tokens[-1], *drafts))
            sequence.drafts = ()
            sequence.last_step = self.step
            rows.append(row)
            self._planned.append((sequence, row))
        return rows

    def _need_block(self, sequence: RunningRequest, new_blocks: list[tuple[int, int]]) -> None:
        """One more block for a decoding request, if need be from the last in order, which may be itself."""
        while not self.pool.free:
            victim = max((*self._decoding, *self._prefilling), key=_order)
            self._preempt(victim)
            if victim is sequence:
                return
        self._grow(sequence, 1, new_blocks)

    def _affordable(self, sequence: RunningRequest, spare: int, new_blocks: list[tuple[int, int]]) -> tuple[int, ...]:
        """As many drafts as budget, output limit and free blocks allow: nobody is preempted for drafts."""
        count = min(len(sequence.drafts), spare, sequence.remaining - 1)
        if count <= 0:
            return ()
        block_tokens = self.limits.block_tokens
        room = len(sequence.blocks) * block_tokens - sequence.computed - 1
        if count > room:
            blocks = min(-(-(count - room) // block_tokens), self.pool.free)
            self._grow(sequence, blocks, new_blocks)
            count = min(count, room + blocks * block_tokens)
        return sequence.drafts[:count]

    def _commit_verify(
        self, sequence: RunningRequest, work: VerifyRow, samples: Sequence[int], row: int, logit_row: int
    ) -> Progress:
        accepted = accepted_drafts(work.token_ids, samples, logit_row)
        kept = accepted + 1
        progress = Progress(sequence, row, work.start, kept, logit_row, drafted=len(work.token_ids) - 1)
        sequence.computed += kept
        self._decided.append((work.slot, kept))
        self._extend(progress, samples[logit_row : logit_row + kept])
        if sequence.computed >= sequence.name_at and progress.finish != "error" and self.cache.name(sequence):
            checkpoint = self.cache.move_checkpoint(sequence)
            if checkpoint is not None:
                boundary = sequence.named * self.limits.block_tokens
                self._saved[checkpoint] = (work.slot, boundary - work.start)
        progress.matched, progress.accepted = accepted, min(accepted, len(progress.token_ids))
        return progress

    def _extend(self, progress: Progress, tokens: Sequence[int]) -> None:
        sequence = progress.sequence
        request = sequence.request
        count, progress.finish = cut(
            tokens, sequence.generated, request.stop_token_ids, request.min_new_tokens, request.max_new_tokens
        )
        progress.token_ids = list(tokens[:count])
        if progress.token_ids[-1] < 0:  # drafts are never negative, so that it can only be the last
            progress.token_ids.pop()
            progress.finish = "error"
        sequence.tokens.extend(progress.token_ids)

    # Prefill.

    def _enter(self, new_blocks: list[tuple[int, int]], restored: list[tuple[int, int]]) -> None:
        """Waiting requests take slots and blocks, in order; none passes one for which there is no room."""
        deferred = 0
        for sequence in self._waiting[: len(self._free_slots) + DEFERRED]:
            hit = self.cache.match(sequence)
            if not self._free_slots or not self._fits(sequence, hit):
                return
            if self.cache.is_coming(sequence, hit):
                deferred += 1
                if deferred > DEFERRED:
                    return
                continue
            self._waiting.remove(sequence)
            sequence.slot = self._free_slots.pop()
            checkpoint = self.cache.enter(sequence, hit)
            if checkpoint is not None:
                restored.append((sequence.slot, checkpoint))
            new_blocks.extend((sequence.slot, block) for block in sequence.blocks)
            self._grow(sequence, self._blocks_for(len(sequence.tokens)) - len(sequence.blocks), new_blocks)
            insort(self._prefilling, sequence, key=_order)

    def _plan_prefill(self, budget: int) -> list[PrefillChunk]:
        if budget <= 0 or not self._prefilling:
            return []
        prompts = [Prompt(s.request.priority, len(s.tokens) - s.computed) for s in self._prefilling]
        chunks: list[PrefillChunk] = []
        for sequence, share in zip(self._prefilling, prefill_shares(prompts, budget)):
            if share:
                self._plan_chunks(sequence, sequence.computed + share, chunks)
        return chunks

    def _plan_chunks(self, sequence: RunningRequest, stop: int, chunks: list[PrefillChunk]) -> None:
        """Up to `stop`, in pieces that end where a checkpoint is to be taken."""
        start, total = sequence.computed, len(sequence.tokens)
        if self.limits.checkpoints and stop < total:
            aligned = stop - stop % self.limits.block_tokens  # a state between blocks is no good for a checkpoint
            stop = aligned if aligned > start else stop
        while start < stop:
            while sequence.splits and sequence.splits[0] <= start:  # went by while there was no checkpoint to take
                sequence.splits.pop(0)
            end, checkpoint = stop, -1
            if sequence.splits and sequence.splits[0] <= stop:
                taken = self.cache.checkpoints.take()
                split = sequence.splits.pop(0)
                if taken is not None:
                    end, checkpoint = split, taken
            chunk = PrefillChunk(sequence.slot, start, tuple(sequence.tokens[start:end]), end == total, checkpoint)
            chunks.append(chunk)
            self._planned.append((sequence, chunk))
            start = end

    def _commit_chunk(
        self, sequence: RunningRequest, work: PrefillChunk, samples: Sequence[int], row: int, logit_row: int
    ) -> Progress:
        progress = Progress(sequence, row, work.start, len(work.token_ids))
        sequence.computed += len(work.token_ids)
        if work.completes_prompt:
            progress.logit_row = logit_row
            self._extend(progress, samples[logit_row : logit_row + 1])
        if sequence.computed >= sequence.name_at and progress.finish != "error":
            self.cache.name(sequence)
        if work.checkpoint >= 0:
            self.cache.keep_checkpoint(sequence, work.checkpoint, sequence.computed)
        return progress

    def _fits(self, sequence: RunningRequest, hit: Hit) -> bool:
        """With a block to spare for every running request: entering only to be preempted at once wastes a prefill."""
        running = len(self._decoding) + len(self._prefilling)
        fresh = self._blocks_for(len(sequence.tokens)) - len(hit.blocks)
        return fresh + running <= self.pool.free - hit.unused

    def _promote(self) -> None:
        """Requests whose prompt is complete now decode."""
        ready = [s for s in self._prefilling if s.computed == len(s.tokens) - 1]
        if ready:
            self._prefilling = [s for s in self._prefilling if s.computed != len(s.tokens) - 1]
            for sequence in ready:
                insort(self._decoding, sequence, key=_order)

    # Slots and blocks.

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    def _grow(self, sequence: RunningRequest, count: int, new_blocks: list[tuple[int, int]]) -> None:
        blocks = self.pool.allocate(count)
        sequence.blocks.extend(blocks)
        new_blocks.extend((sequence.slot, block) for block in blocks)

    def _preempt(self, sequence: RunningRequest) -> None:
        self.preemptions += 1
        if sequence in self._prefilling:
            checkpoint = self.cache.save_before_leaving(sequence)
            if checkpoint is not None:
                self._saved[checkpoint] = (sequence.slot, 0)
        self._vacate(sequence)
        sequence.drafts = ()
        insort(self._waiting, sequence, key=_order)

    def _vacate(self, sequence: RunningRequest) -> None:
        (self._decoding if sequence in self._decoding else self._prefilling).remove(sequence)
        self.cache.leave(sequence)
        self._released.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1


def _order(sequence: RunningRequest) -> tuple[int, int]:
    return sequence.order
