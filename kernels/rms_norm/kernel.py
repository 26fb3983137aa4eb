"""RMSNorm in Triton: one program a token, its row read once and the sum written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.rms_norm.reference import check_arguments


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.rms_norm.reference. x and residual float32, float16 or bfloat16, their last dimension contiguous."""
    check_arguments(x, weight, residual)
    tokens, width = x.shape
    normed = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    block = triton.next_power_of_2(width)
    _norm[(tokens,)](
        *(x, x if residual is None else residual, weight, normed, total, eps),
        *(x.stride(0), x.stride(0) if residual is None else residual.stride(0)),
        WIDTH=width,
        BLOCK=block,
        RESIDUAL=residual is not None,
        num_warps=max(1, min(16, block // 512)),
    )
    return normed, total


@triton.jit
def _norm(
    x,
    residual,
    weight,
    normed,
    total,
    eps,
    x_token,
    residual_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    exists = at < WIDTH
    row = tl.load(x + token * x_token + at, mask=exists, other=0.0)
    if RESIDUAL:
        other = tl.load(residual + token * residual_token + at, mask=exists, other=0.0)
        row = (row.to(tl.float32) + other.to(tl.float32)).to(row.dtype)
        tl.store(total + token * WIDTH + at, row, mask=exists)
    wide = row.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    factor = tl.load(weight + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(normed + token * WIDTH + at, (wide * scale * factor).to(row.dtype), mask=exists)
