"""A StepPlan as one int64 tensor, and how rank 0 tells it to the other ranks.

Layout: [length, step, flags, verify rows, prefill chunks, new blocks, releases, decisions, saves, restores, draws,
shown],
then (slot, start, tokens) of each verify row, (slot, start, tokens, completes_prompt, checkpoint) of each chunk, all
their token ids in that order, and the numbers of the rest: pairs of new blocks and decisions, triples of saves, pairs
of restores, (row, count, position, seed, choice, top_k, bits of temperature, top_p and min_p) of each draw, (row,
count, late) of shown rows, released slots.
"""

from __future__ import annotations

import struct

import torch
import torch.distributed as dist

from cluster.contracts import SamplingParams
from verifier_service.plan import PrefillChunk, RowDraw, ShownRows, StepPlan, VerifyRow

HEADER = 12
FIRST_WORDS = 2048  # 16 KiB: what nearly every plan fits in
_HEARTBEAT, _STOP, _AHEAD, _DRAWS = 1, 2, 4, 8


def pack(plan: StepPlan) -> torch.Tensor:
    """int64 [words], on the CPU."""
    flags = plan.heartbeat * _HEARTBEAT | plan.stop * _STOP | plan.ahead * _AHEAD | (plan.draws is not None) * _DRAWS
    draws = plan.draws or ()
    words = [0, plan.step, flags]
    words += [len(part) for part in (plan.verify, plan.prefill, plan.new_blocks, plan.released, plan.decided)]
    words += (len(plan.saved), len(plan.restored), len(draws), len(plan.shown))
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
    for draw in draws:
        words += (draw.row, draw.count, draw.position, draw.seed, draw.choice, *_params(draw.params))
    for rows in plan.shown:
        words += (rows.row, rows.count, rows.late)
    words += plan.released
    words[0] = len(words)
    return torch.tensor(words, dtype=torch.int64)


def unpack(packed: torch.Tensor) -> StepPlan:
    """The plan that was packed. Words beyond its length are ignored."""
    words = packed.tolist()
    _, step, flags, rows, chunks, blocks, released, decided, saved, restored, draws, shown = words[:HEADER]
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
    drawn = tuple(_unpacked_draw(take(9)) for _ in range(draws))
    seen = tuple(ShownRows(row, count, bool(late)) for row, count, late in (take(3) for _ in range(shown)))
    return StepPlan(
        step=step,
        verify=verify,
        prefill=prefill,
        new_blocks=new_blocks,
        released=tuple(take(released)),
        decided=decisions,
        saved=saves,
        restored=restores,
        draws=drawn if flags & _DRAWS else None,
        shown=seen,
        ahead=bool(flags & _AHEAD),
        heartbeat=bool(flags & _HEARTBEAT),
        stop=bool(flags & _STOP),
    )


def _params(params: SamplingParams) -> tuple[int, ...]:
    return params.top_k, *struct.unpack("3q", struct.pack("3d", params.temperature, params.top_p, params.min_p))


def _unpacked_draw(words: list[int]) -> RowDraw:
    row, count, position, seed, choice, top_k, *bits = words
    temperature, top_p, min_p = struct.unpack("3d", struct.pack("3q", *bits))
    return RowDraw(row, count, position, seed, choice, SamplingParams(temperature, top_p, top_k, min_p=min_p))


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
