"""Steps of all kinds and sizes before the first request, so that no kernel is compiled while somebody waits.

A kernel is compiled once for each set of its constants. Those that change from step to step follow from how many rows
there are (tiles, sections of contexts, what meets the head) and from how their tokens are taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from cluster.contracts import SamplingParams
from verifier_service.model.face import Runner
from verifier_service.plan import PrefillChunk, RowDraw, StepPlan, VerifyRow
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.sampler import decide
from verifier_service.scheduler import SchedulerLimits

log = logging.getLogger(__name__)

PROGRESS_S = 10.0
KINDS = (SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.9, top_k=8))


@torch.inference_mode()
def warm_up(runner: Runner, limits: SchedulerLimits, longest_row: int) -> None:
    """Collective, before any other step. longest_row: tokens of a verify row. Leaves no request and no state behind."""
    plans = list(_plans(limits, runner.shape.max_context, longest_row))
    told = began = time.monotonic()
    for done, plan in enumerate(plans, 1):
        _run(runner, plan)
        if time.monotonic() - told > PROGRESS_S or done == len(plans):
            told = time.monotonic()
            log.info("ran %d of %d steps that serving will be made of after %.0f s", done, len(plans), told - began)


def _run(runner: Runner, plan: StepPlan) -> None:
    """Whole logits are wanted over kernels too: of rows that the host works on, or that something truncates."""
    logits = runner.forward(plan).logits
    rows = sum(len(row.token_ids) for row in plan.verify) + len(plan.prefill)
    for kind in KINDS if rows else ():
        if logits is not None:
            decide(logits, [Draw(0, rows, 1, 0, 0, kind)] if kind.temperature else ())
        if runner.shape.draws:
            again = replace(plan, released=(), new_blocks=(), decided=(), saved=())
            draws = (RowDraw(0, rows, 1, 0, 0, kind),) if kind.temperature else ()
            runner.forward(replace(again, draws=draws))


def _plans(limits: SchedulerLimits, max_context: int, longest_row: int) -> Iterator[StepPlan]:
    """Prefill, then verify, of 1, 2, 4, ... tokens and requests up to a step's most; each empties all slots first."""
    every = tuple(range(limits.slots))
    sizes = _doubling(limits.step_tokens)
    for parts in sorted({_divided(tokens, max_context, limits) for tokens in sizes}):
        chunks = tuple(PrefillChunk(slot, 0, (0,) * count, completes_prompt=True) for slot, count in enumerate(parts))
        yield StepPlan(0, released=every, new_blocks=_blocks(parts, limits), prefill=chunks)
    verified = {_divided(tokens, longest_row, limits) for tokens in sizes}
    for parts in sorted(verified | {_divided(requests, 1, limits) for requests in _doubling(limits.slots)}):
        rows = tuple(VerifyRow(slot, 0, (0,) * count) for slot, count in enumerate(parts))
        yield StepPlan(0, released=every, new_blocks=_blocks(parts, limits), verify=rows)
        yield StepPlan(0, decided=tuple((slot, 1) for slot in range(len(parts))))
    yield StepPlan(0, released=every)


def _doubling(last: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes


def _divided(tokens: int, longest: int, limits: SchedulerLimits) -> tuple[int, ...]:
    """Tokens of each slot, as many as there are slots and blocks for."""
    parts: list[int] = []
    blocks = limits.blocks
    while tokens and len(parts) < limits.slots:
        count = min(tokens, longest, blocks * limits.block_tokens)
        if not count:
            break
        parts.append(count)
        tokens, blocks = tokens - count, blocks - -(-count // limits.block_tokens)
    return tuple(parts)


def _blocks(parts: tuple[int, ...], limits: SchedulerLimits) -> tuple[tuple[int, int], ...]:
    slots = [slot for slot, count in enumerate(parts) for _ in range(-(-count // limits.block_tokens))]
    return tuple((slot, block) for block, slot in enumerate(slots))
