"""Gated RMSNorm in Triton: one program for a few heads of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gated_norm.reference import check_arguments

HEADS = 8  # of a program


def gated_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, gate: torch.Tensor) -> torch.Tensor:
    """As kernels.gated_norm.reference. x and gate may have any strides but in the last dimension."""
    check_arguments(x, weight, gate)
    tokens, heads, dim = x.shape
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated_norm[(tokens, triton.cdiv(heads, HEADS))](
        *(x, weight, gate, output, eps, x.stride(0), x.stride(1), gate.stride(0), heads),
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        HEADS=HEADS,
        num_warps=4,
    )
    return output


@triton.jit
def _gated_norm(
    x,
    weight,
    gate,
    output,
    eps,
    x_token,
    x_head,
    gate_token,
    heads,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    exists = (head < heads) & (at < DIM)
    wide = tl.load(x + token * x_token + head * x_head + at, mask=exists, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / DIM + eps)
    factor = tl.load(weight + at, mask=at < DIM, other=0.0).to(tl.float32)
    own = tl.load(gate + token * gate_token + head * DIM + at, mask=exists, other=0.0).to(tl.float32)
    result = wide * scale[:, None] * factor * (own / (1.0 + tl.exp(-own)))
    where = output + (token * heads + head) * DIM + at
    tl.store(where, result.to(output.dtype.element_ty), mask=exists)
