"""Block attention in Triton: one program for a block's rows with all query heads that share a KV head.

With the heads of a group packed beside the rows, a tile of keys and values is loaded once for all of them. The rows of
a context stand in any order, so what a block sees is decided by their positions: keys of a tile that none of its rows
may see (stale, or outside a sliding window) are never loaded.

A context is cut into sections at fixed multiples of `section_rows`; each is summed on its own and they are added up in
order. Who does that is a matter of speed alone: with `spread` each section is a program of its own and a second launch
adds them up (flash decoding, arXiv 2311.01282; best for few blocks), without it one program goes through them all. The
bits are the same, and with tiles that follow from the model's shape a block's result depends on nothing but itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.block_attention.batch import BlockBatch, check_arguments
from kernels.block_attention.reference import SECTION_ROWS


@dataclass(frozen=True)
class Tiling:
    """Score rows (block row x head of the group) and pool rows of a tile, and how the compiler runs it."""

    rows: int
    tokens: int
    warps: int
    stages: int


def tiling(head_dim: int, group: int, longest_block: int) -> Tiling:
    """Depends on the model alone, never on the batch: that is what makes results independent of it.

    Four warps to 64 rows, so that two programs fit on a multiprocessor: one loads while the other computes.
    """
    most = 128 if head_dim <= 128 else 64
    rows = max(min(most, max(16, triton.next_power_of_2(longest_block * group))), triton.next_power_of_2(group))
    return Tiling(rows=rows, tokens=64 if head_dim <= 128 else 32, warps=8 if rows >= 128 else 4, stages=3)


def block_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    positions: torch.Tensor,
    batch: BlockBatch,
    *,
    scaling: float,
    causal: bool = False,
    sliding_window: int | None = None,
    section_rows: int = SECTION_ROWS,
    spread: bool = True,
    tile: Tiling | None = None,
) -> torch.Tensor:
    """As kernels.block_attention.reference. query and pool of one dtype, query contiguous; accumulates in float32.

    section_rows: a multiple of the tile's tokens. Padding rows stay undefined. Raises ValueError for shapes that do not
    fit.
    """
    check_arguments(query, pool, positions, batch, sliding_window, section_rows)
    tokens, heads, head_dim = query.shape
    kv_heads = pool.shape[2]
    group = heads // kv_heads
    tile = tile or tiling(head_dim, group, batch.longest_block)
    if section_rows % tile.tokens:
        raise ValueError(f"section_rows is {section_rows}: want a multiple of the tile's {tile.tokens} tokens")
    sections = triton.cdiv(batch.longest_context + batch.longest_block, section_rows)
    spread = spread and sections > 1
    output = torch.empty_like(query)
    if spread:
        part = torch.empty(sections, tokens, heads, head_dim, dtype=torch.float32, device=query.device)
        peak, mass = torch.empty(2, sections, tokens, heads, dtype=torch.float32, device=query.device).unbind()
    else:
        part, peak, mass = output, output, output  # never written as such
    tiles = triton.cdiv(batch.longest_block, tile.rows // group)  # of a block
    _attend_block[(batch.blocks * tiles, kv_heads, sections if spread else 1)](
        *(query, pool, positions, output, part, peak, mass),
        *(batch.starts, batch.first_rows, batch.held, batch.bases, tokens, scaling),
        TILES=tiles,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        CAUSAL=causal,
        WINDOW=sliding_window or 0,
        SECTION=section_rows,
        SPREAD=spread,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if spread:
        _join_sections[(batch.blocks * batch.longest_block, kv_heads)](
            *(output, part, peak, mass, batch.starts, batch.held, tokens),
            LONGEST=batch.longest_block,
            HEADS=heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_DIM=triton.next_power_of_2(head_dim),
            BLOCK_GROUP=triton.next_power_of_2(group),
            SECTION=section_rows,
            num_warps=min(8, triton.next_power_of_2(max(1, group * head_dim // 256))),
        )
    return output


@triton.jit(do_not_specialize=["tokens"])
def _attend_block(
    query,
    pool,
    positions,
    output,
    part,
    peak,
    mass,
    starts,
    first_rows,
    held,
    bases,
    tokens,
    scaling,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SECTION: tl.constexpr,
    SPREAD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    TILE_ROWS: tl.constexpr = ROWS // GROUP
    block = tl.program_id(0) // TILES
    kv_head = tl.program_id(1)
    start = tl.load(starts + block)
    count = (tl.load(starts + block + 1) - start).to(tl.int32)
    first_row = (tl.program_id(0) % TILES) * TILE_ROWS
    if first_row >= count:
        return
    context = tl.load(held + block).to(tl.int32)
    last = context + count
    if SPREAD and tl.program_id(2) * SECTION >= last:
        return
    slot = tl.load(first_rows + block)
    base = tl.load(bases + block)

    packed = tl.arange(0, ROWS)
    row = first_row + packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    valid = (packed < TILE_ROWS * GROUP) & (row < count)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    vector = (start + row) * HEADS + head
    own = tl.load(query + vector[:, None] * HEAD_DIM + dim[None, :], mask=valid[:, None] & in_dim[None, :], other=0.0)
    here = pool + (slot * 2 * (HEADS // GROUP) + kv_head) * HEAD_DIM
    if SPREAD:
        section = tl.program_id(2)
        own_top, own_total, own_seen = _section(
            own, here, positions + slot, row, base, context, last, section, scaling, dim, in_dim,
            HEADS // GROUP, HEAD_DIM, CAUSAL, WINDOW, SECTION, ROWS, BLOCK_DIM, TOKENS,
        )  # fmt: skip
        cell = section.to(tl.int64) * tokens * HEADS + vector
        tl.store(peak + cell, own_top, mask=valid)
        tl.store(mass + cell, own_total, mask=valid)
        tl.store(part + cell[:, None] * HEAD_DIM + dim[None, :], own_seen, mask=valid[:, None] & in_dim[None, :])
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        seen = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
        for section in range(tl.cdiv(last, SECTION)):
            own_top, own_total, own_seen = _section(
                own, here, positions + slot, row, base, context, last, section, scaling, dim, in_dim,
                HEADS // GROUP, HEAD_DIM, CAUSAL, WINDOW, SECTION, ROWS, BLOCK_DIM, TOKENS,
            )  # fmt: skip
            top, total, seen = _added(top, total, seen, own_top, own_total, own_seen)
        result = seen / tl.where(valid, total, 1.0)[:, None]
        where = output + vector[:, None] * HEAD_DIM + dim[None, :]
        tl.store(where, result.to(output.dtype.element_ty), mask=valid[:, None] & in_dim[None, :])


@triton.jit
def _section(
    own,
    pool,
    positions,
    row,
    base,
    context,
    last,
    section,
    scaling,
    dim,
    in_dim,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SECTION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Highest score (in units of log 2), sum of weights and weighted values of the queries `own` over one section."""
    FAR: tl.constexpr = 1 << 30
    VALUES: tl.constexpr = KV_HEADS * HEAD_DIM  # from a key to its value
    LOG2_E: tl.constexpr = 1.4426950408889634
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    for begin in range(section * SECTION, tl.minimum((section + 1) * SECTION, last), TOKENS):
        at = begin + tl.arange(0, TOKENS)
        # Where keys stand, as seen from the base; a block's own rows follow its context in order.
        place = tl.load(positions + at, mask=at < context, other=0) - base
        place = tl.minimum(tl.maximum(place, -FAR), FAR).to(tl.int32)
        wanted = (at < last) & ((at >= context) | (place < 0))
        place = tl.where(at < context, place, at - context)
        if WINDOW > 0:
            wanted = wanted & (place > tl.min(row, 0) - WINDOW)
        where = at.to(tl.int64) * 2 * VALUES
        key = tl.load(pool + where[None, :] + dim[:, None], mask=wanted[None, :] & in_dim[:, None], other=0.0)
        score = tl.dot(own, key, input_precision="ieee") * (scaling * LOG2_E)
        visible = wanted[None, :]
        if CAUSAL:
            visible = visible & (place[None, :] <= row[:, None])
        if WINDOW > 0:
            visible = visible & (tl.abs(place[None, :] - row[:, None]) < WINDOW)
        score = tl.where(visible, score, float("-inf"))

        # A tile that a row does not see leaves the row's sums exactly as they were.
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(weight, 1)
        value = tl.load(
            pool + VALUES + where[:, None] + dim[None, :], mask=wanted[:, None] & in_dim[None, :], other=0.0
        )
        seen = seen * keep[:, None] + tl.dot(weight.to(own.dtype), value, input_precision="ieee")
        top = higher
    return top, total, seen


@triton.jit
def _added(top, total, seen, own_top, own_total, own_seen):
    """Two sections' sums together. Each fused multiply-add is spelled out: both ways of adding give the same bits."""
    higher = tl.maximum(top, own_top)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    keep = tl.exp2(top - shift)
    joins = tl.exp2(own_top - shift)
    total = tl.fma(total, keep, own_total * joins)
    seen = tl.fma(seen, tl.broadcast_to(keep[:, None], seen.shape), own_seen * joins[:, None])
    return higher, total, seen


@triton.jit(do_not_specialize=["tokens"])
def _join_sections(
    output,
    part,
    peak,
    mass,
    starts,
    held,
    tokens,
    LONGEST: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    SECTION: tl.constexpr,
):
    """One program a block row and KV head: the row's sections in order."""
    block = tl.program_id(0) // LONGEST
    row = tl.program_id(0) % LONGEST
    start = tl.load(starts + block)
    count = (tl.load(starts + block + 1) - start).to(tl.int32)
    if row >= count:
        return
    within = tl.arange(0, BLOCK_GROUP)
    valid = within < GROUP
    vector = (start + row) * HEADS + tl.program_id(1) * GROUP + within
    dim = tl.arange(0, BLOCK_DIM)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    top = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    seen = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for section in range(tl.cdiv(tl.load(held + block).to(tl.int32) + count, SECTION)):
        cell = tl.cast(section, tl.int64) * tokens * HEADS + vector
        own_top = tl.load(peak + cell, mask=valid, other=0.0)
        own_total = tl.load(mass + cell, mask=valid, other=1.0)
        own_seen = tl.load(part + cell[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        top, total, seen = _added(top, total, seen, own_top, own_total, own_seen)
    where = output + vector[:, None] * HEAD_DIM + dim[None, :]
    tl.store(where, (seen / total[:, None]).to(output.dtype.element_ty), mask=mask)
