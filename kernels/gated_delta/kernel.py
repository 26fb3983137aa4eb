"""The gated delta rule over short blocks in Triton: a step reads and writes a state once.

A program holds a [key_dim, VALUES] slice of one head's state in registers: columns of the state never mix, so slices
need nothing of each other. It replays what stands of the slot's last block, writes the state, and walks on through the
tokens of this one. The recurrence is exact in float32 and runs a row's tokens in order: outputs do not depend on the
batch, nor on how many tokens are verified, and a replay leaves the bits that the verify saw (the multiply-add is
written out, or a compiler might contract it in one of them only).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gated_delta.reference import KeptDelta, check_arguments, check_kept, check_rows
from kernels.kept_rows import KeptRows, check_kept_rows


def gated_delta_verify(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    kept: KeptDelta,
    rows: KeptRows,
) -> torch.Tensor:
    """As kernels.gated_delta.reference. Inputs may have any strides but in the last dimension of query, key, value and
    memory; query and key have the same, so have log_decay and beta; all that is kept is contiguous. key_dim and
    value_dim are powers of two. Raises ValueError otherwise.
    """
    check_kept(kept, memory)
    check_kept_rows(rows, slots)
    if not all(part.is_contiguous() for part in kept):
        raise ValueError("what is kept must be contiguous")
    return _run(query, key, value, log_decay, beta, memory, slots, starts, kept, rows)


def gated_delta_advance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As kernels.gated_delta.reference; layouts as for gated_delta_verify."""
    return _run(query, key, value, log_decay, beta, memory, slots, starts, None, None)


def gated_delta_replay(
    kept: KeptDelta, memory: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, count: torch.Tensor
) -> None:
    """As kernels.gated_delta.reference. A row of which nothing stands neither reads nor writes its state."""
    check_kept(kept, memory)
    check_rows(slots, first, count)
    heads, key_dim, value_dim = memory.shape[1:]
    _check_sizes(key_dim, value_dim)
    columns = min(value_dim, 32)
    _replay[(value_dim // columns, heads, slots.shape[0])](
        *(*kept, memory, slots, first, count, *memory.stride()[:3]),
        HEADS=heads,
        KEY_HEADS=kept.key.shape[1],
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        VALUES=columns,
        num_warps=4,
    )


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    kept: KeptDelta | None,
    rows: KeptRows | None,
) -> torch.Tensor:
    check_arguments(key, value, memory, slots, starts[1:])
    _check_sizes(key.shape[2], value.shape[2])
    if query.stride() != key.stride():
        raise ValueError(f"query has strides {query.stride()}, key {key.stride()}: they must lie in memory alike")
    if log_decay.stride() != beta.stride():
        raise ValueError(f"log_decay has strides {log_decay.stride()}, beta {beta.stride()}: they must lie alike")
    tokens, heads, value_dim = value.shape
    output = torch.empty(tokens, heads, value_dim, dtype=torch.float32, device=value.device)
    columns = min(value_dim, 32)
    _verify[(value_dim // columns, heads, slots.shape[0])](
        *(query, key, value, log_decay, beta, memory, slots, starts, output),
        *(kept or (memory,) * 3),
        *(rows or (slots,) * 3),
        *(*key.stride()[:2], *value.stride()[:2], *beta.stride(), *memory.stride()[:3]),
        CERTAIN=kept is None,
        HEADS=heads,
        KEY_HEADS=key.shape[1],
        KEY_DIM=key.shape[2],
        VALUE_DIM=value_dim,
        VALUES=columns,
        num_warps=4,
    )
    return output


def _check_sizes(key_dim: int, value_dim: int) -> None:
    for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
        if size & (size - 1):
            raise ValueError(f"{name} is {size}: the kernel wants a power of two; use the reference")


@triton.jit
def _replayed(
    state,
    kept_key,
    kept_decay,
    kept_corrected,
    first,
    count,
    head,
    column,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """The state [KEY_DIM, columns] of a head behind `count` tokens kept from place `first` on."""
    dim = tl.arange(0, KEY_DIM)
    for at in range(first, first + count):
        fade = tl.load(kept_decay + at * HEADS + head)
        own_key = tl.load(kept_key + (at * KEY_HEADS + head // (HEADS // KEY_HEADS)) * KEY_DIM + dim)
        fix = tl.load(kept_corrected + (at * HEADS + head) * VALUE_DIM + column)
        state = tl.fma(own_key[:, None], fix[None, :], state * tl.exp(fade))
    return state


@triton.jit
def _verify(
    query,
    key,
    value,
    log_decay,
    beta,
    memory,
    slots,
    starts,
    output,
    kept_key,
    kept_decay,
    kept_corrected,
    kept_first,
    kept_standing,
    kept_into,
    key_token,
    key_head,
    value_token,
    value_head,
    gate_token,
    gate_head,
    memory_slot,
    memory_head,
    memory_key,
    CERTAIN: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    first = tl.load(starts + row).to(tl.int64)
    stop = tl.load(starts + row + 1).to(tl.int64)
    if first >= stop:
        return
    slot = tl.load(slots + row).to(tl.int64)
    group: tl.constexpr = HEADS // KEY_HEADS
    shared = head // group
    dim = tl.arange(0, KEY_DIM)
    column = part * VALUES + tl.arange(0, VALUES)
    where = memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :]
    state = tl.load(where)
    keeps = False
    into = first
    if not CERTAIN:
        keeps = stop - first > 1
        into = tl.load(kept_into + row).to(tl.int64)
        standing = tl.load(kept_standing + row).to(tl.int64)
        if standing > 0:
            since = tl.load(kept_first + row).to(tl.int64)
            state = _replayed(
                state,
                kept_key,
                kept_decay,
                kept_corrected,
                since,
                standing,
                head,
                column,
                HEADS,
                KEY_HEADS,
                KEY_DIM,
                VALUE_DIM,
            )
            if keeps:
                tl.store(where, state)
    for at in range(first, stop):
        own = shared * key_head + at * key_token + dim
        own_query = tl.load(query + own).to(tl.float32)
        own_key = tl.load(key + own).to(tl.float32)
        own_value = tl.load(value + head * value_head + at * value_token + column).to(tl.float32)
        gate = head * gate_head + at * gate_token
        fade = tl.load(log_decay + gate)
        state = state * tl.exp(fade)
        fix = tl.load(beta + gate) * (own_value - tl.sum(state * own_key[:, None], 0))
        state = tl.fma(own_key[:, None], fix[None, :], state)
        tl.store(output + (at * HEADS + head) * VALUE_DIM + column, tl.sum(state * own_query[:, None], 0))
        if not CERTAIN:
            place = into + at - first
            tl.store(kept_corrected + (place * HEADS + head) * VALUE_DIM + column, fix, mask=keeps)
            # What several programs read is written by one of them.
            tl.store(kept_decay + place * HEADS + head, fade, mask=keeps & (part == 0))
            shares = keeps & (part == 0) & (head % group == 0)
            tl.store(kept_key + (place * KEY_HEADS + shared) * KEY_DIM + dim, own_key, mask=shares)
    if not keeps:
        tl.store(where, state)


@triton.jit
def _replay(
    kept_key,
    kept_decay,
    kept_corrected,
    memory,
    slots,
    kept_first,
    kept_standing,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(2)
    count = tl.load(kept_standing + row).to(tl.int64)
    if count <= 0:
        return
    first = tl.load(kept_first + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    dim = tl.arange(0, KEY_DIM)
    column = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    where = memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :]
    state = _replayed(
        tl.load(where),
        kept_key,
        kept_decay,
        kept_corrected,
        first,
        count,
        head,
        column,
        HEADS,
        KEY_HEADS,
        KEY_DIM,
        VALUE_DIM,
    )
    tl.store(where, state)
