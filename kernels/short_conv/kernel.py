"""Short causal convolution over blocks in Triton: no window of (state ++ inputs) is ever put together in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.kept_rows import KeptRows, check_kept_rows
from kernels.short_conv.reference import check_arguments, check_kept, check_rows

CHANNELS = 256  # of one program
BLOCK_TOKENS, BLOCK_CHANNELS = 16, 64  # of one that walks through a verified block, at a time


def short_conv_verify(
    mixed: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    kept: torch.Tensor,
    rows: KeptRows,
) -> torch.Tensor:
    """As kernels.short_conv.reference, in one launch. Channels contiguous in mixed, kept and state, taps in weight."""
    check_arguments(mixed, weight, state, slots, starts[1:])
    check_kept(kept, state)
    check_kept_rows(rows, slots)
    output = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    channels = mixed.shape[1]
    _verify_conv[(triton.cdiv(channels, BLOCK_CHANNELS), slots.shape[0])](
        *(mixed, weight, state, slots, starts, output, kept, *rows),
        *(mixed.stride(0), kept.stride(0), state.stride(0), state.stride(1)),
        TOTAL=channels,
        WIDTH=weight.shape[1],
        TOKENS=BLOCK_TOKENS,
        CHANNELS=BLOCK_CHANNELS,
        num_warps=4,
    )
    return output


def short_conv_advance(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """As kernels.short_conv.reference; layouts as for short_conv_verify. For rows of any length: a launch over all
    tokens, and one that writes the states.
    """
    check_arguments(mixed, weight, state, slots, starts[1:])
    tokens, channels = mixed.shape
    output = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    _convolve_tokens[(triton.cdiv(channels, CHANNELS), tokens)](
        *(mixed, weight, state, slots, starts, output, slots.shape[0]),
        *(mixed.stride(0), state.stride(0), state.stride(1)),
        TOTAL=channels,
        WIDTH=weight.shape[1],
        CHANNELS=CHANNELS,
        num_warps=2,
    )
    short_conv_replay(mixed, state, slots, starts[:-1], starts.diff())
    return output


def short_conv_replay(
    kept: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, count: torch.Tensor
) -> None:
    """As kernels.short_conv.reference. Channels contiguous. A row of which nothing stands does not touch its state."""
    check_kept(kept, state)
    check_rows(slots, first, count)
    channels = kept.shape[1]
    _append[(triton.cdiv(channels, CHANNELS), slots.shape[0])](
        *(kept, state, slots, first, count, kept.stride(0), state.stride(0), state.stride(1)),
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
    starts,
    output,
    kept,
    kept_first,
    kept_standing,
    kept_into,
    mixed_token,
    kept_token,
    state_slot,
    state_token,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program serves CHANNELS channels of a row, TOKENS tokens at a time, and is the only one to see their state."""
    BEFORE: tl.constexpr = WIDTH - 1
    row = tl.program_id(1)
    first = tl.load(starts + row).to(tl.int64)
    count = tl.load(starts + row + 1).to(tl.int64) - first
    if count <= 0:
        return
    keeps = count > 1
    into = tl.load(kept_into + row).to(tl.int64)
    standing = tl.load(kept_standing + row).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = channel < TOTAL
    own = mixed + first * mixed_token + channel
    stood = kept + tl.load(kept_first + row).to(tl.int64) * kept_token + channel
    held = state + tl.load(slots + row).to(tl.int64) * state_slot + channel

    # Input `at` of the row; below 0 of what stands before it, below -standing of the state.
    for begin in range(0, count, TOKENS):
        token = begin + tl.arange(0, TOKENS)[:, None]
        inside = exists & (token < count)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for tap in tl.static_range(WIDTH):
            at = token + tap - BEFORE
            new = tl.load(own + at * mixed_token, mask=inside & (at >= 0), other=0.0)
            if tap == BEFORE:
                tl.store(kept + (into + at) * kept_token + channel, new, mask=inside & keeps)
            before = at + standing
            late = tl.load(stood + before * kept_token, mask=inside & (at < 0) & (before >= 0), other=0.0)
            old = tl.load(held + (before + BEFORE) * state_token, mask=inside & (before < 0), other=0.0)
            taken = new.to(tl.float32) + late.to(tl.float32) + old.to(new.dtype).to(tl.float32)  # two of them are zero
            total += taken * tl.load(weight + channel * WIDTH + tap, mask=exists, other=0.0).to(tl.float32)
        result = total / (1.0 + tl.exp(-total))
        tl.store(output + (first + token) * TOTAL + channel, result.to(output.dtype.element_ty), mask=inside)

    tl.debug_barrier()  # all threads have read the state
    further = standing + tl.where(keeps, 0, 1)  # than where the state stands
    # Oldest first: cell i takes what stands `further` on, which no earlier round has written.
    for cell in tl.static_range(BEFORE):
        at = cell - standing + further - BEFORE
        before = cell + further - BEFORE
        new = tl.load(own + at * mixed_token, mask=exists & (at >= 0), other=0.0)
        late = tl.load(stood + before * kept_token, mask=exists & (at < 0) & (before >= 0), other=0.0)
        old = tl.load(held + (before + BEFORE) * state_token, mask=exists & (before < 0), other=0.0)
        moved = new.to(old.dtype) + late.to(old.dtype) + old
        tl.store(held + cell * state_token, moved, mask=exists & (further > 0))


@triton.jit(do_not_specialize=["rows"])
def _convolve_tokens(
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
    """A program serves a token: reading states only, it needs nothing of the others."""
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
def _append(
    kept,
    state,
    slots,
    kept_first,
    kept_standing,
    kept_token,
    state_slot,
    state_token,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < TOTAL
    row = tl.program_id(1)
    count = tl.load(kept_standing + row).to(tl.int64)
    if count <= 0:
        return
    first = tl.load(kept_first + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    # Oldest first: cell i takes what stands `count` further on, which no earlier round has written.
    for cell in tl.static_range(BEFORE):
        at = cell + count
        held = state + slot * state_slot + at * state_token + channel
        fresh = kept + (first + at - BEFORE) * kept_token + channel
        old = tl.load(held, mask=exists & (at < BEFORE), other=0.0)
        new = tl.load(fresh, mask=exists & (at >= BEFORE), other=0.0).to(old.dtype)
        tl.store(state + slot * state_slot + cell * state_token + channel, tl.where(at < BEFORE, old, new), mask=exists)
