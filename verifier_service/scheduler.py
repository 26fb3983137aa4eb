"""Who gets what in the next step: pure policy over slots, KV blocks and a token budget. No torch.

First come, first served within a priority. A step holds one verify row for every decoding request, their drafts, and
prefill chunks in what is left of the budget, divided as prefill_shares says. Who enters, and who gives way when blocks
run out, is `seats`' to say: a request that gave way is prefilled again later, its output kept as it was (the same path
by which a request resumes on another engine).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.contracts import EngineRequest
from cluster.errors import OverloadedError
from verifier_service.acceptance import accepted_drafts, cut, still_to_come
from verifier_service.flight import Flight, Planned, certain
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow
from verifier_service.prefill_shares import Prompt, prefill_shares
from verifier_service.prefix_cache import PrefixCache
from verifier_service.seats import Seats, order_of
from verifier_service.sequence import Key, Progress, RunningRequest

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


class Scheduler:
    """Use: add, plan, (forward), commit, plan, ...; or, a step ahead: plan, plan_ahead, commit, plan_ahead, commit, ...

    A request may be removed between two of these calls.
    """

    def __init__(self, limits: SchedulerLimits):
        self.limits = limits
        self.cache = PrefixCache(
            limits.blocks, limits.block_tokens, enabled=limits.prefix_cache, checkpoints=limits.checkpoints
        )
        self.pool = self.cache.pool
        self.step = 0
        self._arrivals = 0
        self._requests: dict[Key, RunningRequest] = {}
        self._seats = Seats(limits.slots, limits.block_tokens, self.cache)
        self._flights: deque[Flight] = deque()  # planned and not committed, the oldest first
        self._decided: list[tuple[int, int]] = []

    @property
    def waiting(self) -> int:
        return len(self._seats.waiting)

    @property
    def running(self) -> int:
        return len(self._requests) - self.waiting

    @property
    def preemptions(self) -> int:
        return self._seats.preemptions

    def counters(self) -> dict[str, float]:
        """For Status; totals since the start, save for what is in use now."""
        return {"preemptions": float(self._seats.preemptions), **self.cache.counters()}

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
        if self.waiting - self._seats.free_slots >= self.limits.max_waiting:
            raise OverloadedError(
                f"{self.running} requests run and {self.waiting} wait, which is the limit "
                f"(max_waiting {self.limits.max_waiting}): try again later"
            )
        self._arrivals += 1
        sequence = RunningRequest(request, (request.priority, self._arrivals), sink, shaping)
        self._requests[sequence.key] = sequence
        self._seats.queue(sequence)
        return sequence

    def remove(self, key: Key) -> RunningRequest | None:
        """Take a request out, wherever it stands, and free what it held. None if it is not here."""
        sequence = self._requests.pop(key, None)
        if sequence is not None:
            self._seats.leave(sequence)
        return sequence

    def plan(self) -> StepPlan:
        """The next step. Takes over the drafts of the requests that it verifies; without work it is a heartbeat."""
        assert not self._flights, "the step before was never committed"
        return self._plan(self._seats.decoding)

    def plan_ahead(self) -> StepPlan | None:
        """The step after the planned one, before that one is committed. None: its outcome has to be known first.

        A request that goes on unless the planned step ends it gets a row, which comes to nothing if that is so.
        """
        (flight,) = self._flights
        if not certain(flight.work):
            return None
        if not flight.counted:
            self._count(flight)
        going = [s for s in self._seats.decoding if s.remaining > s.computed + 1 - len(s.tokens)]
        if not going and not self._seats.prefilling:
            return None
        if any(s.drafts and s.computed == len(s.tokens) for s in going):
            return None  # whether they follow its next token is not known
        block_tokens = self.limits.block_tokens
        if sum(s.computed >= len(s.blocks) * block_tokens for s in going) > self.pool.free:
            return None  # nobody gives way before it is known who has ended
        return self._plan(going, ahead=True)

    def _plan(self, decoding: list[RunningRequest], ahead: bool = False) -> StepPlan:
        self.step += 1
        self._flights.append(Flight())
        verify = self._plan_verify(decoding, self._budget_for_verify())
        used = sum(len(row.token_ids) for row in verify)
        self._seats.enter()
        prefill = self._plan_prefill(self.limits.step_tokens - used)
        moves = self._seats.take_moves()
        decided, self._decided = tuple(self._decided), []
        return StepPlan(
            step=self.step,
            verify=tuple(verify),
            prefill=tuple(prefill),
            new_blocks=tuple(moves.new_blocks),
            released=tuple(moves.released),
            decided=decided,
            saved=tuple((slot, kept, checkpoint) for checkpoint, (slot, kept) in moves.saved.items()),
            restored=tuple(moves.restored),
            ahead=ahead,
            heartbeat=not verify and not prefill,
        )

    @property
    def planned(self) -> Planned:
        """Of the step planned last; a new list every step."""
        return self._flights[-1].work

    def commit(self, samples: Sequence[int]) -> list[Progress]:
        """Apply the outcome of the oldest step planned. samples: the target's own token for each row of its logits.

        A negative sample stands for no token at all: its request finishes with "error". Requests that have left since
        the step was planned make no progress.
        """
        flight = self._flights.popleft()
        counted = flight.counted
        samples = list(samples)
        done: list[Progress] = []
        row = logit_row = 0
        verify_only = True
        for sequence, work in flight.work:
            here = sequence.slot >= 0
            if isinstance(work, VerifyRow):
                rows = logits = len(work.token_ids)
                progress = self._commit_verify(sequence, work, samples, row, logit_row, counted) if here else None
            else:
                verify_only = False
                rows, logits = len(work.token_ids), int(work.completes_prompt)
                progress = self._commit_chunk(sequence, work, samples, row, logit_row, counted) if here else None
            row += rows
            logit_row += logits
            if progress is None:
                if not counted:
                    self._abandon(work)
                continue
            done.append(progress)
            if progress.finish is not None:
                del self._requests[sequence.key]
                if progress.finish == "error":
                    self.cache.disown(sequence)
                self._seats.leave(sequence)
        if not verify_only and not counted:
            self._seats.promote()
        return done

    def _count(self, flight: Flight) -> None:
        """How far a step takes its requests, before its tokens are known."""
        flight.counted = True
        row = 0
        for sequence, work in flight.work:
            sequence.awaited = row
            row += len(work.token_ids) if isinstance(work, VerifyRow) else work.completes_prompt
            if sequence.slot < 0:
                self._abandon(work)
            elif isinstance(work, VerifyRow):
                sequence.computed += 1
                self._decided.append((work.slot, 1))
                if sequence.computed >= sequence.name_at:
                    self._name(sequence, work)
            else:
                self._keep_chunk(sequence, work)
        self._seats.promote()

    def _abandon(self, work: VerifyRow | PrefillChunk) -> None:
        """Its request has left; the ranks compute it all the same."""
        if isinstance(work, VerifyRow):
            self._decided.append((work.slot, 1))
        elif work.checkpoint >= 0:
            self.cache.checkpoints.give_back(work.checkpoint)

    # Verify rows.

    def _budget_for_verify(self) -> int:
        budget = self.limits.step_tokens
        seats = self._seats
        if not seats.prefilling and not (seats.waiting and seats.free_slots):
            return budget
        pending = sum(len(s.tokens) - s.computed for s in (*seats.prefilling, *seats.waiting[: seats.free_slots]))
        return budget - min(pending, budget // PREFILL_SHARE)

    def _plan_verify(self, chosen: list[RunningRequest], budget: int) -> list[VerifyRow]:
        if len(chosen) > budget:  # those that waited longest, in order
            chosen = sorted(sorted(chosen, key=lambda s: (s.last_step, s.order))[:budget], key=order_of)
        block_tokens = self.limits.block_tokens
        for sequence in list(chosen):
            if sequence.slot >= 0 and sequence.computed >= len(sequence.blocks) * block_tokens:
                self._seats.need_block(sequence)
        rows: list[VerifyRow] = []
        planned = self._flights[-1].work
        spare = budget - len(chosen)
        for sequence in chosen:
            if sequence.slot < 0:
                continue
            tokens, computed, drafts = sequence.tokens, sequence.computed, sequence.drafts
            bonus = tokens[-1] if computed < len(tokens) else -1 - sequence.awaited
            if drafts:
                drafts = self._affordable(sequence, spare)
                spare -= len(drafts)
                sequence.drafts = ()
            row = VerifyRow(sequence.slot, computed, (bonus, *drafts))
            sequence.last_step = self.step
            rows.append(row)
            planned.append((sequence, row))
        return rows

    def _affordable(self, sequence: RunningRequest, spare: int) -> tuple[int, ...]:
        """As many drafts as budget, output limit and free blocks allow: nobody is preempted for drafts."""
        drafts = sequence.drafts
        count = len(drafts)
        most = min(spare, sequence.longest - len(sequence.tokens) - 1)
        block_tokens = self.limits.block_tokens
        room = len(sequence.blocks) * block_tokens - sequence.computed - 1
        if count <= most and count <= room:
            return drafts
        count = min(count, most)
        if count <= 0:
            return ()
        if count > room:
            blocks = min(-(-(count - room) // block_tokens), self.pool.free)
            self._seats.grow(sequence, blocks)
            count = min(count, room + blocks * block_tokens)
        return drafts[:count]

    def _commit_verify(
        self, sequence: RunningRequest, work: VerifyRow, samples: list[int], row: int, logit_row: int, counted: bool
    ) -> Progress:
        ids = work.token_ids
        accepted = accepted_drafts(ids, samples, logit_row) if len(ids) > 1 else 0
        kept = accepted + 1
        tokens = samples[logit_row : logit_row + kept]
        progress = Progress(sequence, row, work.start, kept, logit_row, tokens, len(ids) - 1, accepted)
        if not counted:
            sequence.computed += kept
            self._decided.append((work.slot, kept))
        self._extend(progress)
        if not counted and progress.finish != "error" and sequence.computed >= sequence.name_at:
            self._name(sequence, work)
        progress.accepted = min(accepted, len(tokens))
        return progress

    def _name(self, sequence: RunningRequest, work: VerifyRow) -> None:
        """Its blocks that are full now, of which there is one at least."""
        if self.cache.name(sequence):
            checkpoint = self.cache.move_checkpoint(sequence)
            if checkpoint is not None:
                boundary = sequence.named * self.limits.block_tokens
                self._seats.save(checkpoint, work.slot, boundary - work.start)

    def _extend(self, progress: Progress) -> None:
        """By its token_ids, which lose what comes after the output's end."""
        sequence, tokens = progress.sequence, progress.token_ids
        request = sequence.request
        if request.stop_token_ids or len(sequence.tokens) + len(tokens) >= sequence.longest:
            count, progress.finish = cut(
                tokens, sequence.generated, request.stop_token_ids, request.min_new_tokens, request.max_new_tokens
            )
            del tokens[count:]
        if tokens[-1] < 0:  # drafts are never negative, so that it can only be the last
            tokens.pop()
            progress.finish = "error"
        sequence.tokens += tokens
        if sequence.drafts:  # they came while this step was under way
            sequence.drafts = still_to_come(sequence.drafts, tokens)

    # Prefill.

    def _plan_prefill(self, budget: int) -> list[PrefillChunk]:
        if budget <= 0 or not self._seats.prefilling:
            return []
        prompts = [Prompt(s.request.priority, len(s.tokens) - s.computed) for s in self._seats.prefilling]
        chunks: list[PrefillChunk] = []
        for sequence, share in zip(self._seats.prefilling, prefill_shares(prompts, budget)):
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
            self._flights[-1].work.append((sequence, chunk))
            start = end

    def _commit_chunk(
        self,
        sequence: RunningRequest,
        work: PrefillChunk,
        samples: list[int],
        row: int,
        logit_row: int,
        counted: bool,
    ) -> Progress:
        progress = Progress(sequence, row, work.start, len(work.token_ids))
        if work.completes_prompt:
            progress.logit_row, progress.token_ids = logit_row, [samples[logit_row]]
            self._extend(progress)
        if not counted:
            self._keep_chunk(sequence, work, good=progress.finish != "error")
        return progress

    def _keep_chunk(self, sequence: RunningRequest, work: PrefillChunk, good: bool = True) -> None:
        sequence.computed += len(work.token_ids)
        if good and sequence.computed >= sequence.name_at:
            self.cache.name(sequence)
        if work.checkpoint >= 0:
            self.cache.keep_checkpoint(sequence, work.checkpoint, sequence.computed)
