"""Latent append in Triton: two programs a token, one for what goes into the cache and one for the queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.latent_append.reference import check_arguments
from kernels.scaling import scaled_to_fp8


def append_latents(
    compressed: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    interleaved: bool,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels.latent_append.reference. Any strides but the last dimension's may be anything; cos, sin contiguous."""
    check_arguments(compressed, norm_weight, query, cos, sin, rows, latents, rotary, scales, output)
    tokens, heads, turning = query.shape
    width = latents.shape[2]
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _append_latents[(tokens, 2)](
        *(compressed, norm_weight, query, cos, sin, rows, latents, rotary, query if scales is None else scales),
        *(output, eps, compressed.stride(0), query.stride(0), query.stride(1), output.stride(0), output.stride(1)),
        *(latents.stride(0), latents.stride(1), rotary.stride(0), rotary.stride(1)),
        HEADS=heads,
        BLOCK_HEADS=triton.next_power_of_2(heads),
        LATENT=width,
        BLOCK_LATENT=triton.next_power_of_2(width),
        HALF=turning // 2,
        BLOCK_HALF=triton.next_power_of_2(turning // 2),
        BLOCK_TOKENS=latents.shape[1],
        SCALES=scales is not None,
        INTERLEAVED=interleaved,
        num_warps=4,
    )
    return output


@triton.jit
def _turned(source, place, mask, cosine, sine, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both halves of the rotated vector at `source`; place: 0 to HALF - 1 along the last dimension."""
    if INTERLEAVED:
        first = tl.load(source + 2 * place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + 2 * place + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        first = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + place, mask=mask, other=0.0).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _append_latents(
    compressed,
    norm_weight,
    query,
    cos,
    sin,
    rows,
    latents,
    rotary,
    scales,
    output,
    eps,
    compressed_token,
    query_token,
    query_head,
    output_token,
    output_head,
    latent_block,
    latent_token,
    rotary_block,
    rotary_token,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCALES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_HALF)
    turns = place < HALF
    cosine = tl.load(cos + token * (2 * HALF) + place, mask=turns, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * (2 * HALF) + place, mask=turns, other=0.0).to(tl.float32)
    if tl.program_id(1) == 0:
        row = tl.load(rows + token).to(tl.int64)
        if row >= 0:
            block = row // BLOCK_TOKENS
            within = row % BLOCK_TOKENS
            own = compressed + token * compressed_token
            first, second = _turned(own + LATENT, place, turns, cosine, sine, HALF, INTERLEAVED)
            where = rotary + block * rotary_block + within * rotary_token + place
            dtype = compressed.dtype.element_ty  # rounded to it first, whatever the cache holds
            tl.store(where, first.to(dtype).to(rotary.dtype.element_ty), mask=turns)
            tl.store(where + HALF, second.to(dtype).to(rotary.dtype.element_ty), mask=turns)

            at = tl.arange(0, BLOCK_LATENT)
            exists = at < LATENT
            wide = tl.load(own + at, mask=exists, other=0.0).to(tl.float32)
            factor = tl.load(norm_weight + at, mask=exists, other=0.0).to(tl.float32)
            normed = (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / LATENT + eps)) * factor).to(dtype)
            if SCALES:
                normed = scaled_to_fp8(normed, exists, scales + row)
            where = latents + block * latent_block + within * latent_token + at
            tl.store(where, normed.to(latents.dtype.element_ty), mask=exists)
    else:
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (head < HEADS) & turns[None, :]
        own = query + token * query_token + head * query_head
        first, second = _turned(own, place[None, :], mask, cosine[None, :], sine[None, :], HALF, INTERLEAVED)
        where = output + token * output_token + head * output_head + place[None, :]
        tl.store(where, first.to(output.dtype.element_ty), mask=mask)
        tl.store(where + HALF, second.to(output.dtype.element_ty), mask=mask)
