"""Tiles of one expert's pairs in Triton: counted and placed on the device, the same way every time.

An expert's program counts everybody's pairs, so that it knows where its tiles begin, and places its own in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moe.tiles import TileMap, most_tiles

CHUNK = 1024  # pairs that are counted together


def assign(chosen: Tensor, experts: int, rows: int) -> TileMap:
    """As kernels.moe.reference. chosen contiguous, of any integer dtype."""
    pairs = chosen.numel()
    tiles = most_tiles(pairs, experts, rows)
    owners = torch.empty(tiles, dtype=torch.int32, device=chosen.device)
    held = torch.empty(tiles, rows, dtype=torch.int32, device=chosen.device)
    if pairs == 0:
        return TileMap(owners, held)
    chunks, bins = triton.cdiv(pairs, CHUNK), triton.next_power_of_2(experts)
    block = min(CHUNK, max(32, triton.next_power_of_2(pairs)))
    counts = held
    if chunks > 1:
        counts = torch.empty(chunks, bins, dtype=torch.int32, device=chosen.device)
        _count[(chunks,)](chosen, counts, pairs, EXPERTS=experts, BINS=bins, CHUNK=block)
    _fill[(experts,)](
        *(chosen, counts, owners, held, pairs, tiles),
        EXPERTS=experts,
        BINS=bins,
        ROWS=rows,
        CHUNK=block,
        COUNTED=chunks > 1,
    )
    return TileMap(owners, held)


@triton.jit(do_not_specialize=["pairs"])
def _count(chosen, counts, pairs, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    own = tl.load(chosen + at, mask=at < pairs, other=-1).to(tl.int32)
    found = tl.histogram(own, BINS, mask=(own >= 0) & (own < EXPERTS))
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _fill(
    chosen,
    counts,
    owners,
    held,
    pairs,
    tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One program an expert: where its tiles begin follows from all counts, a pair's place from those before it."""
    expert = tl.program_id(0)
    bin = tl.arange(0, BINS)
    found = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, CHUNK):
        if COUNTED:
            found += tl.load(counts + start // CHUNK * BINS + bin)
        else:
            at = start + tl.arange(0, CHUNK)
            own = tl.load(chosen + at, mask=at < pairs, other=-1).to(tl.int32)
            found += tl.histogram(own, BINS, mask=(own >= 0) & (own < EXPERTS))
    needed = (found + (ROWS - 1)) // ROWS
    first = tl.sum(tl.where(bin < expert, needed, 0), 0)
    end = first + tl.sum(tl.where(bin == expert, needed, 0), 0)
    if end > first:
        done = first * ROWS
        for start in range(0, pairs, CHUNK):
            at = start + tl.arange(0, CHUNK)
            own = tl.load(chosen + at, mask=at < pairs, other=-1).to(tl.int32) == expert
            place = done + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(held + place, at, mask=own)
            done += tl.sum(own.to(tl.int32), 0)
        rest = done + tl.arange(0, ROWS)
        tl.store(held + rest, tl.full((ROWS,), -1, tl.int32), mask=rest < end * ROWS)
        for tile in range(first, end):
            tl.store(owners + tile, expert)
    if expert == EXPERTS - 1:
        for tile in range(end, tiles, CHUNK):
            at = tile + tl.arange(0, CHUNK)
            tl.store(owners + at, tl.full((CHUNK,), -1, tl.int32), mask=at < tiles)
