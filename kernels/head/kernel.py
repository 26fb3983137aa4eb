"""The target's output head in Triton: the weight is read once, and of a race's logits nothing is stored.

A program makes a tile of logits in float32 and either stores them or keeps each row's winner. Which token wins is
decided in float64, as kernels.acceptance decides it over stored logits, but for the few tokens of a tile that can win
at all: those whose score with roughly made noise comes close enough to the tile's best one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.acceptance.kernel import join
from kernels.acceptance.noise import gumbel, random_bits, rough_gumbel
from kernels.acceptance.reference import check_race
from kernels.head.tile import head_tile, tile_logits
from kernels.linear.matrix import Matrix
from kernels.linear.reference import check_arguments


def head_logits(hidden: Tensor, weight: Matrix) -> Tensor:
    """As kernels.head.reference. hidden float32, float16 or bfloat16, its last dimension contiguous.

    A row's bits are the same whatever the other rows; and a token's whatever the shard of the vocabulary.
    """
    check_arguments(hidden, weight, None)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    _launch(_head_logits, hidden, weight, (logits,))
    return logits


def head_race(
    hidden: Tensor, weight: Matrix, keys: Tensor, temperatures: Tensor, *, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """As kernels.head.reference, in the dtypes of `head_logits`: kernels.acceptance's `sample` of those very bits."""
    check_arguments(hidden, weight, None)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    check_race(rows, keys, temperatures)
    parts = triton.cdiv(vocabulary, head_tile(rows, weight, hidden.dtype).tokens)
    scores = torch.empty(rows, parts, dtype=torch.float64, device=hidden.device)
    token_ids = torch.empty(rows, parts, dtype=torch.int64, device=hidden.device)
    _launch(_head_race, hidden, weight, (keys, temperatures, scores, token_ids, first_token))
    return join(token_ids.t(), scores.t())


def _launch(kernel: Any, hidden: Tensor, weight: Matrix, arguments: tuple[Any, ...]) -> None:
    rows = hidden.shape[0]
    if rows == 0:
        return
    tile = head_tile(rows, weight, hidden.dtype)
    codes, scales, factor, _, code_row, _, scale_row = tile.weight.arguments
    constants = {name: value for name, value in tile.weight.constants.items() if name not in ("OUT_TILE", "SECTION")}
    # Tiles of rows next to each other, so that they meet in the L2 cache over one tile of the weight.
    kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(weight.shape[0], tile.tokens))](
        *(hidden, *arguments, rows, hidden.stride(0), codes, scales, factor, code_row, scale_row),
        **constants,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["rows"])
def _head_logits(
    hidden,
    logits,
    rows,
    hidden_row,
    codes,
    scales,
    factor,
    code_row,
    scale_row,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
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
    WHOLE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * TOKENS
    own = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the last repeat it
    tile = tile_logits(
        *(hidden, own, first, hidden_row, codes, scales, factor, code_row, scale_row),
        *(KIND, OUT, IN, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
        *(PAIRS, EXACT, WIDTH, WHOLE, TOKENS, ROWS),
    )
    at = first + tl.arange(0, TOKENS)
    tl.store(logits + own[None, :] * OUT + at[:, None], tile, mask=(at < OUT)[:, None] & (row < rows)[None, :])


@triton.jit(do_not_specialize=["first_token", "rows"])
def _head_race(
    hidden,
    keys,
    temperatures,
    scores,
    token_ids,
    first_token,
    rows,
    hidden_row,
    codes,
    scales,
    factor,
    code_row,
    scale_row,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
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
    WHOLE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program's part of `scores` and `token_ids`: [rows, programs along the vocabulary]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * TOKENS
    own = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the last repeat it
    logits = tile_logits(
        *(hidden, own, first, hidden_row, codes, scales, factor, code_row, scale_row),
        *(KIND, OUT, IN, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
        *(PAIRS, EXACT, WIDTH, WHOLE, TOKENS, ROWS),
    )
    NEVER: tl.constexpr = 2147483647
    at = first + tl.arange(0, TOKENS)
    logits = tl.where((at < OUT)[:, None], logits, float("-inf"))
    wrong = (logits != logits) | (logits == float("inf"))
    broken = tl.max(wrong.to(tl.int32), 0) > 0
    logits = tl.where(wrong, float("-inf"), logits)

    temperature = tl.load(temperatures + own)
    scale = (1.0 / tl.where(temperature != 0.0, temperature, float("inf"))).to(tl.float32)
    rough = logits
    if tl.max(scale, 0) > 0.0:
        noise = rough_gumbel(random_bits(tl.load(keys + own)[None, :], at.to(tl.int64)[:, None] + first_token))
        rough = tl.where((scale > 0.0)[None, :], logits * scale[None, :] + noise, logits)
    ahead = tl.max(rough, 0)
    # Three times what two rough scores may be off. Those without noise are not: one token is enough.
    bar = tl.where(scale > 0.0, ahead - (0.000244140625 + 9.5367431640625e-07 * tl.abs(ahead)), float("inf"))
    left = ahead > float("-inf")

    # What is left of a tile is weighed one token of each row in a round, mostly the only one. That takes float64, which
    # a product's layout would keep many times over: its outcome goes through memory into a layout of its own.
    cell = own * tl.num_programs(1) + tl.program_id(1)
    best = tl.full((ROWS,), float("-inf"), tl.float64)
    best_at = tl.full((ROWS,), -1, tl.int64)
    while tl.max(left.to(tl.int32), 0) > 0:
        it = tl.min(tl.where(rough == ahead[None, :], at[:, None], NEVER), 0)
        is_it = at[:, None] == it[None, :]
        logit = tl.sum(tl.where(is_it, logits, 0.0), 0)
        tl.store(scores + cell, logit.to(tl.float64), mask=row < rows)
        tl.store(token_ids + cell, tl.where(left, it, -1).to(tl.int64), mask=row < rows)
        tl.debug_barrier()
        best, best_at = _weighed(
            best, best_at, scores + cell, token_ids + cell, keys + own, temperatures + own, first_token
        )
        tl.debug_barrier()
        rough = tl.where(is_it, float("-inf"), rough)
        ahead = tl.max(rough, 0)
        left = left & (ahead >= bar)
    tl.store(scores + cell, tl.where(broken, float("inf"), best), mask=row < rows)
    token = tl.where(broken | (best_at < 0), -1, best_at + first_token)
    tl.store(token_ids + cell, token, mask=row < rows)


@triton.jit
def _weighed(best, best_at, logits, tokens, keys, temperatures, first_token):
    """The better of `best` and one more token of each row, -1 = none, as kernels.acceptance scores it."""
    score, at = tl.load(logits), tl.load(tokens)
    temperature = tl.load(temperatures)
    if tl.max((temperature != 0.0).to(tl.int32), 0) > 0:
        divisor = tl.where(temperature != 0.0, temperature, 1.0)
        noise = gumbel(tl.load(keys), at + first_token)
        score = score / divisor + tl.where(temperature != 0.0, noise, 0.0)
    wins = (at >= 0) & ((score > best) | ((score == best) & (at < best_at)))
    return tl.where(wins, score, best), tl.where(wins, at, best_at)
