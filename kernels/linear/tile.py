"""Tiles of a weight in Triton: loaded as they are stored, dequantized in registers, multiplied.

The weight is the left operand (its rows fill the tensor cores' 64, whatever the number of x's rows), so that one row
of x meets the same instructions in the same order for every tile of rows. Of packed codes, a byte's two numbers go
into two products, with the even and with the odd columns of x: nothing is interleaved in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.linear.matrix import Matrix
from kernels.linear.nibbles import numbers

OUT_TILE = 64
ROW_TILES = (16, 32, 64, 128)  # they change neither the order of a sum nor its parts


@dataclass(frozen=True)
class WeightTile:
    """How a weight is read in tiles. arguments: codes, scales, factor and strides, as kernels take them; constants:
    what is known when they are compiled."""

    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def weight_tile(weight: Matrix, sections: int, dtype: torch.dtype, widest: int | None = None) -> WeightTile:
    """Tile widths follow from the format and the section's length alone. dtype: of x. widest: columns of a tile, at
    most; None = what suits the format."""
    columns = weight.shape[-1]
    most = widest or (256 if weight.to_byte == 2 else 128 if dtype.itemsize < 4 else 64)
    length = triton.cdiv(columns, sections)
    width = max(32, min(most, triton.next_power_of_2(length)))
    section = length if columns % (sections * weight.to_byte) == 0 else triton.cdiv(length, width) * width
    scales = weight.scales if weight.scales is not None else weight.codes
    stacked = weight.codes.dim() == 3
    arguments = (
        *(weight.codes, _as_stored(scales), weight.codes if weight.factor is None else weight.factor),
        *(weight.codes.stride(0) if stacked else 0, weight.codes.stride(-2)),
        *(scales.stride(0) if stacked else 0, scales.stride(-2)),
    )
    assert weight.scales is None or weight.scales.shape[-1] == 1 or scales.stride(-1) == 1, "scales in turns"
    constants = {
        "KIND": weight.kind,
        "OUT": weight.shape[-2],
        "IN": columns,
        "SECTION": section,
        "BLOCK_ROWS": weight.block[0],
        "BLOCK_COLUMNS": weight.block[1],
        "FIRST_ROW": weight.first[0],
        "FIRST_COLUMN": weight.first[1],
        "GROUPS": _groups(weight, width, section),
        "E8M0": weight.scales is not None and weight.scales.dtype == torch.float8_e8m0fnu,
        "FACTOR": weight.factor is not None,
        "PAIRS": weight.to_byte == 2 and dtype == torch.bfloat16 and COMPILED,
        "EXACT": weight.factor is None and scales.dtype in (torch.bfloat16, torch.float8_e8m0fnu),
        "WIDTH": width,
        "OUT_TILE": OUT_TILE,
        "WHOLE": section % width == 0 and columns % section == 0,
    }
    return WeightTile(arguments, constants)


def row_tile(rows: float, weight: Matrix) -> int:
    """The smallest tile that holds so many rows, or the largest there is."""
    tiles = ROW_TILES[: -(weight.to_byte - 1) or None]  # the largest and four bits do not fit into the registers
    return next((tile for tile in tiles if tile >= rows), tiles[-1])


def _groups(weight: Matrix, width: int, section: int) -> int:
    """Scales that a row of a tile has, all equally wide; 0 = its columns look for their scale one by one."""
    block, first = weight.block[1], weight.first[1]
    if weight.scales is None or weight.scales.shape[-1] == 1:
        return 1
    together = max(block, width)
    apart = min(block, width)
    if together % apart or first % apart or (section < weight.shape[-1] and section % apart):
        return 0
    return max(1, width // block)


def _as_stored(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


@triton.jit
def add_product(
    total,
    left,
    start,
    end,
    first,
    codes,
    scales,
    factor,
    code_row,
    scale_row,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
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
):
    """total [OUT_TILE, rows] + columns start.. (to `end`) of the weight's rows first.. times left [rows, WIDTH]^T.

    codes, scales, factor: of one matrix. Rows beyond OUT repeat the last one. Columns from `end` on count as zeros.
    """
    row = tl.minimum(first + tl.arange(0, OUT_TILE), OUT - 1)
    if KIND == "plain" or KIND == "e4m3":
        at = start + tl.arange(0, WIDTH)
        place = codes + row.to(tl.int64)[:, None] * code_row + at[None, :]
        stored = tl.load(place) if WHOLE else tl.load(place, mask=(at < end)[None, :], other=0.0)
        if KIND == "e4m3":
            scale = _scales(
                *(row, start, end, scales, factor, scale_row),
                *(1, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR, WIDTH, OUT_TILE),
            )
            right = (stored.to(tl.float32) * scale).to(left.dtype)
        else:
            right = stored.to(left.dtype)
        total = tl.dot(right, tl.trans(left), total, input_precision="ieee")
    else:
        half: tl.constexpr = WIDTH // 2
        at = start // 2 + tl.arange(0, half)
        place = codes + row.to(tl.int64)[:, None] * code_row + at[None, :]
        stored = tl.load(place) if WHOLE else tl.load(place, mask=(2 * at < end)[None, :], other=0)
        scale = _scales(
            *(row, start, end, scales, factor, scale_row),
            *(2, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR, half, OUT_TILE),
        )
        even, odd = tl.split(tl.reshape(left, (left.shape[0], half, 2)))
        low, high = numbers(stored, KIND, PAIRS)
        if PAIRS and EXACT:  # a product of so few bits is rounded once, in bfloat16 as in float32
            scale = scale.to(tl.bfloat16)
        low = (low * scale).to(left.dtype)
        high = (high * scale).to(left.dtype)
        total = tl.dot(low, tl.trans(even), total, input_precision="ieee")
        total = tl.dot(high, tl.trans(odd), total, input_precision="ieee")
    return total


@triton.jit
def _scales(
    row,
    start,
    end,
    scales,
    factor,
    scale_row,
    TO_BYTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    GROUPS: tl.constexpr,
    E8M0: tl.constexpr,
    FACTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_TILE: tl.constexpr,
):
    """float32 [OUT_TILE, COLUMNS], or [OUT_TILE, 1] if a row of the tile has one scale."""
    line = scales + ((FIRST_ROW + row) // BLOCK_ROWS).to(tl.int64)[:, None] * scale_row
    last = (FIRST_COLUMN + end - 1) // BLOCK_COLUMNS  # columns from `end` on may have no scale
    if GROUPS == 0:
        at = FIRST_COLUMN + start + tl.arange(0, COLUMNS) * TO_BYTE
        scale = _factored(tl.load(line + tl.minimum(at // BLOCK_COLUMNS, last)[None, :]), factor, E8M0, FACTOR)
    else:
        block = (FIRST_COLUMN + start) // BLOCK_COLUMNS + tl.arange(0, GROUPS)
        scale = _factored(tl.load(line + tl.minimum(block, last)[None, :]), factor, E8M0, FACTOR)
        if GROUPS > 1:
            wide = tl.broadcast_to(scale[:, :, None], (OUT_TILE, GROUPS, COLUMNS // GROUPS))
            scale = tl.reshape(wide, (OUT_TILE, COLUMNS))
    return scale


@triton.jit
def _factored(stored, factor, E8M0: tl.constexpr, FACTOR: tl.constexpr):
    if E8M0:  # 2^(byte - 127): the byte is float32's exponent, but for the smallest (and 255, which nobody stores)
        scale = tl.maximum(stored.to(tl.int32) << 23, 0x00400000).to(tl.float32, bitcast=True)
    else:
        scale = stored.to(tl.float32)
    if FACTOR:
        scale = scale * tl.load(factor)
    return scale


COMPILED = isinstance(add_product, JITFunction)  # and not interpreted, which knows no PTX
