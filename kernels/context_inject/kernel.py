"""Context and block KV in Triton: a GEMM has left projections, one launch norms, rotates and writes them.

The projections are read once and the pool's rows written once; angles are made from positions where they are needed.
A program takes one token's heads of one layer (context) or one KV head with its group of query heads (block): a row's
result depends on its own token alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.context_inject.reference import Rotation, check_block, check_context


def inject_context(
    projected: torch.Tensor,
    key_norms: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    rotation: Rotation,
    eps: float,
    pool: torch.Tensor,
    pool_positions: torch.Tensor,
) -> None:
    """As kernels.context_inject.reference, which defines every argument."""
    check_context(projected, key_norms, positions, rows, rotation, pool, pool_positions)
    layers, kv_heads, head_dim = pool.shape[0], *pool.shape[3:]
    dims = triton.next_power_of_2(head_dim // 2)
    heads = triton.next_power_of_2(kv_heads)
    _write_context[(len(projected), layers)](
        *(projected, key_norms, positions, rows, rotation.frequencies, pool, pool_positions),
        *(rotation.scale, eps, pool.stride(0)),
        LAYERS=layers,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=heads,
        BLOCK_HALF=dims,
        num_warps=max(1, min(8, heads * dims // 128)),
    )


def inject_block(
    qkv: torch.Tensor,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    rotation: Rotation,
    eps: float,
    pool: torch.Tensor,
) -> torch.Tensor:
    """As kernels.context_inject.reference. Rows of padding tokens are returned as well, from whatever they hold."""
    check_block(qkv, query_norm, key_norm, positions, rows, rotation, pool)
    kv_heads, head_dim = pool.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    query = torch.empty(len(qkv), heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _write_block[(len(qkv), kv_heads)](
        *(qkv, query_norm, key_norm, positions, rows, rotation.frequencies, pool, query, rotation.scale, eps),
        GROUP=heads // kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_GROUP=triton.next_power_of_2(heads // kv_heads),
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return query


@triton.jit
def _write_context(
    projected,
    key_norms,
    positions,
    rows,
    frequencies,
    pool,
    pool_positions,
    scale,
    eps,
    pool_layer,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    WIDTH: tl.constexpr = KV_HEADS * HEAD_DIM
    token = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + token)
    if row >= 0:
        position = tl.load(positions + token)
        if layer == 0:
            tl.store(pool_positions + row, position)
        head = tl.arange(0, BLOCK_HEADS)
        half = tl.arange(0, BLOCK_HALF)
        cosine, sine = _angles(position, frequencies, scale, half, HEAD_DIM)
        source = projected + (token * LAYERS + layer) * 2 * WIDTH
        target = pool + layer * pool_layer + row * 2 * WIDTH
        norm = key_norms + layer * HEAD_DIM
        first, second, at, valid = _normed(source, norm, head, head < KV_HEADS, half, eps, HEAD_DIM)
        _store_finite(target + at, first * cosine - second * sine, valid)
        _store_finite(target + at + HEAD_DIM // 2, second * cosine + first * sine, valid)
        for part in tl.static_range(2):
            where = WIDTH + at + part * (HEAD_DIM // 2)
            value = tl.load(source + where, mask=valid, other=0.0)
            _store_finite(target + where, value.to(tl.float32), valid)


@triton.jit
def _write_block(
    qkv,
    query_norm,
    key_norm,
    positions,
    rows,
    frequencies,
    pool,
    query,
    scale,
    eps,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    HEADS: tl.constexpr = GROUP * KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    half = tl.arange(0, BLOCK_HALF)
    cosine, sine = _angles(tl.load(positions + token), frequencies, scale, half, HEAD_DIM)
    source = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    within = tl.arange(0, BLOCK_GROUP)
    head = kv_head * GROUP + within
    first, second, at, valid = _normed(source, query_norm, head, within < GROUP, half, eps, HEAD_DIM)
    target = query + token * HEADS * HEAD_DIM + at
    tl.store(target, (first * cosine - second * sine).to(query.dtype.element_ty), mask=valid)
    tl.store(target + HALF, (second * cosine + first * sine).to(query.dtype.element_ty), mask=valid)
    row = tl.load(rows + token)
    if row >= 0:
        one = tl.arange(0, 1) + HEADS + kv_head
        front, back, where, exists = _normed(source, key_norm, one, one >= 0, half, eps, HEAD_DIM)
        cell = pool + (row * 2 * KV_HEADS - HEADS) * HEAD_DIM + where
        tl.store(cell, (front * cosine - back * sine).to(pool.dtype.element_ty), mask=exists)
        tl.store(cell + HALF, (back * cosine + front * sine).to(pool.dtype.element_ty), mask=exists)
        for part in tl.static_range(2):
            behind = KV_HEADS * HEAD_DIM + part * HALF
            value = tl.load(source + where + behind, mask=exists, other=0.0)
            tl.store(cell + behind, value.to(pool.dtype.element_ty), mask=exists)


@triton.jit
def _angles(position, frequencies, scale, half, HEAD_DIM: tl.constexpr):
    """Cosine and sine [1, half] of a position."""
    frequency = tl.load(frequencies + half, mask=half < HEAD_DIM // 2, other=0.0)
    angle = position.to(tl.float32) * frequency
    return (tl.cos(angle) * scale)[None, :], (tl.sin(angle) * scale)[None, :]


@triton.jit
def _normed(source, norm, head, exists, half, eps, HEAD_DIM: tl.constexpr):
    """The heads' halves, normed, float32 [heads, half] each; where at source the first ones are; which exist."""
    HALF: tl.constexpr = HEAD_DIM // 2
    at = head[:, None] * HEAD_DIM + half[None, :]
    valid = exists[:, None] & (half < HALF)[None, :]
    first = tl.load(source + at, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(source + at + HALF, mask=valid, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, 1)
    factor = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
    first *= factor * tl.load(norm + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    second *= factor * tl.load(norm + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    return first, second, at, valid


@triton.jit
def _store_finite(target, wide, mask):
    """Rounded to the target's dtype; 0 for what is then no finite number."""
    own = wide.to(target.dtype.element_ty)
    finite = tl.abs(own.to(tl.float32)) < float("inf")
    tl.store(target, tl.where(finite, own, 0.0), mask=mask)
