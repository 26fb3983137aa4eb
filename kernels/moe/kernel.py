"""Routed experts in Triton: a tile map made on the device, both grouped products over it, an ordered weighted sum.

The idea of tiles that hold one expert's tokens only, with an upper bound of them for the host, is that of vLLM's fused
experts; here every pair's row is written once and added in order, so that no sum depends on what else is in the batch,
and the position of a pair within its tile changes nothing. All launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gating import gated
from kernels.linear.kernel import tree_sum
from kernels.linear.matrix import Matrix
from kernels.linear.tile import OUT_TILE, add_product, row_tile, weight_tile
from kernels.moe.assignment import assign
from kernels.moe.reference import check_down, check_gate_up
from kernels.moe.tiles import TileMap

__all__ = ["assign", "combine", "down", "gate_up", "tile_rows"]

PROGRAMS = 16  # of one expert's gate and up: a token with 8 experts then fills a device
SHORTEST = 512  # columns of a section
LARGEST = {"plain": 128, "e4m3": 64, "int4": 32, "e2m1": 32}  # rows of a tile that leave registers for gate and up


def tile_rows(pairs: int, weight: Matrix) -> int:
    """Rows of a tile that suit so many pairs over the weight's experts; bits do not depend on them."""
    return min(row_tile(pairs / weight.shape[0], weight), LARGEST[weight.kind])


def gate_up(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    tiles: TileMap,
    chosen: Tensor,
    *,
    bias: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    sections: int | None = None,
) -> Tensor:
    """As kernels.moe.reference. x's last dimension contiguous, chosen and bias contiguous."""
    check_gate_up(x, gate, up, chosen, bias)
    width = gate.shape[1]
    sections = sections or sections_of(*gate.shape[1:])
    pairs, top_k = chosen.numel(), chosen.shape[1]
    inner = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    if pairs == 0:
        return inner
    fused = sections == 1
    target = inner if fused else torch.empty(sections, pairs, 2, width, dtype=torch.float32, device=x.device)
    alpha, limit = clamp or (0.0, 0.0)
    gates = weight_tile(gate, sections, x.dtype)
    ups = weight_tile(up, sections, x.dtype)
    assert gates.arguments[3:] == ups.arguments[3:], "gate and up lie in memory alike"
    _gate_up[(len(tiles.experts), triton.cdiv(width, OUT_TILE), sections)](
        *(x, x if bias is None else bias, target, tiles.experts, tiles.pairs, pairs, x.stride(0), alpha, limit),
        *ups.arguments[:3],
        *gates.arguments,
        **gates.constants,
        UP_FIRST_ROW=up.first[0],
        TOP_K=top_k,
        BIAS=bias is not None,
        CLAMP=clamp is not None,
        FUSED=fused,
        ROWS=tiles.rows,
        num_warps=4,
        num_stages=3 if tiles.rows <= 32 else 2,
    )
    if not fused:
        _gate[(pairs, triton.cdiv(width, 512))](
            *(target, x if bias is None else bias, chosen, inner, pairs, alpha, limit),
            SECTIONS=sections,
            WIDTH=width,
            BIAS=bias is not None,
            CLAMP=clamp is not None,
            TILE=512,
        )
    return inner


def down(inner: Tensor, weight: Matrix, tiles: TileMap, *, leaves: int | None = None) -> Tensor:
    """As kernels.moe.reference. inner contiguous in its last dimension."""
    check_down(inner, weight, leaves)
    count, (pairs, hidden) = leaves or 1, (len(inner), weight.shape[1])
    dtype = inner.dtype if leaves is None else torch.float32
    outer = torch.empty(count, pairs, hidden, dtype=dtype, device=inner.device)
    if pairs == 0:
        return outer
    tile = weight_tile(weight, count, inner.dtype)
    _down[(len(tiles.experts), triton.cdiv(hidden, OUT_TILE), count)](
        *(inner, outer, tiles.experts, tiles.pairs, pairs, inner.stride(0)),
        *tile.arguments,
        **tile.constants,
        ROWS=tiles.rows,
        num_warps=4,
        num_stages=3,
    )
    return outer


def combine(
    outer: Tensor, weights: Tensor, chosen: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """As kernels.moe.reference. All contiguous."""
    (leaves, _, hidden), (tokens, top_k) = outer.shape, chosen.shape
    total = torch.empty(leaves, tokens, hidden, dtype=dtype, device=outer.device)
    if tokens:
        _combine[(tokens, triton.cdiv(hidden, 1024), leaves)](
            *(outer, weights, chosen, outer if bias is None else bias, total, tokens),
            HIDDEN=hidden,
            TOP_K=top_k,
            BIAS=bias is not None,
            TILE=1024,
        )
    return total


def sections_of(width: int, hidden: int) -> int:
    """As of kernels.linear: narrow shares of an expert are cut along the hidden size."""
    sections = 1
    while sections < 16 and triton.cdiv(width, OUT_TILE) * sections < PROGRAMS and hidden >= 2 * sections * SHORTEST:
        sections *= 2
    return sections


@triton.jit(do_not_specialize=["pairs"])
def _gate_up(
    x,
    bias,
    target,
    owners,
    held,
    pairs,
    x_row,
    alpha,
    limit,
    up_codes,
    up_scales,
    up_factor,
    codes,
    scales,
    factor,
    code_matrix,
    code_row,
    scale_matrix,
    scale_row,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    GROUPS: tl.constexpr,
    E8M0: tl.constexpr,
    FACTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    UP_FIRST_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMP: tl.constexpr,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """FUSED: target [pairs, OUT], gated; else float32 [sections, pairs, 2, OUT]."""
    expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(held + tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    token = (tl.maximum(pair, 0) // TOP_K).to(tl.int64)
    first = tl.program_id(1) * OUT_TILE
    section = tl.program_id(2)
    end = tl.minimum((section + 1) * SECTION, IN)
    column = tl.arange(0, WIDTH)
    codes += expert * code_matrix
    up_codes += expert * code_matrix
    scales += expert * scale_matrix
    up_scales += expert * scale_matrix
    gate = tl.zeros((OUT_TILE, ROWS), tl.float32)
    up = tl.zeros((OUT_TILE, ROWS), tl.float32)
    for start in range(section * SECTION, end, WIDTH):
        place = x + token[:, None] * x_row + (start + column)[None, :]
        left = tl.load(place) if WHOLE else tl.load(place, mask=(start + column < end)[None, :], other=0.0)
        gate = add_product(
            *(gate, left, start, end, first, codes, scales, factor + expert, code_row, scale_row),
            *(KIND, OUT, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
            *(PAIRS, EXACT, WIDTH, OUT_TILE, WHOLE),
        )
        up = add_product(
            *(up, left, start, end, first, up_codes, up_scales, up_factor + expert, code_row, scale_row),
            *(KIND, OUT, BLOCK_ROWS, BLOCK_COLUMNS, UP_FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
            *(PAIRS, EXACT, WIDTH, OUT_TILE, WHOLE),
        )
    at = first + tl.arange(0, OUT_TILE)
    exists = (at < OUT)[:, None] & (pair >= 0)[None, :]
    if FUSED:
        if BIAS:
            own = bias + expert * (2 * OUT) + at
            gate += tl.load(own, mask=at < OUT, other=0.0).to(tl.float32)[:, None]
            up += tl.load(own + OUT, mask=at < OUT, other=0.0).to(tl.float32)[:, None]
        inner = gated(gate, up, alpha, limit, CLAMP)
        place = target + pair.to(tl.int64)[None, :] * OUT + at[:, None]
        tl.store(place, inner.to(target.dtype.element_ty), mask=exists)
    else:
        row = section.to(tl.int64) * pairs + pair
        place = target + row[None, :] * (2 * OUT) + at[:, None]
        tl.store(place, gate, mask=exists)
        tl.store(place + OUT, up, mask=exists)


@triton.jit(do_not_specialize=["pairs"])
def _gate(
    partials,
    bias,
    chosen,
    inner,
    pairs,
    alpha,
    limit,
    SECTIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMP: tl.constexpr,
    TILE: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(chosen + pair).to(tl.int64)
    if expert < 0:
        return
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = at < WIDTH
    place = partials + pair * (2 * WIDTH) + at
    section = pairs.to(tl.int64) * (2 * WIDTH)
    gate = tree_sum(place, section, exists, SECTIONS)
    up = tree_sum(place + WIDTH, section, exists, SECTIONS)
    if BIAS:
        own = bias + expert * (2 * WIDTH) + at
        gate += tl.load(own, mask=exists, other=0.0).to(tl.float32)
        up += tl.load(own + WIDTH, mask=exists, other=0.0).to(tl.float32)
    result = gated(gate, up, alpha, limit, CLAMP)
    tl.store(inner + pair * WIDTH + at, result.to(inner.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["pairs"])
def _down(
    inner,
    outer,
    owners,
    held,
    pairs,
    inner_row,
    codes,
    scales,
    factor,
    code_matrix,
    code_row,
    scale_matrix,
    scale_row,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    GROUPS: tl.constexpr,
    E8M0: tl.constexpr,
    FACTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(held + tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    own = tl.maximum(pair, 0).to(tl.int64)
    first = tl.program_id(1) * OUT_TILE
    leaf = tl.program_id(2)
    end = tl.minimum((leaf + 1) * SECTION, IN)
    column = tl.arange(0, WIDTH)
    codes += expert * code_matrix
    scales += expert * scale_matrix
    total = tl.zeros((OUT_TILE, ROWS), tl.float32)
    for start in range(leaf * SECTION, end, WIDTH):
        place = inner + own[:, None] * inner_row + (start + column)[None, :]
        left = tl.load(place) if WHOLE else tl.load(place, mask=(start + column < end)[None, :], other=0.0)
        total = add_product(
            *(total, left, start, end, first, codes, scales, factor + expert, code_row, scale_row),
            *(KIND, OUT, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
            *(PAIRS, EXACT, WIDTH, OUT_TILE, WHOLE),
        )
    at = first + tl.arange(0, OUT_TILE)
    row = leaf.to(tl.int64) * pairs + own
    place = outer + row[None, :] * OUT + at[:, None]
    tl.store(place, total.to(outer.dtype.element_ty), mask=(at < OUT)[:, None] & (pair >= 0)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    outer,
    weights,
    chosen,
    bias,
    total,
    tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    leaf = tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = at < HIDDEN
    summed = tl.zeros((TILE,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(chosen + pair).to(tl.int64)
        held = exists & (expert >= 0)  # nobody wrote the rows of a choice of nobody
        row = tl.load(outer + (leaf * tokens * TOP_K + pair) * HIDDEN + at, mask=held, other=0.0).to(tl.float32)
        if BIAS:
            row += tl.load(bias + expert * HIDDEN + at, mask=held & (leaf == 0), other=0.0).to(tl.float32)
        summed += tl.load(weights + pair).to(tl.float32) * row
    tl.store(total + (leaf * tokens + token) * HIDDEN + at, summed.to(total.dtype.element_ty), mask=exists)
