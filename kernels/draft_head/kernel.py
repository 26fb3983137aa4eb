"""The draft head in Triton, two stages: sections of the vocabulary side by side, then one program a row joins them.

The weight is read once for every tile of rows (up to 64; the tiles of one section run next to each other and share it
through the L2 cache), and of the [rows, vocabulary] logits only three numbers a section are ever stored. Sections have
a fixed size: with a fixed `tile`, the result of a row does not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.draft_head.choice import PLAIN, HeadCandidates, HeadChoice, HeadShape, check_arguments


@dataclass(frozen=True)
class Tiling:
    """rows x tokens logits of a tile, made `width` columns at a time; section: tokens a program goes through."""

    rows: int = 16
    tokens: int = 128
    width: int = 128
    section: int = 512
    warps: int = 4
    stages: int = 3


def tiling(rows: int) -> Tiling:
    """Larger row tiles read the weight less often, but may round differently: fix one where that matters."""
    return Tiling() if rows <= 16 else Tiling(rows=32) if rows <= 32 else Tiling(rows=64, width=64)


def draft_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    shape: HeadShape = PLAIN,
    first_token: int = 0,
    tile: Tiling | None = None,
) -> HeadChoice:
    """hidden [rows, width] times weight [vocabulary, width], float32, float16 or bfloat16; accumulates in float32.

    As kernels.draft_head.reference. Both tensors contiguous in their last dimension. Raises ValueError for shapes or
    dtypes that do not fit.
    """
    check_arguments(hidden, weight)
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tile = tile or tiling(rows)
    sections = triton.cdiv(vocabulary, tile.section)
    best = torch.empty(sections, rows, dtype=torch.float32, device=hidden.device)
    best_id = torch.empty(sections, rows, dtype=torch.int32, device=hidden.device)
    mass = torch.empty_like(best)
    _sections[(triton.cdiv(rows, tile.rows), sections)](
        *(hidden, weight, best, best_id, mass, rows, vocabulary, hidden.stride(0), weight.stride(0), *shape),
        SOFT_CAP=shape.soft_cap != 0,
        WIDTH=width,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        COLUMNS=tile.width,
        SECTION=tile.section,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    choice = HeadChoice(
        torch.empty(rows, dtype=torch.int64, device=hidden.device),
        torch.empty(rows, dtype=torch.float32, device=hidden.device),
        torch.empty(rows, dtype=torch.float32, device=hidden.device),
    )
    _join[(rows,)](
        *(best, best_id, mass, *choice, rows, first_token),
        SECTIONS=sections,
        BLOCK=triton.next_power_of_2(sections),
    )
    return choice


def draft_candidates(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    shape: HeadShape = PLAIN,
    first_token: int = 0,
    tile: Tiling | None = None,
) -> HeadCandidates:
    """As kernels.draft_head.reference, in the dtypes of `draft_head`; k up to the tile's tokens."""
    check_arguments(hidden, weight, k)
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tile = tile or tiling(min(rows, 32))  # the sorting of a larger tile does not fit into registers
    if k > tile.tokens:
        raise ValueError(f"k is {k}: want at most the tile's {tile.tokens} tokens")
    sections, kept = triton.cdiv(vocabulary, tile.section), max(2, triton.next_power_of_2(k))
    keys = torch.empty(rows, sections, kept, dtype=torch.int64, device=hidden.device)
    best, mass = torch.empty(2, sections, rows, dtype=torch.float32, device=hidden.device).unbind()
    _candidate_sections[(triton.cdiv(rows, tile.rows), sections)](
        *(hidden, weight, keys, best, mass, rows, vocabulary, hidden.stride(0), weight.stride(0), *shape),
        SOFT_CAP=shape.soft_cap != 0,
        WIDTH=width,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        COLUMNS=tile.width,
        SECTION=tile.section,
        KEPT=kept,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    candidates = HeadCandidates(
        torch.empty(rows, k, dtype=torch.int64, device=hidden.device),
        torch.empty(rows, k, dtype=torch.float32, device=hidden.device),
        torch.empty(rows, dtype=torch.float32, device=hidden.device),
    )
    _join_candidates[(rows,)](
        *(keys, best, mass, *candidates, rows, first_token),
        SECTIONS=sections,
        BLOCK=triton.next_power_of_2(sections),
        K=k,
        KEPT=kept,
        CHUNK=max(kept, min(1024, triton.next_power_of_2(sections * kept))),
    )
    return candidates


@triton.jit(do_not_specialize=["rows"])
def _sections(
    hidden,
    weight,
    best,
    best_id,
    mass,
    rows,
    vocabulary,
    hidden_row,
    weight_row,
    multiplier,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SECTION: tl.constexpr,
):
    section = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    top_id = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(section * SECTION, tl.minimum((section + 1) * SECTION, vocabulary), TOKENS):
        token, logits = _logits(
            hidden, weight, row, valid, begin, vocabulary, hidden_row, weight_row, multiplier, soft_cap,
            SOFT_CAP, WIDTH, ROWS, TOKENS, COLUMNS,
        )  # fmt: skip
        tile_top = tl.max(logits, 1)
        equal = logits == tile_top[:, None]
        tile_id = tl.min(tl.where(equal, token[None, :], 2147483647), 1)
        top_id = tl.where(tile_top > top, tile_id, top_id)
        higher = tl.maximum(top, tile_top)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    cell = section * rows + row
    tl.store(best + cell, top, mask=valid)
    tl.store(best_id + cell, top_id, mask=valid)
    tl.store(mass + cell, total, mask=valid)


@triton.jit
def _logits(
    hidden,
    weight,
    row,
    valid,
    begin,
    vocabulary,
    hidden_row,
    weight_row,
    multiplier,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS token ids from `begin` on and the rows' logits of them, [ROWS, TOKENS]: -inf beyond the vocabulary."""
    column = tl.arange(0, COLUMNS)
    token = begin + tl.arange(0, TOKENS)
    exists = token < vocabulary
    logits = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        at = start + column
        left = tl.load(
            hidden + row.to(tl.int64)[:, None] * hidden_row + at[None, :],
            mask=valid[:, None] & (at < WIDTH)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + token.to(tl.int64)[None, :] * weight_row + at[:, None],
            mask=exists[None, :] & (at < WIDTH)[:, None],
            other=0.0,
        )
        logits = tl.dot(left, right, logits, input_precision="ieee")
    logits *= multiplier
    if SOFT_CAP:
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / soft_cap) + 1.0))  # soft_cap * tanh(logits / soft_cap)
    return token, tl.where(exists[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["rows", "first_token"])
def _join(
    best, best_id, mass, token_ids, logits, log_sum_exp, rows, first_token, SECTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    section = tl.arange(0, BLOCK)
    exists = section < SECTIONS
    own = tl.load(best + section * rows + row, mask=exists, other=float("-inf"))
    own_id = tl.load(best_id + section * rows + row, mask=exists, other=2147483647)
    own_mass = tl.load(mass + section * rows + row, mask=exists, other=0.0)
    top = tl.max(own, 0)
    token = tl.min(tl.where(own == top, own_id, 2147483647), 0)
    total = tl.sum(own_mass * tl.exp(own - top), 0)
    tl.store(token_ids + row, token.to(tl.int64) + first_token)
    tl.store(logits + row, top)
    tl.store(log_sum_exp + row, top + tl.log(total))


@triton.jit
def _ranked(logits, token):
    """int64 keys that sort as the logits do, the lower token id above the higher one where they are equal."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit(do_not_specialize=["rows"])
def _candidate_sections(
    hidden,
    weight,
    keys,
    best,
    mass,
    rows,
    vocabulary,
    hidden_row,
    weight_row,
    multiplier,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SECTION: tl.constexpr,
    KEPT: tl.constexpr,
):
    section = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    kept = tl.full((ROWS, KEPT), -(2**63), tl.int64)
    for begin in range(section * SECTION, tl.minimum((section + 1) * SECTION, vocabulary), TOKENS):
        token, logits = _logits(
            hidden, weight, row, valid, begin, vocabulary, hidden_row, weight_row, multiplier, soft_cap,
            SOFT_CAP, WIDTH, ROWS, TOKENS, COLUMNS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        ranked = _ranked(logits, tl.broadcast_to(token[None, :], logits.shape))
        # Beyond the vocabulary is worse than any number and none: whoever looks the tokens up stays within it.
        own = tl.topk(tl.where(token[None, :] < vocabulary, ranked, -(2**63)), KEPT)
        kept = tl.topk(tl.reshape(tl.join(kept, own), (ROWS, 2 * KEPT)), KEPT)
    cell = section * rows + row
    tl.store(best + cell, top, mask=valid)
    tl.store(mass + cell, total, mask=valid)
    sections = tl.num_programs(1)
    where = (row.to(tl.int64) * sections + section)[:, None] * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(keys + where, kept, mask=valid[:, None])


@triton.jit(do_not_specialize=["rows", "first_token"])
def _join_candidates(
    keys,
    best,
    mass,
    token_ids,
    logits,
    log_sum_exp,
    rows,
    first_token,
    SECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section = tl.arange(0, BLOCK)
    own = tl.load(best + section * rows + row, mask=section < SECTIONS, other=float("-inf"))
    own_mass = tl.load(mass + section * rows + row, mask=section < SECTIONS, other=0.0)
    top = tl.max(own, 0)
    tl.store(log_sum_exp + row, top + tl.log(tl.sum(own_mass * tl.exp(own - top), 0)))
    kept = tl.full((1, KEPT), -(2**63), tl.int64)
    for begin in range(0, SECTIONS * KEPT, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        there = tl.load(keys + row * SECTIONS * KEPT + at, mask=at < SECTIONS * KEPT, other=-(2**63))
        kept = tl.topk(tl.reshape(tl.join(kept, tl.topk(there[None, :], KEPT)), (1, 2 * KEPT)), KEPT)
    order = (kept >> 32).to(tl.int32)
    logit = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    rank = tl.arange(0, KEPT)[None, :]
    tl.store(token_ids + row * K + rank, 0x7FFFFFFF - (kept & 0xFFFFFFFF) + first_token, mask=rank < K)
    tl.store(logits + row * K + rank, logit, mask=rank < K)
