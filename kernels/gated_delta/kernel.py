"""The gated delta rule over short blocks in Triton: a verify reads the state once, a commit reads and writes it once.

A program holds a [key_dim, VALUES] slice of one head's state in registers and walks through the block's tokens: columns
of the state never mix, so slices need nothing of each other. The recurrence is exact in float32 and runs a row's
tokens in order: outputs do not depend on the batch, nor on how many tokens are verified. A commit is one weighted sum
over the kept tokens; a replay advances the state token by token as the verify does, to the same bits however the
tokens were cut into blocks (the multiply-add is written out, or a compiler might contract it in one of them only).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gated_delta.reference import BlockOutcome, check_arguments


def gated_delta_verify(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> BlockOutcome:
    """As kernels.gated_delta.reference. Inputs may have any strides but in the last dimension of query, key, value and
    memory; query and key have the same, so have log_decay and beta. key_dim and value_dim are powers of two. Raises
    ValueError otherwise.
    """
    check_arguments(key, value, memory, slots, starts[1:])
    _check_sizes(key, value)
    if query.stride() != key.stride():
        raise ValueError(f"query has strides {query.stride()}, key {key.stride()}: they must lie in memory alike")
    if log_decay.stride() != beta.stride():
        raise ValueError(f"log_decay has strides {log_decay.stride()}, beta {beta.stride()}: they must lie alike")
    tokens, heads, value_dim = value.shape
    output = torch.empty(tokens, heads, value_dim, dtype=torch.float32, device=value.device)
    corrected = torch.empty_like(output)
    decay = torch.empty(tokens, heads, dtype=torch.float32, device=value.device)
    columns = min(value_dim, 32)
    _verify[(value_dim // columns, heads, slots.shape[0])](
        *(query, key, value, log_decay, beta, memory, slots, starts, output, decay, corrected),
        *(*key.stride()[:2], *value.stride()[:2], *beta.stride(), memory.stride(0), memory.stride(1), memory.stride(2)),
        HEADS=heads,
        GROUP=heads // key.shape[1],
        KEY_DIM=key.shape[2],
        VALUE_DIM=value_dim,
        VALUES=columns,
        num_warps=4,
    )
    return BlockOutcome(output, decay, corrected)


def gated_delta_commit(
    key: torch.Tensor,
    decay: torch.Tensor,
    corrected: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """As kernels.gated_delta.reference: memory [slots, heads, key_dim, value_dim] float32 advances in place.

    decay and corrected contiguous. A row that keeps nothing neither reads nor writes its state. Raises ValueError for
    sizes that are not powers of two.
    """
    _advance(_commit, key, decay, corrected, memory, slots, first, kept)


def gated_delta_replay(
    key: torch.Tensor,
    log_decay: torch.Tensor,
    corrected: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """As gated_delta_commit, from each token's own log decay, token by token: to the bits that the verify saw."""
    _advance(_replay, key, log_decay, corrected, memory, slots, first, kept)


def _advance(
    run: Any,
    key: torch.Tensor,
    decay: torch.Tensor,
    corrected: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    check_arguments(key, corrected, memory, slots, first)
    check_arguments(key, corrected, memory, slots, kept)
    _check_sizes(key, corrected)
    _, heads, value_dim = corrected.shape
    columns = min(value_dim, 32)
    run[(value_dim // columns, heads, slots.shape[0])](
        *(key, decay.contiguous(), corrected.contiguous(), memory, slots, first, kept),
        *(*key.stride()[:2], memory.stride(0), memory.stride(1), memory.stride(2)),
        HEADS=heads,
        GROUP=heads // key.shape[1],
        KEY_DIM=key.shape[2],
        VALUE_DIM=value_dim,
        VALUES=columns,
        num_warps=4,
    )


def _check_sizes(key: torch.Tensor, value: torch.Tensor) -> None:
    for name, size in (("key_dim", key.shape[2]), ("value_dim", value.shape[2])):
        if size & (size - 1):
            raise ValueError(f"{name} is {size}: the kernel wants a power of two; use the reference")


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
    decay,
    corrected,
    key_token,
    key_head,
    value_token,
    value_head,
    gate_token,
    gate_head,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
    dim = tl.arange(0, KEY_DIM)
    column = part * VALUES + tl.arange(0, VALUES)
    state = tl.load(memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :])
    running = 0.0
    for at in range(first, stop):
        where = (head // GROUP) * key_head + at * key_token + dim
        own_query = tl.load(query + where).to(tl.float32)
        own_key = tl.load(key + where).to(tl.float32)
        own_value = tl.load(value + head * value_head + at * value_token + column).to(tl.float32)
        gate = head * gate_head + at * gate_token
        fade = tl.load(log_decay + gate)
        state = state * tl.exp(fade)
        fix = tl.load(beta + gate) * (own_value - tl.sum(state * own_key[:, None], 0))
        state = tl.fma(own_key[:, None], fix[None, :], state)
        running += fade
        cell = at * HEADS + head
        tl.store(output + cell * VALUE_DIM + column, tl.sum(state * own_query[:, None], 0))
        tl.store(corrected + cell * VALUE_DIM + column, fix)
        tl.store(decay + cell, running, mask=part == 0)


@triton.jit
def _commit(
    key,
    decay,
    corrected,
    memory,
    slots,
    starts,
    kept,
    key_token,
    key_head,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    count = tl.load(kept + row).to(tl.int64)
    if count <= 0:
        return
    first = tl.load(starts + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    dim = tl.arange(0, KEY_DIM)
    column = part * VALUES + tl.arange(0, VALUES)
    total = tl.load(decay + (first + count - 1) * HEADS + head)
    where = memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :]
    state = tl.load(where) * tl.exp(total)
    for at in range(first, first + count):
        cell = at * HEADS + head
        weight = tl.exp(total - tl.load(decay + cell))
        own_key = tl.load(key + (head // GROUP) * key_head + at * key_token + dim).to(tl.float32)
        fix = tl.load(corrected + cell * VALUE_DIM + column)
        state = state + (own_key * weight)[:, None] * fix[None, :]
    tl.store(where, state)


@triton.jit
def _replay(
    key,
    log_decay,
    corrected,
    memory,
    slots,
    starts,
    kept,
    key_token,
    key_head,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    count = tl.load(kept + row).to(tl.int64)
    if count <= 0:
        return
    first = tl.load(starts + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    dim = tl.arange(0, KEY_DIM)
    column = part * VALUES + tl.arange(0, VALUES)
    where = memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :]
    state = tl.load(where)
    for at in range(first, first + count):
        cell = at * HEADS + head
        own_key = tl.load(key + (head // GROUP) * key_head + at * key_token + dim).to(tl.float32)
        fix = tl.load(corrected + cell * VALUE_DIM + column)
        state = tl.fma(own_key[:, None], fix[None, :], state * tl.exp(tl.load(log_decay + cell)))
    tl.store(where, state)
