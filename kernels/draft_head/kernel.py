"""The draft head in Triton, two stages: sections of the vocabulary side by side, then one program a row joins them.

The weight is read once for every tile of rows (up to 64; the tiles of one section run next to each other and share it
through the L2 cache), and of the [rows, vocabulary] logits only three numbers a section are ever stored. Sections have
a fixed size, and logits are summed up as those of the target's head are: the result of a row does not depend on the
other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.draft_head.choice import PLAIN, HeadCandidates, HeadChoice, HeadShape, check_arguments
from kernels.head.tile import PLAIN_COLUMNS, tile_logits
from kernels.linear.matrix import Matrix
from kernels.linear.tile import weight_tile

WARPS = 4  # bits of a sum over tokens follow from how warps share them


@dataclass(frozen=True)
class Tiling:
    """rows x tokens logits of a tile; section: tokens a program goes through."""

    rows: int = 16
    tokens: int = 128
    section: int = 512
    stages: int = 4


def tiling(rows: int) -> Tiling:
    """Larger row tiles read the weight less often; they change no result."""
    return Tiling() if rows <= 16 else Tiling(rows=32) if rows <= 32 else Tiling(rows=64, stages=3)


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
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tile = tile or tiling(rows)
    sections = triton.cdiv(vocabulary, tile.section)
    best = torch.empty(sections, rows, dtype=torch.float32, device=hidden.device)
    best_id = torch.empty(sections, rows, dtype=torch.int32, device=hidden.device)
    mass = torch.empty_like(best)
    _sections[(triton.cdiv(rows, tile.rows), sections)](
        *(hidden, weight, best, best_id, mass, rows, hidden.stride(0), weight.stride(0), *shape),
        SOFT_CAP=shape.soft_cap != 0,
        **_columns(weight),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        SECTION=tile.section,
        num_warps=WARPS,
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
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tile = tile or tiling(min(rows, 32))  # the sorting of a larger tile does not fit into registers
    if k > tile.tokens:
        raise ValueError(f"k is {k}: want at most the tile's {tile.tokens} tokens")
    sections, kept = triton.cdiv(vocabulary, tile.section), max(2, triton.next_power_of_2(k))
    keys = torch.empty(rows, sections, kept, dtype=torch.int64, device=hidden.device)
    best, mass = torch.empty(2, sections, rows, dtype=torch.float32, device=hidden.device).unbind()
    _candidate_sections[(triton.cdiv(rows, tile.rows), sections)](
        *(hidden, weight, keys, best, mass, rows, hidden.stride(0), weight.stride(0), *shape),
        SOFT_CAP=shape.soft_cap != 0,
        **_columns(weight),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        SECTION=tile.section,
        KEPT=kept,
        num_warps=WARPS,
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


def _columns(weight: torch.Tensor) -> dict[str, Any]:
    constants = weight_tile(Matrix(weight), 1, weight.dtype, PLAIN_COLUMNS).constants
    return {name: constants[name] for name in ("OUT", "IN", "WIDTH", "WHOLE")}


@triton.jit(do_not_specialize=["rows"])
def _sections(
    hidden,
    weight,
    best,
    best_id,
    mass,
    rows,
    hidden_row,
    weight_row,
    multiplier,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SECTION: tl.constexpr,
):
    section = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    own = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the last repeat it
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    top_id = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(section * SECTION, tl.minimum((section + 1) * SECTION, OUT), TOKENS):
        logits = _logits(
            *(hidden, weight, own, begin, hidden_row, weight_row, multiplier, soft_cap),
            *(SOFT_CAP, OUT, IN, WIDTH, WHOLE, ROWS, TOKENS),
        )
        token = begin + tl.arange(0, TOKENS)
        tile_top = tl.max(logits, 0)
        tile_id = tl.min(tl.where(logits == tile_top[None, :], token[:, None], 2147483647), 0)
        top_id = tl.where(tile_top > top, tile_id, top_id)
        higher = tl.maximum(top, tile_top)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
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
    first,
    hidden_row,
    weight_row,
    multiplier,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The rows' logits of tokens first.., [TOKENS, ROWS]: -inf beyond the vocabulary."""
    logits = tile_logits(
        *(hidden, row, first, hidden_row, weight, weight, weight, weight_row, 0),
        *("plain", OUT, IN, 1, 1, 0, 0, 1, False, False, False, False, WIDTH, WHOLE, TOKENS, ROWS),
    )
    logits *= multiplier
    if SOFT_CAP:
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / soft_cap) + 1.0))  # soft_cap * tanh(logits / soft_cap)
    return tl.where((first + tl.arange(0, TOKENS) < OUT)[:, None], logits, float("-inf"))


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
    hidden_row,
    weight_row,
    multiplier,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SECTION: tl.constexpr,
    KEPT: tl.constexpr,
):
    section = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    own = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the last repeat it
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    kept = tl.full((ROWS, KEPT), -(2**63), tl.int64)
    for begin in range(section * SECTION, tl.minimum((section + 1) * SECTION, OUT), TOKENS):
        logits = _logits(
            *(hidden, weight, own, begin, hidden_row, weight_row, multiplier, soft_cap),
            *(SOFT_CAP, OUT, IN, WIDTH, WHOLE, ROWS, TOKENS),
        )
        token = begin + tl.arange(0, TOKENS)
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
        top = higher
        ranked = _ranked(tl.trans(logits), tl.broadcast_to(token[None, :], (ROWS, TOKENS)))
        # Beyond the vocabulary is worse than any number and none: whoever looks the tokens up stays within it.
        new = tl.topk(tl.where(token[None, :] < OUT, ranked, -(2**63)), KEPT)
        kept = tl.topk(tl.reshape(tl.join(kept, new), (ROWS, 2 * KEPT)), KEPT)
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
