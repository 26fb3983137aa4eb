"""Rotate and append in Triton: one program for a token and a head. Heads are the query's, then the keys'."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.kv_append.reference import check_arguments, check_norms
from kernels.scaling import scaled_to_fp8


def rotate_and_append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> torch.Tensor:
    """As kernels.kv_append.reference. Tensors may have any strides but in the last dimension; cos and sin contiguous.

    The returned query is contiguous.
    """
    check_arguments(query, key, value, cos, sin, rows, key_cache, value_cache, key_scales, value_scales)
    check_norms(query_norm, key_norm, query.shape[2])
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _rotate_and_append[(tokens, heads + kv_heads)](
        *(query, key, value, cos, sin, rows, key_cache, value_cache, rotated),
        *(query if key_scales is None else key_scales, query if value_scales is None else value_scales),
        *(cos if query_norm is None else query_norm, cos if key_norm is None else key_norm, norm_eps),
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        *(key_cache.stride(0), key_cache.stride(1), key_cache.stride(2)),
        *(value_cache.stride(0), value_cache.stride(1), value_cache.stride(2)),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        ROTARY=cos.shape[1],
        BLOCK_TOKENS=key_cache.shape[1],
        SCALES=key_scales is not None,
        NORM=query_norm is not None,
        num_warps=1,
    )
    return rotated


@triton.jit
def _rotate(source, cos, sin, dim, norm, norm_eps, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr):
    """The head at `source`, normed if NORM, its first ROTARY dimensions turned."""
    HALF: tl.constexpr = ROTARY // 2
    head = tl.load(source + dim, mask=dim < HEAD_DIM, other=0.0)
    turning = dim < ROTARY
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    own = head.to(tl.float32)
    other = tl.load(source + partner, mask=turning, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(own * own, 0) / HEAD_DIM + norm_eps)
        own = own * scale * tl.load(norm + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        other = other * scale * tl.load(norm + partner, mask=turning, other=0.0).to(tl.float32)
        own = own.to(head.dtype).to(tl.float32)  # rounded as a norm of its own would be
        other = other.to(head.dtype).to(tl.float32)
    other = tl.where(dim < HALF, -other, other)
    cosine = tl.load(cos + dim, mask=turning, other=1.0).to(tl.float32)
    sine = tl.load(sin + dim, mask=turning, other=0.0).to(tl.float32)
    return tl.where(turning, own * cosine + other * sine, own).to(head.dtype)


@triton.jit
def _rotate_and_append(
    query,
    key,
    value,
    cos,
    sin,
    rows,
    key_cache,
    value_cache,
    rotated,
    key_scales,
    value_scales,
    query_norm,
    key_norm,
    norm_eps,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    key_cache_block,
    key_cache_token,
    key_cache_head,
    value_cache_block,
    value_cache_token,
    value_cache_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    cos += token * ROTARY
    sin += token * ROTARY
    if head < HEADS:
        source = query + token * query_token + head * query_head
        turned = _rotate(source, cos, sin, dim, query_norm, norm_eps, HEAD_DIM, ROTARY, NORM)
        tl.store(rotated + (token * HEADS + head) * HEAD_DIM + dim, turned, mask=in_dim)
    else:
        kv_head = head - HEADS
        row = tl.load(rows + token).to(tl.int64)
        if row >= 0:
            block = row // BLOCK_TOKENS
            within = row % BLOCK_TOKENS
            source = key + token * key_token + kv_head * key_head
            turned = _rotate(source, cos, sin, dim, key_norm, norm_eps, HEAD_DIM, ROTARY, NORM)
            where = block * key_cache_block + within * key_cache_token + kv_head * key_cache_head + dim
            cell = row * (tl.num_programs(1) - HEADS) + kv_head
            if SCALES:
                turned = scaled_to_fp8(turned, in_dim, key_scales + cell)
            tl.store(key_cache + where, turned.to(key_cache.dtype.element_ty), mask=in_dim)
            plain = tl.load(value + token * value_token + kv_head * value_head + dim, mask=in_dim, other=0.0)
            if SCALES:
                plain = scaled_to_fp8(plain, in_dim, value_scales + cell)
            where = block * value_cache_block + within * value_cache_token + kv_head * value_cache_head + dim
            tl.store(value_cache + where, plain.to(value_cache.dtype.element_ty), mask=in_dim)
