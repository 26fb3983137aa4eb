"""A StepPlan as one int64 tensor, and how rank 0 tells it to the other ranks.

Layout: [length, step, flags, verify rows, prefill chunks, new blocks, releases, decisions, saves, restores], then
(slot, start, tokens) of each verify row, (slot, start, tokens, completes_prompt, checkpoint) of each chunk, all their
token ids in that order, and the numbers of the rest: pairs of new blocks and decisions, triples of saves, pairs of
restores, released slots.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

HEADER = 10
FIRST_WORDS = 2048  # 16 KiB: what nearly every plan fits in
_HEARTBEAT, _STOP, _AHEAD = 1, 2, 4


def pack(plan: StepPlan) -> torch.Tensor:
    """int64 [words], on the CPU."""
    words = [0, plan.step, plan.heartbeat * _HEARTBEAT | plan.stop * _STOP | plan.ahead * _AHEAD]
    words += [len(part) for part in (plan.verify, plan.prefill, plan.new_blocks, plan.released, plan.decided)]
    words += (len(plan.saved), len(plan.restored))
    for row in plan.verify:
        words += (row.slot, row.start, len(row.token_ids))
    for chunk in plan.prefill:
        words += (chunk.slot, chunk.start, len(chunk.token_ids), chunk.completes_prompt, chunk.checkpoint)
    for row in plan.verify:
        words += row.token_ids
    for chunk in plan.prefill:
        words += chunk.token_ids
    for numbers in (*plan.new_blocks, *plan.decided, *plan.saved, *plan.restored):
        words += numbers
    words += plan.released
    words[0] = len(words)
    return torch.tensor(words, dtype=torch.int64)


def unpack(packed: torch.Tensor) -> StepPlan:
    """The plan that was packed. Words beyond its length are ignored."""
    words = packed.tolist()
    _, step, flags, rows, chunks, blocks, released, decided, saved, restored = words[:HEADER]
    at = HEADER

    def take(count: int) -> list[int]:
        nonlocal at
        at += count
        return words[at - count : at]

    row_heads = [take(3) for _ in range(rows)]
    chunk_heads = [take(5) for _ in range(chunks)]
    verify = tuple(VerifyRow(slot, start, tuple(take(count))) for slot, start, count in row_heads)
    prefill = tuple(
        PrefillChunk(slot, start, tuple(take(count)), bool(completes), checkpoint)
        for slot, start, count, completes, checkpoint in chunk_heads
    )
    new_blocks = tuple((slot, block) for slot, block in (take(2) for _ in range(blocks)))
    decisions = tuple((slot, kept) for slot, kept in (take(2) for _ in range(decided)))
    saves = tuple((slot, kept, checkpoint) for slot, kept, checkpoint in (take(3) for _ in range(saved)))
    restores = tuple((slot, checkpoint) for slot, checkpoint in (take(2) for _ in range(restored)))
    return StepPlan(
        step=step,
        verify=verify,
        prefill=prefill,
        new_blocks=new_blocks,
        released=tuple(take(released)),
        decided=decisions,
        saved=saves,
        restored=restores,
        ahead=bool(flags & _AHEAD),
        heartbeat=bool(flags & _HEARTBEAT),
        stop=bool(flags & _STOP),
    )


class PlanChannel:
    """Plans from rank 0 to all ranks of `group`; None = a single rank, nothing to tell.

    One broadcast of FIRST_WORDS words, and a second for a plan that is longer. Plans travel on the CPU. Both calls
    raise RuntimeError when a rank is gone or the group's timeout has passed.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self._first = torch.zeros(FIRST_WORDS, dtype=torch.int64)

    def send(self, plan: StepPlan) -> None:
        if self._group is None:
            return
        packed = pack(plan)
        head = packed[:FIRST_WORDS]
        self._first[: len(head)] = head
        self._broadcast(self._first)
        if len(packed) > FIRST_WORDS:
            self._broadcast(packed[FIRST_WORDS:].contiguous())

    def receive(self) -> StepPlan:
        self._broadcast(self._first)
        length = int(self._first[0])
        if length <= FIRST_WORDS:
            return unpack(self._first[:length])
        rest = torch.empty(length - FIRST_WORDS, dtype=torch.int64)
        self._broadcast(rest)
        return unpack(torch.cat([self._first, rest]))

    def _broadcast(self, words: torch.Tensor) -> None:
        assert self._group is not None, "a single rank has nobody to talk to"
        self._group.broadcast(words, 0).wait()  # the group's own call: a third of the time of dist.broadcast
