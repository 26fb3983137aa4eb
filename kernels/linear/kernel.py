"""Linear layers in Triton: a tile of rows and of the output a program, the weight read once for every tile of rows.

Programs that share a tile of the weight run next to each other and meet in the L2 cache. Too few tiles to fill a
device are cut into sections of the input, whose sums a second kernel adds. Plain weights and hundreds of rows are as
well left to torch's product, by a caller who can do with results that depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.matrix import Matrix
from kernels.linear.reference import check_arguments, check_leaves, check_partials
from kernels.linear.tile import OUT_TILE, add_product, row_tile, weight_tile

PROGRAMS = 256  # about two for every processor of an H100 or H200; a constant, since bits depend on it
SHORTEST = 512  # columns of a section


def linear(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None = None,
    *,
    sections: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As kernels.linear.reference. x float32, float16 or bfloat16, its last dimension contiguous. out: where to write,
    [rows, out] like x with any stride between rows. e4m3 codes need compute capability 8.9.

    A row's bits depend on the weight's shape and format and on `sections` only, not on the other rows.
    """
    check_arguments(x, weight, bias)
    sections = sections or sections_of(*weight.shape)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if sections == 1:
        _multiply(x, weight, bias, out[None], sections)
        return out
    partials = torch.empty(sections, *out.shape, dtype=torch.float32, device=x.device)
    _multiply(x, weight, None, partials, sections)
    return add_leaves(partials, bias, dtype=x.dtype, out=out)


def linear_leaves(x: Tensor, weight: Matrix, leaves: int) -> Tensor:
    """As kernels.linear.reference; tiles follow from a leaf's length, not from how many a rank holds."""
    check_arguments(x, weight, None)
    check_leaves(weight, leaves)
    partials = torch.empty(leaves, x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    _multiply(x, weight, None, partials, leaves)
    return partials


def add_leaves(
    partials: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """As kernels.linear.reference. partials contiguous; out: where to write, as of `linear`."""
    check_partials(partials)
    leaves, rows, width = partials.shape
    if out is None:
        out = torch.empty(rows, width, dtype=dtype, device=partials.device)
    if rows:
        _add[(rows, triton.cdiv(width, 512))](
            *(partials, partials if bias is None else bias, out, rows, out.stride(0)),
            LEAVES=leaves,
            WIDTH=width,
            BIAS=bias is not None,
            TILE=512,
        )
    return out


def sections_of(out: int, width: int) -> int:
    """How often to cut the input: until there are programs enough, while sections stay long enough to be worth one."""
    sections = 1
    while sections < 16 and triton.cdiv(out, OUT_TILE) * sections < PROGRAMS and width >= 2 * sections * SHORTEST:
        sections *= 2
    return sections


def _multiply(x: Tensor, weight: Matrix, bias: Tensor | None, target: Tensor, sections: int) -> None:
    """target [sections, rows, out]."""
    rows = x.shape[0]
    if rows == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    tile, tall = weight_tile(weight, sections, x.dtype), row_tile(rows, weight)
    _product[(triton.cdiv(rows, tall), triton.cdiv(weight.shape[0], OUT_TILE), sections)](
        *(x, target if bias is None else bias, target, rows, x.stride(0), target.stride(0), target.stride(1)),
        *tile.arguments,
        **tile.constants,
        BIAS=bias is not None,
        ROWS=tall,
        num_warps=4,
        num_stages=4 if tall <= 32 else 3,
    )


@triton.jit(do_not_specialize=["rows"])
def _product(
    x,
    bias,
    target,
    rows,
    x_row,
    target_section,
    target_row,
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
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the last repeat it
    first = tl.program_id(1) * OUT_TILE
    section = tl.program_id(2)
    end = tl.minimum((section + 1) * SECTION, IN)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((OUT_TILE, ROWS), tl.float32)
    for start in range(section * SECTION, end, WIDTH):
        place = x + own[:, None] * x_row + (start + column)[None, :]
        left = tl.load(place) if WHOLE else tl.load(place, mask=(start + column < end)[None, :], other=0.0)
        total = add_product(
            *(total, left, start, end, first, codes, scales, factor, code_row, scale_row),
            *(KIND, OUT, BLOCK_ROWS, BLOCK_COLUMNS, FIRST_ROW, FIRST_COLUMN, GROUPS, E8M0, FACTOR),
            *(PAIRS, EXACT, WIDTH, OUT_TILE, WHOLE),
        )
    at = first + tl.arange(0, OUT_TILE)
    if BIAS:
        total += tl.load(bias + at, mask=at < OUT, other=0.0).to(tl.float32)[:, None]
    place = target + section.to(tl.int64) * target_section + row.to(tl.int64)[None, :] * target_row + at[:, None]
    tl.store(place, total.to(target.dtype.element_ty), mask=(at < OUT)[:, None] & (row < rows)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _add(
    partials,
    bias,
    out,
    rows,
    out_row,
    LEAVES: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = at < WIDTH
    leaf = rows.to(tl.int64) * WIDTH
    total = tree_sum(partials + row * WIDTH + at, leaf, exists, LEAVES)
    if BIAS:
        total += tl.load(bias + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + at, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def tree_sum(place, step, exists, COUNT: tl.constexpr):
    """COUNT numbers that lie `step` apart, neighbours added first."""
    if COUNT == 1:
        total = tl.load(place, mask=exists, other=0.0)
    elif COUNT == 2:
        total = _pair(place, step, exists)
    elif COUNT == 4:
        total = _four(place, step, exists)
    else:
        total = _four(place, step, exists) + _four(place + 4 * step, step, exists)
        if COUNT == 16:
            total += _four(place + 8 * step, step, exists) + _four(place + 12 * step, step, exists)
    return total


@triton.jit
def _four(place, step, exists):
    return _pair(place, step, exists) + _pair(place + 2 * step, step, exists)


@triton.jit
def _pair(place, step, exists):
    return tl.load(place, mask=exists, other=0.0) + tl.load(place + step, mask=exists, other=0.0)
