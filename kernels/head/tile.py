"""A tile of logits: what the output heads of target and drafter have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.linear.matrix import Matrix
from kernels.linear.tile import WeightTile, add_product, row_tile, weight_tile

PLAIN_COLUMNS = 64  # of a plain weight made at a time: a line of memory in bfloat16


@dataclass(frozen=True)
class HeadTile:
    """tokens x rows logits are made by one program. Both may follow from the number of rows: in every tile the weight
    is the left operand, and a logit is summed up in the order of its columns, the weight's WIDTH of them at a time.
    """

    weight: WeightTile
    tokens: int
    rows: int
    warps: int
    stages: int


def head_tile(rows: int, weight: Matrix, dtype: torch.dtype) -> HeadTile:
    """For so many rows of hidden states in dtype. Few rows read the weight once, in many programs; of many, large tiles
    read it (and the hidden states) less often.
    """
    tile = weight_tile(weight, 1, dtype, widest=PLAIN_COLUMNS if weight.kind == "plain" else None)
    tall = row_tile(rows, weight)
    if tall < 128:
        return HeadTile(tile, 64, tall, 4, 4)
    return HeadTile(tile, 128, tall, 8, 3 if weight.kind == "plain" else 2)


@triton.jit
def tile_logits(
    hidden,
    row,
    first,
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
    """float32 [TOKENS, ROWS]: logits of the weight's rows first.. for rows `row` (int64 [ROWS]) of hidden.

    Beyond OUT they are those of the last token.
    """
    column = tl.arange(0, WIDTH)
    logits = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, IN, WIDTH):
        place = hidden + row[:, None] * hidden_row + (start + column)[None, :]
        left = tl.load(place) if WHOLE else tl.load(place, mask=(start + column < IN)[None, :], other=0.0)
        logits = add_product(
            *(logits, left, start, IN, first, codes, scales, factor, code_row, scale_row),
            *(KIND, OUT, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
            *(PAIRS, EXACT, WIDTH, TOKENS, WHOLE),
        )
    return logits
