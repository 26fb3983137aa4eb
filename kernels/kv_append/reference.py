"""Rotate and append in plain torch. Rotary embedding: arXiv 2104.09864, in the two-halves layout of transformers."""

from __future__ import annotations

import torch


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
    """Rotate query and key, write key and value into the cache at `rows`, return the rotated query.

    query_norm, key_norm [head_dim]: weights of an RMSNorm of each head before it turns; for zero-centred checkpoints
    1 + the stored scale.

    query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim]; cos, sin [tokens, rotary_dim], both
    halves alike; only the first rotary_dim of head_dim turn. Caches [blocks, block_tokens, kv_heads, head_dim], written
    in place and in their own dtype; rows int [tokens]: block * block_tokens + offset, all different; a negative one is
    a padding token, which is not stored. Rotates in float32. key_scales, value_scales [blocks, block_tokens, kv_heads]
    of an e4m3 cache get for each vector the power of two by which its largest element is stored as 224 to 448, and the
    vector is stored divided by it. Raises ValueError for shapes that do not fit.
    """
    check_arguments(query, key, value, cos, sin, rows, key_cache, value_cache, key_scales, value_scales)
    check_norms(query_norm, key_norm, query.shape[2])
    query, key = _normed(query, query_norm, norm_eps), _normed(key, key_norm, norm_eps)
    stored = rows >= 0
    at = rows[stored].long()
    block, offset = at // key_cache.shape[1], at % key_cache.shape[1]
    for cache, scales, vectors in (
        (key_cache, key_scales, _rotate(key, cos, sin)[stored]),
        (value_cache, value_scales, value[stored]),
    ):
        if scales is not None:
            _, exponents = torch.frexp(vectors.float().abs().amax(dim=-1).clamp_min(2.0**-100) / 448)
            own = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
            scales[block, offset] = own.to(scales.dtype)
            vectors = vectors / own[..., None]
        # fp8 tensors can be indexed as bytes only
        stored_as = torch.uint8 if cache.dtype.itemsize == 1 else cache.dtype
        cache.view(stored_as)[block, offset] = vectors.to(cache.dtype).view(stored_as)
    return _rotate(query, cos, sin)


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turning = x[..., : cos.shape[1]].float()
    low, high = turning.chunk(2, dim=-1)
    turned = turning * cos.float()[:, None] + torch.cat([-high, low], dim=-1) * sin.float()[:, None]
    return torch.cat([turned.to(x.dtype), x[..., cos.shape[1] :]], dim=-1)


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    tokens, kv_heads, head_dim = key.shape
    if value.shape != key.shape or query.shape[0] != tokens or query.shape[2] != head_dim:
        raise ValueError(
            f"query {tuple(query.shape)} and value {tuple(value.shape)} do not fit key {tuple(key.shape)}: want "
            f"[{tokens}, heads, {head_dim}] and {tuple(key.shape)}"
        )
    if key_cache.shape != value_cache.shape or key_cache.shape[2:] != (kv_heads, head_dim):
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} must both be "
            f"[blocks, block_tokens, {kv_heads}, {head_dim}]"
        )
    if (key_scales is None) != (value_scales is None):
        raise ValueError("key_scales and value_scales go together: give both or neither")
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if scales is not None and (scales.shape != key_cache.shape[:3] or not scales.is_contiguous()):
            raise ValueError(f"{name} {tuple(scales.shape)} must be {tuple(key_cache.shape[:3])}, contiguous")
    if cos.shape != sin.shape or cos.shape[0] != tokens or cos.shape[1] > head_dim or cos.shape[1] % 2:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [{tokens}, rotary_dim], with an even "
            f"rotary_dim of at most {head_dim}"
        )
    if rows.shape != (tokens,):
        raise ValueError(f"rows {tuple(rows.shape)} must be [{tokens}], a cache row for each token")


def check_norms(query_norm: torch.Tensor | None, key_norm: torch.Tensor | None, head_dim: int) -> None:
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm go together: give both or neither")
    for name, weight in (("query_norm", query_norm), ("key_norm", key_norm)):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"{name} {tuple(weight.shape)} must be [{head_dim}]")
