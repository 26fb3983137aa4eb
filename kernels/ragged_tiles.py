"""What attention kernels over a ragged PagedBatch share: whose tile a program has, how contexts are cut into sections,
and the sum over them.

Contexts are cut in one of two ways. At fixed multiples of `split_tokens`: a row's sums then depend on its own context
alone. Or `spread`: each request's context into equal parts, as many as it takes to fill the device, however long it is
(its length is read on the device, so that a captured launch fits every context).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.paged_batch import PagedBatch

MULTIPROCESSORS = 132  # of an H100 or H200
LEAST_TILES = tl.constexpr(4)  # of a section that is one of equal parts: less is not worth a program


def sections(batch: PagedBatch, programs: int, tile_tokens: int, split_tokens: int | None, spread: int) -> int:
    """Into how many sections contexts are cut at most; 0: they are not, and no partial sums are kept.

    programs: of the launch without sections. spread: of them, how many a multiprocessor can run side by side; 0: never
    cut into equal parts. Whether contexts are cut does not depend on their length: that would be one more form of a
    kernel to compile while a request waits.
    """
    if split_tokens is not None:
        return max(1, -(-batch.longest_context // split_tokens))
    fill = MULTIPROCESSORS * spread // programs
    return max(1, min(fill, -(-batch.longest_context // (LEAST_TILES.value * tile_tokens)))) if fill > 1 else 0


def add_sections(
    output: torch.Tensor,
    part: torch.Tensor,
    peak: torch.Tensor,
    mass: torch.Tensor,
    batch: PagedBatch,
    group: int,
    sinks: torch.Tensor | None = None,
    *,
    split_tokens: int | None,
    tile_tokens: int,
    window: int | None = None,
) -> None:
    """output [tokens, heads, width], contiguous: the sections' softmaxes as one, sinks [heads] included.

    Of each section, float32: part [splits, tokens, heads, width], what its values add up to when weighed by
    2 ** (score - peak); peak and mass [splits, tokens, heads], the highest score and the weights' sum. Scores are in
    units of log 2. Sections are added in order, `group` heads to a program; those that a row cannot see are not read.
    """
    splits, tokens, heads, width = part.shape
    _add_sections[(tokens, heads // group)](
        *(output, part, peak, mass, output if sinks is None else sinks, batch.query_starts, batch.context_lengths),
        *(batch.requests, tokens, splits),
        SPLIT=split_tokens or 0,
        TILE_TOKENS=tile_tokens,
        WINDOW=window or 0,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=width,
        BLOCK_DIM=triton.next_power_of_2(width),
        BLOCK_GROUP=triton.next_power_of_2(group),
        SINKS=sinks is not None,
        num_warps=min(8, triton.next_power_of_2(max(1, group * width // 256))),
    )


@triton.jit
def request_of(query_starts, requests, tile, TILE_ROWS: tl.constexpr):
    """The request that tile number `tile` belongs to; request r's tiles begin at query_starts[r] // TILE_ROWS + r."""
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        begins = tl.load(query_starts + middle) // TILE_ROWS + middle
        if begins <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def section_tokens(context, splits, SPLIT: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Of one section of a context: SPLIT, or with 0 an equal part of it in whole tiles."""
    if SPLIT > 0:
        size = SPLIT
    else:
        size = tl.maximum(tl.cdiv(tl.cdiv(context, splits), TILE_TOKENS), LEAST_TILES) * TILE_TOKENS
    return size


@triton.jit(do_not_specialize=["requests", "tokens", "splits"])
def _add_sections(
    output,
    part,
    peak,
    mass,
    sinks,
    query_starts,
    context_lengths,
    requests,
    tokens,
    splits,
    SPLIT: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One program a query row and KV head: its sections in order."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    token = tl.program_id(0).to(tl.int64)
    low = 0  # the last request that begins at or before the row
    high = requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) <= token:
            low = middle + 1
        else:
            high = middle
    end = tl.load(query_starts + low)
    if token >= end:
        return  # padding
    context = tl.load(context_lengths + low - 1)
    position = (context - (end - token)).to(tl.int32)
    size = section_tokens(context, splits, SPLIT, TILE_TOKENS)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // size
    within = tl.arange(0, BLOCK_GROUP)
    valid = within < GROUP
    head = tl.program_id(1) * GROUP + within
    dim = tl.arange(0, BLOCK_DIM)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    top = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        total = total + 1.0
    seen = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for split in tl.range(first, position // size + 1, num_stages=4):
        cell = (tl.cast(split, tl.int64) * tokens + token) * HEADS + head
        own_top = tl.load(peak + cell, mask=valid, other=0.0)
        own_total = tl.load(mass + cell, mask=valid, other=1.0)
        own = tl.load(part + cell[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, own_top)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        keep = tl.exp2(top - shift)
        joins = tl.exp2(own_top - shift)
        total = total * keep + own_total * joins
        seen = seen * keep[:, None] + own * joins[:, None]
        top = higher
    where = output + (token * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(where, (seen / total[:, None]).to(output.dtype.element_ty), mask=mask)
