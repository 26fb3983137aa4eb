"""Latent attention in Triton: one program for a tile of score rows (query row x head) over a request's latents.

All heads read the same latents, so heads are packed beside rows as if there were one KV head; a tile of latents is
loaded once and serves both products, as keys and as values. A row's output is as wide as the latent, 512 columns in
float32, which is why a tile has no more than 64 rows. Tiles and sections are laid out as in kernels.paged_attention,
with shapes that follow from the latent's width and dtype alone: a row's result depends on its own request only, not on
the number of heads that this rank has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.latent_attention.reference import check_arguments
from kernels.paged_batch import PagedBatch
from kernels.ragged_tiles import add_sections, request_of, section_tokens, sections


@dataclass(frozen=True)
class Tiling:
    """Score rows (query row x head) and context tokens of a tile, and how the compiler runs it."""

    rows: int
    tokens: int
    warps: int
    stages: int


def tiling(dtype: torch.dtype) -> Tiling:
    """By the dtype of queries: float32 fills a block's shared memory with a quarter of the rows."""
    if dtype == torch.float32:
        return Tiling(rows=16, tokens=16, warps=8, stages=1)
    return Tiling(rows=64, tokens=32, warps=8, stages=3)


def latent_attention(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    batch: PagedBatch,
    *,
    scaling: float,
    scales: torch.Tensor | None = None,
    split_tokens: int | None = None,
    spread: bool = False,
    tile: Tiling | None = None,
) -> torch.Tensor:
    """As kernels.latent_attention.reference. Queries float32, float16 or bfloat16; latents the same or fp8.

    Accumulates in float32. Any stride but the last dimension's may be anything. split_tokens: context tokens of a
    section, a multiple of the tile's tokens. spread: cut contexts into equal parts where requests alone do not fill the
    device, unless there is split_tokens. Neither: a context in one go. Rows from query_starts[-1] on are padding and
    stay undefined. Raises ValueError for shapes that do not fit.
    """
    check_arguments(query, latents, rotary, batch, scales, split_tokens)
    tokens, heads, _ = query.shape
    width = latents.shape[2]
    tile = tile or tiling(query.dtype)
    if split_tokens is not None and split_tokens % tile.tokens:
        raise ValueError(f"split_tokens is {split_tokens}: want a multiple of the tile's {tile.tokens} tokens")
    packed = min(heads, tile.rows)  # heads of a tile
    tile_rows = tile.rows // packed  # query rows of a tile
    lanes = triton.cdiv(heads, packed)
    programs = max(batch.requests, triton.cdiv(tokens, tile_rows)) * lanes
    splits = sections(batch, programs, tile.tokens, split_tokens, 1 if spread else 0)
    output = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    if splits:
        part = torch.empty(splits, tokens, heads, width, dtype=torch.float32, device=query.device)
        peak = torch.empty(splits, tokens, heads, dtype=torch.float32, device=query.device)
        mass = torch.empty_like(peak)
    else:
        part, peak, mass = output, output, output  # never written as such
    _attend_latents[(tokens // tile_rows + batch.requests, lanes, max(1, splits))](
        *(query, latents, rotary, query if scales is None else scales, output, part, peak, mass),
        *(batch.block_tables, batch.query_starts, batch.context_lengths, batch.requests, tokens, scaling),
        *(query.stride(0), query.stride(1), batch.block_tables.stride(0)),
        *(latents.stride(0), latents.stride(1), rotary.stride(0), rotary.stride(1)),
        HEADS=heads,
        PACKED=packed,
        LATENT=width,
        BLOCK_LATENT=max(16, triton.next_power_of_2(width)),
        ROTARY=rotary.shape[2],
        BLOCK_ROTARY=max(16, triton.next_power_of_2(rotary.shape[2])),
        BLOCK_TOKENS=latents.shape[1],
        SCALES=scales is not None,
        CUT=splits > 0,
        SPLIT=split_tokens or 0,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits:
        add_sections(*(output, part, peak, mass, batch, 1), split_tokens=split_tokens, tile_tokens=tile.tokens)
    return output


@triton.jit(do_not_specialize=["requests", "tokens"])
def _attend_latents(
    query,
    latents,
    rotary,
    scales,
    output,
    part,
    peak,
    mass,
    block_tables,
    query_starts,
    context_lengths,
    requests,
    tokens,
    scaling,
    query_token,
    query_head,
    table_stride,
    latent_block,
    latent_token,
    rotary_block,
    rotary_token,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCALES: tl.constexpr,
    CUT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    TILE_ROWS: tl.constexpr = ROWS // PACKED
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tl.program_id(0)
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
    row = first_row + packed // PACKED
    head = tl.program_id(1) * PACKED + packed % PACKED
    valid = (packed < TILE_ROWS * PACKED) & (row < count) & (head < HEADS)
    token = (start + row).to(tl.int64)
    position = before + row
    wide = tl.arange(0, BLOCK_LATENT)
    in_latent = wide < LATENT
    turn = tl.arange(0, BLOCK_ROTARY)
    in_rotary = turn < ROTARY

    first = 0
    last = before + tl.minimum(first_row + TILE_ROWS, count)
    if CUT:
        size = section_tokens(context, tl.num_programs(2), SPLIT, TOKENS)
        first = split * size
        last = tl.minimum(last, first + size)
        if first >= last:
            return

    own = query + (token * query_token + head * query_head)[:, None]
    content = tl.load(own + wide[None, :], mask=valid[:, None] & in_latent[None, :], other=0.0)
    turned = tl.load(own + (LATENT + turn)[None, :], mask=valid[:, None] & in_rotary[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)  # highest score so far, in units of log 2
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, BLOCK_LATENT), tl.float32)
    for begin in range(first, last, TOKENS):
        at = begin + tl.arange(0, TOKENS)
        stored = at < last
        block = tl.load(block_tables + request * table_stride + at // BLOCK_TOKENS, mask=stored, other=0).to(tl.int64)
        within = at % BLOCK_TOKENS
        latent = tl.load(
            latents + (block * latent_block + within * latent_token)[:, None] + wide[None, :],
            mask=stored[:, None] & in_latent[None, :],
            other=0.0,
        ).to(content.dtype)
        score = tl.dot(content, tl.trans(latent), input_precision="ieee")
        if SCALES:
            scale = tl.load(scales + block * BLOCK_TOKENS + within, mask=stored, other=0.0).to(tl.float32)
            score *= scale[None, :]
        key = tl.load(
            rotary + (block * rotary_block + within * rotary_token)[None, :] + turn[:, None],
            mask=stored[None, :] & in_rotary[:, None],
            other=0.0,
        ).to(content.dtype)
        score = tl.dot(turned, key, score, input_precision="ieee") * (scaling * LOG2_E)
        score = tl.where(at[None, :] <= position[:, None], score, float("-inf"))

        # A tile that a row does not see leaves the row's sums exactly as they were.
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(weight, 1)
        if SCALES:
            weight *= scale[None, :]
        seen = tl.dot(weight.to(content.dtype), latent, seen * keep[:, None], input_precision="ieee")
        top = higher

    if CUT:
        cell = (split.to(tl.int64) * tokens + token) * HEADS + head
        tl.store(peak + cell, top, mask=valid)
        tl.store(mass + cell, total, mask=valid)
        tl.store(part + cell[:, None] * LATENT + wide[None, :], seen, mask=valid[:, None] & in_latent[None, :])
    else:
        result = seen / tl.where(valid, total, 1.0)[:, None]
        where = output + (token * HEADS + head)[:, None] * LATENT + wide[None, :]
        tl.store(where, result.to(output.dtype.element_ty), mask=valid[:, None] & in_latent[None, :])
