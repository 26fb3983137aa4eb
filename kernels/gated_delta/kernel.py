"""The gated delta rule over short blocks in Triton: a verify reads the state once, a commit reads and writes it once.

A program holds a [key_dim, VALUES] slice of one head's state in registers and walks through the block's tokens: columns
of the state never mix, so slices need nothing of each other. The recurrence is exact in float32 and runs a row's
tokens in order: outputs do not depend on the batch, nor on how many tokens are verified.
"""

from __future__ import annotations

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
    lengths: torch.Tensor,
) -> BlockOutcome:
    """As kernels.gated_delta.reference. Inputs may have any strides but in the last dimension of query, key, value and
    memory; query and key have the same. key_dim and value_dim are powers of two. Raises ValueError otherwise.
    """
    check_arguments(key, value, memory, slots, lengths)
    _check_sizes(key, value)
    if query.stride() != key.stride():
        raise ValueError(f"query has strides {query.stride()}, key {key.stride()}: they must lie in memory alike")
    if log_decay.stride() != beta.stride():
        raise ValueError(f"log_decay has strides {log_decay.stride()}, beta {beta.stride()}: they must lie alike")
    rows, heads, longest, value_dim = value.shape
    output = torch.zeros(rows, heads, longest, value_dim, dtype=torch.float32, device=value.device)
    corrected = torch.zeros_like(output)
    decay = torch.zeros(rows, heads, longest, dtype=torch.float32, device=value.device)
    columns = min(value_dim, 32)
    _verify[(value_dim // columns, heads, rows)](
        *(query, key, value, log_decay, beta, memory, slots, lengths, output, decay, corrected),
        *(*key.stride()[:3], *value.stride()[:3], *beta.stride(), memory.stride(0), memory.stride(1), memory.stride(2)),
        HEADS=heads,
        GROUP=heads // key.shape[1],
        LONGEST=longest,
        KEY_DIM=key.shape[3],
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
    kept: torch.Tensor,
) -> None:
    """As kernels.gated_delta.reference: memory [slots, heads, key_dim, value_dim] float32 advances in place.

    decay and corrected contiguous. A row that keeps nothing neither reads nor writes its state. Raises ValueError for
    sizes that are not powers of two.
    """
    check_arguments(key, corrected, memory, slots, kept)
    _check_sizes(key, corrected)
    rows, heads, longest, value_dim = corrected.shape
    columns = min(value_dim, 32)
    _commit[(value_dim // columns, heads, rows)](
        *(key, decay.contiguous(), corrected.contiguous(), memory, slots, kept),
        *(*key.stride()[:3], memory.stride(0), memory.stride(1), memory.stride(2)),
        HEADS=heads,
        GROUP=heads // key.shape[1],
        LONGEST=longest,
        KEY_DIM=key.shape[3],
        VALUE_DIM=value_dim,
        VALUES=columns,
        num_warps=4,
    )


def _check_sizes(key: torch.Tensor, value: torch.Tensor) -> None:
    for name, size in (("key_dim", key.shape[3]), ("value_dim", value.shape[3])):
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
    lengths,
    output,
    decay,
    corrected,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    gate_row,
    gate_head,
    gate_token,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LONGEST: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), LONGEST)
    dim = tl.arange(0, KEY_DIM)
    column = part * VALUES + tl.arange(0, VALUES)
    state = tl.load(memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :])
    running = 0.0
    cell = (row * HEADS + head) * LONGEST
    for at in range(length):
        where = row * key_row + (head // GROUP) * key_head + at * key_token + dim
        own_query = tl.load(query + where).to(tl.float32)
        own_key = tl.load(key + where).to(tl.float32)
        own_value = tl.load(value + row * value_row + head * value_head + at * value_token + column).to(tl.float32)
        gate = row * gate_row + head * gate_head + at * gate_token
        fade = tl.load(log_decay + gate)
        state = state * tl.exp(fade)
        fix = tl.load(beta + gate) * (own_value - tl.sum(state * own_key[:, None], 0))
        state = state + own_key[:, None] * fix[None, :]
        running += fade
        tl.store(output + (cell + at) * VALUE_DIM + column, tl.sum(state * own_query[:, None], 0))
        tl.store(corrected + (cell + at) * VALUE_DIM + column, fix)
        tl.store(decay + cell + at, running, mask=part == 0)


@triton.jit
def _commit(
    key,
    decay,
    corrected,
    memory,
    slots,
    kept,
    key_row,
    key_head,
    key_token,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LONGEST: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.load(kept + row).to(tl.int32), LONGEST)
    if count <= 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    dim = tl.arange(0, KEY_DIM)
    column = part * VALUES + tl.arange(0, VALUES)
    cell = (row * HEADS + head) * LONGEST
    total = tl.load(decay + cell + count - 1)
    where = memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :]
    state = tl.load(where) * tl.exp(total)
    for at in range(count):
        weight = tl.exp(total - tl.load(decay + cell + at))
        own_key = tl.load(key + row * key_row + (head // GROUP) * key_head + at * key_token + dim).to(tl.float32)
        fix = tl.load(corrected + (cell + at) * VALUE_DIM + column)
        state = state + (own_key * weight)[:, None] * fix[None, :]
    tl.store(where, state)
