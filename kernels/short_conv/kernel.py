"""Short causal convolution over a block in Triton: no window of (state ++ inputs) is ever put together in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.short_conv.reference import check_arguments

CHANNELS = 256  # of one program


def short_conv_verify(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """As kernels.short_conv.reference. Channels contiguous in mixed and state, taps contiguous in weight."""
    check_arguments(mixed, state, slots, starts[1:])
    tokens, channels = mixed.shape
    if weight.shape != (channels, state.shape[1] + 1):
        raise ValueError(f"weight {tuple(weight.shape)} must be [{channels}, {state.shape[1] + 1}]")
    output = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    _verify_conv[(triton.cdiv(channels, CHANNELS), tokens)](
        *(mixed, weight, state, slots, starts, output, slots.shape[0]),
        *(mixed.stride(0), state.stride(0), state.stride(1)),
        TOTAL=channels,
        WIDTH=weight.shape[1],
        CHANNELS=CHANNELS,
        num_warps=2,
    )
    return output


def short_conv_commit(
    mixed: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, kept: torch.Tensor
) -> None:
    """As kernels.short_conv.reference. Channels contiguous. A row that keeps nothing does not touch its state."""
    check_arguments(mixed, state, slots, first)
    check_arguments(mixed, state, slots, kept)
    channels = mixed.shape[1]
    _commit_conv[(triton.cdiv(channels, CHANNELS), slots.shape[0])](
        *(mixed, state, slots, first, kept, mixed.stride(0), state.stride(0), state.stride(1)),
        TOTAL=channels,
        BEFORE=state.shape[1],
        CHANNELS=CHANNELS,
        num_warps=2,
    )


@triton.jit(do_not_specialize=["rows"])
def _verify_conv(
    mixed,
    weight,
    state,
    slots,
    starts,
    output,
    rows,
    mixed_token,
    state_slot,
    state_token,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < TOTAL
    token = tl.program_id(1).to(tl.int64)
    row = -1  # the last one that begins at this token or before it
    beyond = rows + 1
    while beyond - row > 1:
        middle = (row + beyond) // 2
        if tl.load(starts + middle) <= token:
            row = middle
        else:
            beyond = middle
    if row >= rows:
        return
    first = tl.load(starts + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    total = tl.zeros((CHANNELS,), tl.float32)
    for tap in tl.static_range(WIDTH):
        at = token - first + tap - (WIDTH - 1)  # in the row; negative: in the state
        old = tl.load(
            state + slot * state_slot + (at + WIDTH - 1) * state_token + channel, mask=exists & (at < 0), other=0.0
        )
        new = tl.load(mixed + (first + at) * mixed_token + channel, mask=exists & (at >= 0), other=0.0)
        own = old.to(new.dtype).to(tl.float32) + new.to(tl.float32)  # one of them is zero
        total += own * tl.load(weight + channel * WIDTH + tap, mask=exists, other=0.0).to(tl.float32)
    result = total / (1.0 + tl.exp(-total))
    tl.store(output + token * TOTAL + channel, result.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _commit_conv(
    mixed,
    state,
    slots,
    starts,
    kept,
    mixed_token,
    state_slot,
    state_token,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < TOTAL
    row = tl.program_id(1)
    count = tl.load(kept + row).to(tl.int64)
    if count <= 0:
        return
    first = tl.load(starts + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    # Oldest first: cell i takes what stands `count` further on, which no earlier round has written.
    for cell in tl.static_range(BEFORE):
        at = cell + count
        held = state + slot * state_slot + at * state_token + channel
        fresh = mixed + (first + at - BEFORE) * mixed_token + channel
        old = tl.load(held, mask=exists & (at < BEFORE), other=0.0)
        new = tl.load(fresh, mask=exists & (at >= BEFORE), other=0.0).to(old.dtype)
        tl.store(state + slot * state_slot + cell * state_token + channel, tl.where(at < BEFORE, old, new), mask=exists)
