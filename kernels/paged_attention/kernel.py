"""Paged attention in Triton: one program for a tile of query rows, with all query heads that share its KV head.

Packing the heads of a group beside the rows means that a tile of keys and values is loaded once for all of them: with
16 verify rows and 8 heads a KV head, once for 128 score rows. Which request a tile belongs to is found on the device
(a binary search over query_starts), so that one launch serves any mix of verify rows and prefill chunks.

`split_tokens` and `spread` cut long contexts into sections that run as programs of their own (flash decoding, arXiv
2311.01282); a second launch adds them up in order (kernels.ragged_tiles). With the tile shapes fixed by head_dim and
group, and without `spread`, a row's result depends on its own request only: not on the other requests of the launch,
nor on how many rows are verified with it.

With three stages the compiler fetches a tile's block ids two tiles ahead, and its keys and values one tile ahead; with
two it waits for the ids of every tile. Two programs of four warps fit on a multiprocessor, or one of eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.paged_attention.batch import check_arguments
from kernels.paged_batch import PagedBatch
from kernels.ragged_tiles import add_sections, request_of, section_tokens, sections


@dataclass(frozen=True)
class Tiling:
    """Score rows (query row x head of the group) and KV tokens of a tile, and how the compiler runs it."""

    rows: int
    tokens: int
    warps: int
    stages: int


def tiling(head_dim: int, group: int) -> Tiling:
    """Depends on the model alone, never on the batch: that is what makes results independent of it.

    At least 64 rows, also for a small group: that is one instruction of a Hopper tensor core, and so every rank's sums
    run alike, whether it has all heads of a KV head or, sharing it with other ranks, a few.
    """
    rows = max(64, min(128 if head_dim <= 128 else 64, triton.next_power_of_2(16 * group)))
    rows = max(rows, triton.next_power_of_2(group))
    return Tiling(rows=rows, tokens=64 if head_dim <= 128 else 32, warps=8 if rows >= 128 else 4, stages=3)


def parts(width: int) -> tuple[int, int]:
    """Powers of two that a vector is read in: one that holds it all, or two where those hold less (192 = 128 + 64)."""
    whole = max(16, triton.next_power_of_2(width))
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole, 0) if whole // 2 < 16 or whole // 2 + rest >= whole else (whole // 2, rest)


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    *,
    scaling: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    split_tokens: int | None = None,
    spread: bool = False,
    tile: Tiling | None = None,
) -> torch.Tensor:
    """query [tokens, heads, head_dim] over keys, values [blocks, block_tokens, kv_heads, width] -> as wide as values.

    As kernels.paged_attention.reference, which defines every argument. Queries float32, float16 or bfloat16; keys and
    values the same or fp8. Accumulates in float32. Any stride but the last dimension's may be anything.
    split_tokens: context tokens of a section, a multiple of the tile's tokens. spread: cut contexts into equal parts
    where requests alone do not fill the device, unless there is split_tokens, or a window makes them short. Neither: a
    context in one go. Rows from query_starts[-1] on are padding and stay undefined.
    Raises ValueError for shapes that do not fit.
    """
    check_arguments(query, keys, values, batch, sliding_window, soft_cap, sinks, key_scales, value_scales, split_tokens)
    tokens, heads, head_dim = query.shape
    group = heads // keys.shape[2]
    tile = tile or tiling(head_dim, group)
    if split_tokens is not None and split_tokens % tile.tokens:
        raise ValueError(f"split_tokens is {split_tokens}: want a multiple of the tile's {tile.tokens} tokens")
    tile_rows = tile.rows // group  # query rows of a tile
    programs = max(batch.requests, triton.cdiv(tokens, tile_rows)) * keys.shape[2]
    side_by_side = 8 // tile.warps if spread and sliding_window is None else 0  # by registers
    splits = sections(batch, programs, tile.tokens, split_tokens, side_by_side)
    value_dim = values.shape[3]
    output = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    if splits:
        part = torch.empty(splits, tokens, heads, value_dim, dtype=torch.float32, device=query.device)
        peak = torch.empty(splits, tokens, heads, dtype=torch.float32, device=query.device)
        mass = torch.empty_like(peak)
    else:
        part, peak, mass = output, output, output  # never written as such
    _attend[(tokens // tile_rows + batch.requests, keys.shape[2], max(1, splits))](
        *(query, keys, values, query if key_scales is None else key_scales),
        *(query if value_scales is None else value_scales, output, part, peak, mass, query if sinks is None else sinks),
        *(batch.block_tables, batch.query_starts, batch.context_lengths),
        *(batch.requests, tokens, scaling, 0.0 if soft_cap is None else soft_cap),
        *(query.stride(0), query.stride(1), batch.block_tables.stride(0)),
        *(keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2)),
        HEADS=heads,
        GROUP=group,
        KEY_DIM=head_dim,
        KEY_BLOCK=parts(head_dim)[0],
        KEY_REST=parts(head_dim)[1],
        VALUE_DIM=value_dim,
        VALUE_BLOCK=parts(value_dim)[0],
        VALUE_REST=parts(value_dim)[1],
        BLOCK_TOKENS=keys.shape[1],
        WINDOW=0 if sliding_window is None else sliding_window,
        SOFT_CAP=soft_cap is not None,
        SINKS=sinks is not None,
        SCALES=key_scales is not None,
        CUT=splits > 0,
        SPLIT=split_tokens or 0,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits:
        add_sections(
            *(output, part, peak, mass, batch, group, sinks),
            split_tokens=split_tokens,
            tile_tokens=tile.tokens,
            window=sliding_window,
        )
    return output


@triton.jit(do_not_specialize=["requests", "tokens"])
def _attend(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    output,
    part,
    peak,
    mass,
    sinks,
    block_tables,
    query_starts,
    context_lengths,
    requests,
    tokens,
    scaling,
    soft_cap,
    query_token,
    query_head,
    table_stride,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_REST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SCALES: tl.constexpr,
    CUT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    TILE_ROWS: tl.constexpr = ROWS // GROUP
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    request = request_of(query_starts, requests, tile, TILE_ROWS)
    start = tl.load(query_starts + request)
    count = tl.load(query_starts + request + 1) - start
    first_row = (tile - (start // TILE_ROWS + request)) * TILE_ROWS
    if first_row >= count:
        return
    context = tl.load(context_lengths + request)
    before = context - count  # tokens in front of the request's rows

    packed = tl.arange(0, ROWS)
    row = first_row + packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    valid = (packed < TILE_ROWS * GROUP) & (row < count)
    token = (start + row).to(tl.int64)
    position = before + row
    key_dim = tl.arange(0, KEY_BLOCK)
    value_dim = tl.arange(0, VALUE_BLOCK)
    in_key = key_dim < KEY_DIM
    in_value = value_dim < VALUE_DIM

    # The tiles of keys that some row of this tile sees. They begin at multiples of TOKENS whatever the window.
    last = before + tl.minimum(first_row + TILE_ROWS, count)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(before + first_row - WINDOW + 1, 0) // TOKENS * TOKENS
    if CUT:
        size = section_tokens(context, tl.num_programs(2), SPLIT, TOKENS)
        first = tl.maximum(first, split * size)
        last = tl.minimum(last, (split + 1) * size)
        if first >= last:
            return

    query_at = query + token[:, None] * query_token + head[:, None] * query_head
    own = tl.load(query_at + key_dim[None, :], mask=valid[:, None] & in_key[None, :], other=0.0)
    if KEY_REST > 0:
        more_key = KEY_BLOCK + tl.arange(0, KEY_REST)
        mask = valid[:, None] & (more_key < KEY_DIM)[None, :]
        own_rest = tl.load(query_at + more_key[None, :], mask=mask, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)  # highest score so far, in units of log 2
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    if VALUE_REST > 0:
        more_value = VALUE_BLOCK + tl.arange(0, VALUE_REST)
        seen_rest = tl.zeros((ROWS, VALUE_REST), tl.float32)
    for begin in range(first, last, TOKENS):
        at = begin + tl.arange(0, TOKENS)
        stored = at < last
        block = tl.load(block_tables + request * table_stride + at // BLOCK_TOKENS, mask=stored, other=0).to(tl.int64)
        within = at % BLOCK_TOKENS
        key_at = keys + (block * key_block + within * key_token + kv_head * key_head)[None, :]
        key = tl.load(key_at + key_dim[:, None], mask=stored[None, :] & in_key[:, None], other=0.0).to(own.dtype)
        score = tl.dot(own, key, input_precision="ieee")
        if KEY_REST > 0:
            more = stored[None, :] & (more_key < KEY_DIM)[:, None]
            key_rest = tl.load(key_at + more_key[:, None], mask=more, other=0.0).to(own.dtype)
            score = tl.dot(own_rest, key_rest, score, input_precision="ieee")
        score *= scaling
        if SCALES:
            cell = (block * BLOCK_TOKENS + within) * (HEADS // GROUP) + kv_head
            score *= tl.load(key_scales + cell, mask=stored, other=0.0).to(tl.float32)[None, :]
        if SOFT_CAP:
            score = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * score / soft_cap) + 1.0))  # soft_cap * tanh(score / soft_cap)
        visible = at[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (at[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score * LOG2_E, float("-inf"))

        # A tile that a row does not see leaves the row's sums exactly as they were.
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(weight, 1)
        if SCALES:
            weight *= tl.load(value_scales + cell, mask=stored, other=0.0).to(tl.float32)[None, :]
        weight = weight.to(own.dtype)
        value_at = values + (block * value_block + within * value_token + kv_head * value_head)[:, None]
        value = tl.load(value_at + value_dim[None, :], mask=stored[:, None] & in_value[None, :], other=0.0).to(
            own.dtype
        )
        seen = seen * keep[:, None] + tl.dot(weight, value, input_precision="ieee")
        if VALUE_REST > 0:
            more = stored[:, None] & (more_value < VALUE_DIM)[None, :]
            value_rest = tl.load(value_at + more_value[None, :], mask=more, other=0.0).to(own.dtype)
            seen_rest = seen_rest * keep[:, None] + tl.dot(weight, value_rest, input_precision="ieee")
        top = higher

    if CUT:
        cell = (split.to(tl.int64) * tokens + token) * HEADS + head
        tl.store(peak + cell, top, mask=valid)
        tl.store(mass + cell, total, mask=valid)
        where = part + cell[:, None] * VALUE_DIM
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
            higher = tl.maximum(top, sink)
            keep = tl.exp2(top - higher)
            total = total * keep + tl.exp2(sink - higher)
            seen = seen * keep[:, None]
            if VALUE_REST > 0:
                seen_rest = seen_rest * keep[:, None]
        total = tl.where(valid, total, 1.0)[:, None]
        seen = seen / total
        if VALUE_REST > 0:
            seen_rest = seen_rest / total
        where = output + (token * HEADS + head)[:, None] * VALUE_DIM
    tl.store(where + value_dim[None, :], seen.to(where.dtype.element_ty), mask=valid[:, None] & in_value[None, :])
    if VALUE_REST > 0:
        mask = valid[:, None] & (more_value < VALUE_DIM)[None, :]
        tl.store(where + more_value[None, :], seen_rest.to(where.dtype.element_ty), mask=mask)
