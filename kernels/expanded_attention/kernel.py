"""Latent attention in expanded form in Triton: one program for a tile of a chunk's rows and one head.

A section's keys and values lie side by side in memory, made of its latents by one product; programs of one head follow
each other, so that what they share stays in the second-level cache. What rows have seen is carried from section to
section in float32, in order, by the programs themselves: no partial sums are kept beside each other, and the memory of
a long context is that of one section.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.expanded_attention.batch import ChunkBatch, Sums, check_attend, check_copy
from kernels.ragged_tiles import request_of

COPIED = 16  # places that a program of copy_section copies


@dataclass(frozen=True)
class Tiling:
    """Query rows and places of a tile, and how the compiler runs it."""

    rows: int
    tokens: int
    warps: int
    stages: int


def tiling(dtype: torch.dtype) -> Tiling:
    """By the dtype of queries: float32 fills a block's shared memory with a quarter of the rows."""
    if dtype == torch.float32:
        return Tiling(rows=16, tokens=16, warps=4, stages=1)
    return Tiling(rows=128, tokens=64, warps=8, stages=3)


def copy_section(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    block_tables: torch.Tensor,
    context_starts: torch.Tensor,
    output: tuple[torch.Tensor, torch.Tensor],
    *,
    first: int,
    scales: torch.Tensor | None = None,
) -> None:
    """As kernels.expanded_attention.reference. Latents may be fp8; a cache's outer strides may be anything."""
    check_copy(latents, rotary, block_tables, context_starts, scales, output)
    places, width = output[0].shape
    _copy_section[(triton.cdiv(places, COPIED),)](
        *(latents, rotary, latents if scales is None else scales, block_tables, context_starts, *output),
        *(context_starts.shape[0] - 1, first, places, block_tables.stride(0)),
        *(latents.stride(0), latents.stride(1), rotary.stride(0), rotary.stride(1)),
        LATENT=width,
        BLOCK_LATENT=triton.next_power_of_2(width),
        ROTARY=rotary.shape[2],
        BLOCK_ROTARY=triton.next_power_of_2(rotary.shape[2]),
        BLOCK_TOKENS=latents.shape[1],
        SCALES=scales is not None,
        PLACES=COPIED,
        num_warps=4,
    )


def attend_section(
    content: torch.Tensor,
    rotary: torch.Tensor,
    expanded: torch.Tensor,
    keys: torch.Tensor,
    batch: ChunkBatch,
    output: torch.Tensor,
    sums: Sums | None,
    *,
    first: int,
    scaling: float,
    tile: Tiling | None = None,
) -> None:
    """As kernels.expanded_attention.reference. Any stride of queries but the last dimension's may be anything.

    Queries, keys and values of one dtype: float32, float16 or bfloat16; accumulates in float32.
    """
    check_attend(content, rotary, expanded, keys, batch, output, sums)
    rows, heads, width = content.shape
    value = output.shape[2]
    tile = tile or tiling(content.dtype)
    carried = (output, output, output) if sums is None else (sums.part, sums.peak, sums.mass)
    _attend_section[(rows // tile.rows + batch.chunks, heads)](
        *(content, rotary, expanded, keys, output, *carried, batch.query_starts, batch.context_starts),
        *(batch.chunks, first, len(expanded), scaling),
        *(content.stride(0), content.stride(1), rotary.stride(0), rotary.stride(1)),
        HEADS=heads,
        CONTENT=width,
        BLOCK_CONTENT=max(16, triton.next_power_of_2(width)),
        ROTARY=rotary.shape[2],
        BLOCK_ROTARY=max(16, triton.next_power_of_2(rotary.shape[2])),
        VALUE=value,
        BLOCK_VALUE=max(16, triton.next_power_of_2(value)),
        CARRIES=sums is not None,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["chunks", "first", "places"])
def _copy_section(
    latents,
    rotary,
    scales,
    block_tables,
    context_starts,
    output_latents,
    output_rotary,
    chunks,
    first,
    places,
    table_stride,
    latent_block,
    latent_token,
    rotary_block,
    rotary_token,
    LATENT: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCALES: tl.constexpr,
    PLACES: tl.constexpr,
):
    into = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    exists = into < places
    place = first + into
    chunk = tl.zeros((PLACES,), tl.int32)
    for other in range(1, chunks):
        chunk += (tl.load(context_starts + other) <= place).to(tl.int32)
    at = place - tl.load(context_starts + chunk)
    block = tl.load(block_tables + chunk * table_stride + at // BLOCK_TOKENS, mask=exists, other=0).to(tl.int64)
    within = at % BLOCK_TOKENS
    wide = tl.arange(0, BLOCK_LATENT)
    mask = exists[:, None] & (wide < LATENT)[None, :]
    own = tl.load(latents + (block * latent_block + within * latent_token)[:, None] + wide[None, :], mask=mask)
    if SCALES:
        scale = tl.load(scales + block * BLOCK_TOKENS + within, mask=exists, other=0.0).to(tl.float32)
        own = own.to(tl.float32) * scale[:, None]
    where = output_latents + into.to(tl.int64)[:, None] * LATENT + wide[None, :]
    tl.store(where, own.to(output_latents.dtype.element_ty), mask=mask)
    turn = tl.arange(0, BLOCK_ROTARY)
    mask = exists[:, None] & (turn < ROTARY)[None, :]
    key = tl.load(rotary + (block * rotary_block + within * rotary_token)[:, None] + turn[None, :], mask=mask)
    where = output_rotary + into.to(tl.int64)[:, None] * ROTARY + turn[None, :]
    tl.store(where, key.to(output_rotary.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunks", "first", "places"])
def _attend_section(
    content,
    rotary,
    expanded,
    keys,
    output,
    part,
    peak,
    mass,
    query_starts,
    context_starts,
    chunks,
    first,
    places,
    scaling,
    content_token,
    content_head,
    rotary_token,
    rotary_head,
    HEADS: tl.constexpr,
    CONTENT: tl.constexpr,
    BLOCK_CONTENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    CARRIES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tl.program_id(0)
    head = tl.program_id(1)
    chunk = request_of(query_starts, chunks, tile, ROWS)
    start = tl.load(query_starts + chunk)
    count = tl.load(query_starts + chunk + 1) - start
    first_row = (tile - (start // ROWS + chunk)) * ROWS
    begins = tl.load(context_starts + chunk)
    oldest = tl.load(context_starts + chunk + 1) - count + first_row  # the place of the tile's first row
    newest = oldest + tl.minimum(ROWS, count - first_row) - 1
    stop = first + places
    if (first_row >= count) | (newest < first) | (begins >= stop):
        return  # no tile, one that has seen all it sees, or one whose context comes later

    row = first_row + tl.arange(0, ROWS)
    valid = row < count
    vector = (start + row).to(tl.int64) * HEADS + head
    token = (start + row).to(tl.int64)
    place = oldest + tl.arange(0, ROWS)
    wide = tl.arange(0, BLOCK_CONTENT)
    turn = tl.arange(0, BLOCK_ROTARY)
    value = tl.arange(0, BLOCK_VALUE)
    own = tl.load(
        content + (token * content_token + head * content_head)[:, None] + wide[None, :],
        mask=valid[:, None] & (wide < CONTENT)[None, :],
        other=0.0,
    )
    turned = tl.load(
        rotary + (token * rotary_token + head * rotary_head)[:, None] + turn[None, :],
        mask=valid[:, None] & (turn < ROTARY)[None, :],
        other=0.0,
    )
    in_value = valid[:, None] & (value < VALUE)[None, :]
    where = vector[:, None] * VALUE + value[None, :]
    top = tl.full((ROWS,), float("-inf"), tl.float32)  # highest score so far, in units of log 2
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, BLOCK_VALUE), tl.float32)
    if CARRIES and begins < first:
        top = tl.load(peak + vector, mask=valid, other=0.0)
        total = tl.load(mass + vector, mask=valid, other=1.0)
        seen = tl.load(part + where, mask=in_value, other=0.0)

    # Tiles that all rows see need no mask.
    low = tl.maximum(first, begins)
    high = tl.minimum(newest + 1, stop)
    middle = low + tl.maximum(tl.minimum(oldest + 1, stop) - low, 0) // TOKENS * TOKENS
    here = expanded + head * (CONTENT + VALUE)
    top, total, seen = _look(
        top, total, seen, own, turned, here, keys, place, low, middle, high, first, scaling * LOG2_E,
        HEADS, CONTENT, BLOCK_CONTENT, ROTARY, BLOCK_ROTARY, VALUE, BLOCK_VALUE, False, TOKENS,
    )  # fmt: skip
    top, total, seen = _look(
        top, total, seen, own, turned, here, keys, place, middle, high, high, first, scaling * LOG2_E,
        HEADS, CONTENT, BLOCK_CONTENT, ROTARY, BLOCK_ROTARY, VALUE, BLOCK_VALUE, True, TOKENS,
    )  # fmt: skip
    if newest < stop:
        tl.store(output + where, (seen / total[:, None]).to(output.dtype.element_ty), mask=in_value)
    elif CARRIES:
        tl.store(peak + vector, top, mask=valid)
        tl.store(mass + vector, total, mask=valid)
        tl.store(part + where, seen, mask=in_value)


@triton.jit
def _look(
    top,
    total,
    seen,
    own,
    turned,
    here,
    keys,
    place,
    begin,
    end,
    high,
    first,
    factor,
    HEADS: tl.constexpr,
    CONTENT: tl.constexpr,
    BLOCK_CONTENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The sums after the places begin to before `end`. MASKED: rows see different ones, `high` and later ones none."""
    WIDTH: tl.constexpr = CONTENT + VALUE
    wide = tl.arange(0, BLOCK_CONTENT)
    turn = tl.arange(0, BLOCK_ROTARY)
    value = tl.arange(0, BLOCK_VALUE)
    for tile in range(begin, end, TOKENS):
        at = tile + tl.arange(0, TOKENS)
        stored = at < high
        token = (at - first).to(tl.int64)
        key_at = here + token[None, :] * (HEADS * WIDTH) + wide[:, None]
        key = tl.load(key_at, mask=stored[None, :] & (wide < CONTENT)[:, None], other=0.0)
        score = tl.dot(own, key, input_precision="ieee")
        shared_at = keys + token[None, :] * ROTARY + turn[:, None]
        shared = tl.load(shared_at, mask=stored[None, :] & (turn < ROTARY)[:, None], other=0.0)
        score = tl.dot(turned, shared, score, input_precision="ieee") * factor
        if MASKED:
            score = tl.where(stored[None, :] & (at[None, :] <= place[:, None]), score, float("-inf"))
        # Every row has seen at least the first place of its context by now, so that `higher` is finite.
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(top - higher)
        total = total * keep + tl.sum(weight, 1)
        value_at = here + CONTENT + token[:, None] * (HEADS * WIDTH) + value[None, :]
        held = tl.load(value_at, mask=stored[:, None] & (value < VALUE)[None, :], other=0.0)
        seen = tl.dot(weight.to(held.dtype), held, seen * keep[:, None], input_precision="ieee")
        top = higher
    return top, total, seen
