"""What attention kernels over a ragged PagedBatch share: whose tile a program has, and the sum over sections."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def add_sections(
    output: torch.Tensor,
    part: torch.Tensor,
    peak: torch.Tensor,
    mass: torch.Tensor,
    group: int,
    sinks: torch.Tensor | None = None,
) -> None:
    """output [tokens, heads, width], contiguous: the sections' softmaxes as one, sinks [heads] included.

    Of each section, float32: part [splits, tokens, heads, width], what its values add up to when weighed by
    2 ** (score - peak); peak and mass [splits, tokens, heads], the highest score and the weights' sum. Scores are in
    units of log 2. Sections are added in order, `group` heads to a program.
    """
    splits, tokens, heads, width = part.shape
    _add_sections[(tokens, heads // group)](
        *(output, part, peak, mass, output if sinks is None else sinks, tokens, splits),
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=width,
        BLOCK_DIM=triton.next_power_of_2(width),
        BLOCK_GROUP=triton.next_power_of_2(group),
        SINKS=sinks is not None,
        num_warps=min(8, triton.next_power_of_2(max(1, group * width // 256))),
    )


@triton.jit
def request_of(query_starts, requests, tile, TILE_ROWS: tl.constexpr):
    """The request that tile number `tile` belongs to; request r's tiles begin at query_starts[r] // TILE_ROWS + r."""
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        begins = tl.load(query_starts + middle) // TILE_ROWS + middle
        if begins <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["tokens", "splits"])
def _add_sections(
    output,
    part,
    peak,
    mass,
    sinks,
    tokens,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One program a query row and KV head: its sections in order. A section that a row does not see weighs nothing."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    token = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK_GROUP)
    valid = within < GROUP
    head = tl.program_id(1) * GROUP + within
    dim = tl.arange(0, BLOCK_DIM)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    top = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        total = total + 1.0
    seen = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for split in range(splits):
        cell = (split * tokens + token) * HEADS + head
        own_top = tl.load(peak + cell, mask=valid, other=0.0)
        own_total = tl.load(mass + cell, mask=valid, other=1.0)
        own = tl.load(part + cell[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, own_top)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        keep = tl.exp2(top - shift)
        joins = tl.exp2(own_top - shift)
        total = total * keep + own_total * joins
        seen = seen * keep[:, None] + own * joins[:, None]
        top = higher
    where = output + (token * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(where, (seen / total[:, None]).to(output.dtype.element_ty), mask=mask)
