"""Context KV and block KV of a DFlash drafter (arXiv 2602.06036) in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """How positions turn vectors: frequencies float32 [head_dim / 2], and the factor of cosine and sine."""

    frequencies: torch.Tensor
    scale: float = 1.0


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
    """Write the keys (normed, rotated) and values of context features into the pool of all layers, in place.

    projected [tokens, layers * 2 * kv_heads * head_dim], contiguous: what one GEMM makes of the features, for each
    layer its key heads and then its value heads; key_norms [layers, head_dim]; positions int64 [tokens]; rows int64
    [tokens], all different, a negative one is padding and written nowhere; pool [layers, pool rows, 2, kv_heads,
    head_dim], contiguous; pool_positions int64 [pool rows]. Norm and rotation run in float32 and round once. What is
    no finite number becomes 0, so that no context can spoil another's arithmetic. Raises ValueError for shapes that do
    not fit.
    """
    check_context(projected, key_norms, positions, rows, rotation, pool, pool_positions)
    layers, _, _, kv_heads, head_dim = pool.shape
    made = projected.view(-1, layers, 2, kv_heads, head_dim)
    keys = _turned(_normed(made[:, :, 0], key_norms[:, None], eps), positions[:, None, None], rotation)
    both = torch.stack([keys.to(pool.dtype), made[:, :, 1].to(pool.dtype)], dim=2).nan_to_num(0.0, 0.0, 0.0)
    stored = rows >= 0
    pool[:, rows[stored]] = both[stored].transpose(0, 1)
    pool_positions[rows[stored]] = positions[stored]


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
    """One layer's projections of block rows: keys and values into its pool, in place; the queries are returned.

    qkv [tokens, heads + 2 * kv_heads, head_dim]: query, key and value heads; query_norm, key_norm [head_dim];
    positions, rows int64 [tokens] as in `inject_context`; pool [pool rows, 2, kv_heads, head_dim], contiguous. Returns
    the queries, normed and rotated, [tokens, heads, head_dim]. Raises ValueError for shapes that do not fit.
    """
    check_block(qkv, query_norm, key_norm, positions, rows, rotation, pool)
    kv_heads = pool.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    query, keys, values = qkv.split([heads, kv_heads, kv_heads], dim=1)
    at = positions[:, None]
    keys = _turned(_normed(keys, key_norm, eps), at, rotation).to(pool.dtype)
    stored = rows >= 0
    pool[rows[stored]] = torch.stack([keys, values.to(pool.dtype)], dim=1)[stored]
    return _turned(_normed(query, query_norm, eps), at, rotation).to(qkv.dtype)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def _turned(x: torch.Tensor, positions: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x [..., head_dim], each pair (i, i + half) turned by its angle; positions broadcast against x's rows."""
    angles = positions[..., None].float() * rotation.frequencies
    cos, sin = angles.cos() * rotation.scale, angles.sin() * rotation.scale
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_context(
    projected: torch.Tensor,
    key_norms: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    rotation: Rotation,
    pool: torch.Tensor,
    pool_positions: torch.Tensor,
) -> None:
    if pool.dim() != 5 or pool.shape[2] != 2 or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)} must be [layers, rows, 2, kv_heads, head_dim], contiguous")
    layers, pool_rows, _, kv_heads, head_dim = pool.shape
    width = layers * 2 * kv_heads * head_dim
    if projected.shape[1:] != (width,) or not projected.is_contiguous():
        raise ValueError(f"projected {tuple(projected.shape)} must be [tokens, {width}] for this pool, contiguous")
    if key_norms.shape != (layers, head_dim) or pool_positions.shape != (pool_rows,):
        raise ValueError(
            f"key_norms {tuple(key_norms.shape)} must be {(layers, head_dim)} "
            f"and pool_positions {tuple(pool_positions.shape)} {(pool_rows,)}"
        )
    _check_rows(len(projected), head_dim, positions, rows, rotation)


def check_block(
    qkv: torch.Tensor,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    rotation: Rotation,
    pool: torch.Tensor,
) -> None:
    if pool.dim() != 4 or pool.shape[1] != 2 or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)} must be [rows, 2, kv_heads, head_dim], contiguous")
    kv_heads, head_dim = pool.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    if heads < 1 or heads % kv_heads or qkv.shape[2] != head_dim or not qkv.is_contiguous():
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be [tokens, heads + 2 * {kv_heads}, {head_dim}], contiguous, "
            f"with heads a multiple of {kv_heads}"
        )
    if query_norm.shape != (head_dim,) or key_norm.shape != (head_dim,):
        raise ValueError(
            f"query_norm {tuple(query_norm.shape)} and key_norm {tuple(key_norm.shape)} must be [{head_dim}]"
        )
    _check_rows(len(qkv), head_dim, positions, rows, rotation)


def _check_rows(tokens: int, head_dim: int, positions: torch.Tensor, rows: torch.Tensor, rotation: Rotation) -> None:
    if positions.shape != (tokens,) or rows.shape != (tokens,):
        raise ValueError(f"positions {tuple(positions.shape)} and rows {tuple(rows.shape)} must be [{tokens}]")
    if head_dim % 2 or rotation.frequencies.shape != (head_dim // 2,):
        raise ValueError(f"frequencies {tuple(rotation.frequencies.shape)} must be half of head_dim {head_dim}")
