"""Short causal convolution over a block in Triton: no window of (state ++ inputs) is ever put together in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.short_conv.reference import check_arguments

CHANNELS = 256  # of one program


def short_conv_verify(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """As kernels.short_conv.reference. Channels contiguous in mixed and state, taps contiguous in weight."""
    check_arguments(mixed, state, slots, lengths)
    rows, longest, channels = mixed.shape
    if weight.shape != (channels, state.shape[1] + 1):
        raise ValueError(f"weight {tuple(weight.shape)} must be [{channels}, {state.shape[1] + 1}]")
    output = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    _verify_conv[(triton.cdiv(channels, CHANNELS), longest, rows)](
        *(mixed, weight, state, slots, lengths, output, mixed.stride(0), mixed.stride(1)),
        *(state.stride(0), state.stride(1)),
        LONGEST=longest,
        TOTAL=channels,
        WIDTH=weight.shape[1],
        CHANNELS=CHANNELS,
        num_warps=2,
    )
    return output


def short_conv_commit(mixed: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, kept: torch.Tensor) -> None:
    """As kernels.short_conv.reference. Channels contiguous. A row that keeps nothing does not touch its state."""
    check_arguments(mixed, state, slots, kept)
    rows, _, channels = mixed.shape
    _commit_conv[(triton.cdiv(channels, CHANNELS), rows)](
        *(mixed, state, slots, kept, mixed.stride(0), mixed.stride(1), state.stride(0), state.stride(1)),
        TOTAL=channels,
        BEFORE=state.shape[1],
        CHANNELS=CHANNELS,
        num_warps=2,
    )


@triton.jit
def _verify_conv(
    mixed,
    weight,
    state,
    slots,
    lengths,
    output,
    mixed_row,
    mixed_token,
    state_slot,
    state_token,
    LONGEST: tl.constexpr,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < TOTAL
    token = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    live = exists & (token < tl.load(lengths + row))
    total = tl.zeros((CHANNELS,), tl.float32)
    for tap in tl.static_range(WIDTH):
        at = token + tap - (WIDTH - 1)  # negative: in the state
        old = tl.load(
            state + slot * state_slot + (at + WIDTH - 1) * state_token + channel, mask=live & (at < 0), other=0.0
        )
        new = tl.load(mixed + row * mixed_row + at * mixed_token + channel, mask=live & (at >= 0), other=0.0)
        own = old.to(new.dtype).to(tl.float32) + new.to(tl.float32)  # one of them is zero
        total += own * tl.load(weight + channel * WIDTH + tap, mask=exists, other=0.0).to(tl.float32)
    result = total / (1.0 + tl.exp(-total))
    tl.store(output + (row * LONGEST + token) * TOTAL + channel, result.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _commit_conv(
    mixed,
    state,
    slots,
    kept,
    mixed_row,
    mixed_token,
    state_slot,
    state_token,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < TOTAL
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(kept + row).to(tl.int32)
    if count <= 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    # Oldest first: cell i takes what stands `count` further on, which no earlier round has written.
    for cell in tl.static_range(BEFORE):
        at = cell + count
        held = state + slot * state_slot + at * state_token + channel
        fresh = mixed + row * mixed_row + (at - BEFORE) * mixed_token + channel
        old = tl.load(held, mask=exists & (at < BEFORE), other=0.0)
        new = tl.load(fresh, mask=exists & (at >= BEFORE), other=0.0).to(old.dtype)
        tl.store(state + slot * state_slot + cell * state_token + channel, tl.where(at < BEFORE, old, new), mask=exists)
