"""The convolution of DFlash 2 in Triton: one program for a part of a row's channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.block_conv.reference import check_arguments

CHANNELS = 1024  # of one program


def convolve_block(x: torch.Tensor, dynamic: torch.Tensor, base: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """As kernels.block_conv.reference. x and base contiguous; taps and groups of a row of dynamic side by side."""
    check_arguments(x, dynamic, base, places)
    (rows, channels), (_, taps, groups) = x.shape, dynamic.shape
    output = torch.empty_like(x)
    block = min(CHANNELS, triton.next_power_of_2(channels))
    _convolve[(rows, triton.cdiv(channels, block))](
        *(x, dynamic, base, places, output, dynamic.stride(0)),
        TOTAL=channels,
        TAPS=taps,
        GROUPS=groups,
        CHANNELS=block,
        num_warps=4,
    )
    return output


@triton.jit
def _convolve(
    x,
    dynamic,
    base,
    places,
    output,
    dynamic_row,
    TOTAL: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < TOTAL
    group = channel // (TOTAL // GROUPS)
    place = tl.load(places + row)
    mixed = tl.zeros((CHANNELS,), tl.float32)
    for tap in tl.static_range(TAPS):
        there = exists & (tap <= place)
        value = tl.load(x + (row - tap) * TOTAL + channel, mask=there, other=0.0).to(tl.float32)
        weight = tl.load(base + tap * TOTAL + channel, mask=exists, other=0.0).to(tl.float32)
        own = tl.load(dynamic + row * dynamic_row + tap * GROUPS + group, mask=exists, other=0.0).to(tl.float32)
        mixed += (weight + own) * value
    tl.store(output + row * TOTAL + channel, mixed.to(output.dtype.element_ty), mask=exists)
